"""Runs that are gone on with where one could miss something: at a step's last question, and after the last step."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from transformers import BatchEncoding

from rfa_fast import unlearn
from rfa_fast.methods import UnlearnInterrupted, hash_model
from rfa_fast.methods.checkpoint import RunFolder

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
FORGET, RETAIN = [i for i in range(24) if i % 3 == 0], [i for i in range(24) if i % 3]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def run(out: Path, model: nn.Module | None = None, **options: Any) -> Any:
    everything = TensorDataset(X, torch.arange(24) % 3)
    given = {"method": "finetune", "batch_size": 4, "lr": 1e-2, "progress": False, **options}
    model = net() if model is None else model
    return unlearn(model, Subset(everything, FORGET), Subset(everything, RETAIN), output_dir=out, **given)


def flaky(number: int, fail: Callable[[], object]) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation that is the same whenever it is asked, but for the one time that it fails."""
    calls: list[int] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) == number:
            fail()
        return {"norm": float(sum(p.detach().square().sum() for p in model.parameters()))}

    return evaluate


def error() -> None:
    raise RuntimeError("flaky")


def ctrl_c_twice() -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def check_equal(resumed: Any, whole: Any) -> None:
    """The same weights, steps, record and last checkpoint, but for the time that it all took."""
    assert hash_model(resumed.model) == hash_model(whole.model)
    untimed = [[{k: v for k, v in step.items() if k != "seconds"} for step in r.history] for r in (resumed, whole)]
    assert untimed[0] == untimed[1]
    lines = (resumed.output_dir / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == resumed.history
    left, right = (RunFolder(r.output_dir).read_tensors() for r in (resumed, whole))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    states = [RunFolder(r.output_dir).read_state() for r in (resumed, whole)]
    for state in states:
        state.seconds = 0.0
    assert states[0] == states[1]
    for name in ("model", "metrics", "files"):
        assert resumed.record[name] == whole.record[name]
    trained = [{k: v for k, v in r.record["training"].items() if k != "seconds"} for r in (resumed, whole)]
    assert trained[0] == trained[1]


# The first of the evaluations is that before the run, so step 3 is asked about in the fourth, or in the second.
QUESTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "max_steps": (4, {"max_steps": 3, "until": lambda figures: False, "until_every": 1}),
    "until": (2, {"until": lambda figures: True, "until_every": 3}),
    "no": (2, {"max_steps": 5, "until": lambda figures: False, "until_every": 3}),
    "epoch": (2, {"epochs": 2, "until": lambda figures: False, "until_every": 8}),
    "rfa": (2, {"method": "rfa", "rank": 2, "until": lambda figures: True, "until_every": 3}),
}


@pytest.mark.parametrize("old", [False, True], ids=["", "state of before"])
@pytest.mark.parametrize("fail", [error, ctrl_c_twice])
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_step_that_was_not_asked_about_is_asked_about_first(
    tmp_path: Path, name: str, fail: Callable[[], object], old: bool
) -> None:
    number, options = QUESTIONS[name]
    whole = run(tmp_path / "whole", evaluate=flaky(0, fail), **options)
    model, seen = net(), []
    options = {**options, "callbacks": [lambda record: seen.append(record["step"])]}
    with pytest.raises((RuntimeError, UnlearnInterrupted)):
        run(tmp_path / "cut", model, evaluate=flaky(number, fail), **options)
    cut = RunFolder(tmp_path / "cut").read_state()
    assert (cut.step, cut.stopped) == (options["until_every"] * (3 if name == "max_steps" else 1), None)
    if old:
        file = tmp_path / "cut" / "state.json"
        values = json.loads(file.read_text())
        values["state"].pop("asked", None)
        file.write_text(json.dumps(values))
    check_equal(run(tmp_path / "cut", model, resume=True, evaluate=flaky(0, fail), **options), whole)
    # What an earlier version left does not say whether the callbacks had that step.
    assert seen == [step["step"] for step in whole.history if not old or step["step"] != cut.step]


def test_a_step_is_asked_about_once(tmp_path: Path) -> None:
    asked: list[int] = []

    def until(figures: Any) -> bool:
        asked.append(1)
        return len(asked) == 3

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise RuntimeError("stop here")

    options = {"evaluate": flaky(0, error), "until": until, "until_every": 2}
    whole = run(tmp_path / "whole", **options)
    asked.clear()
    with pytest.raises(RuntimeError, match="stop here"):
        run(tmp_path / "cut", callbacks=[stop], **options)
    assert len(asked) == 1
    check_equal(run(tmp_path / "cut", resume=True, **options), whole)
    assert (len(asked), len(whole.history)) == (3, 6)


def test_what_stops_a_run_that_goes_on_with_a_question_stops_it_before_a_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 5, "until": lambda figures: False, "until_every": 2}
    whole = run(tmp_path / "whole", evaluate=flaky(0, error), **options)
    model, seen = net(), []

    def callback(record: dict[str, Any]) -> None:
        seen.append(record["step"])
        if record["step"] == 2:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="flaky"):
        run(tmp_path / "cut", model, evaluate=flaky(2, error), **options)
    press = flaky(1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(UnlearnInterrupted, match="after step 2") as caught:
        run(tmp_path / "cut", model, evaluate=press, resume=True, **options)
    assert (caught.value.step, hash_model(model)) == (2, hash_model(net()))
    # The answer has been kept, so that a callback has every step once, and one that fails does not fail again.
    check_equal(
        run(tmp_path / "cut", model, evaluate=flaky(0, error), resume=True, callbacks=[callback], **options), whole
    )
    assert seen == [3, 4, 5]


def test_a_callback_that_fails_after_the_question_is_not_called_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"until": lambda figures: True, "until_every": 2}
    whole = run(tmp_path / "whole", evaluate=flaky(0, error), **options)
    with pytest.raises(RuntimeError, match="flaky"):
        run(tmp_path / "cut", evaluate=flaky(2, error), **options)
    options |= {"evaluate": flaky(0, error), "callbacks": [lambda record: error()], "resume": True}
    with pytest.raises(RuntimeError, match="flaky"):
        run(tmp_path / "cut", **options)
    assert RunFolder(tmp_path / "cut").read_state().stopped == "until"
    check_equal(run(tmp_path / "cut", **options), whole)


def test_a_full_disk_loses_an_answer_and_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: RunFolder, state: Any, tensors: Any) -> None:
        raise OSError(28, "No space left on device")

    options: dict[str, Any] = {"until": lambda figures: True, "until_every": 2}
    whole = run(tmp_path / "whole", evaluate=flaky(0, error), **options)
    with pytest.raises(RuntimeError, match="flaky"):
        run(tmp_path / "cut", evaluate=flaky(2, error), **options)
    options |= {"evaluate": flaky(0, error), "resume": True}
    model = net()
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save", full)
        with pytest.raises(RuntimeError, match="flaky") as caught:
            run(tmp_path / "cut", model, callbacks=[lambda record: error()], **options)
    assert hash_model(model) == hash_model(net())
    if sys.version_info >= (3, 11):
        assert "after step 2; the state of step 2 is in" in caught.value.__notes__[0]
    check_equal(run(tmp_path / "cut", model, **options), whole)


@pytest.mark.parametrize("flags", ["train", "eval", "mixed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"train_mode": False}, {"method": "scrub", "rewind": 0.9, "epochs": 2}, {"method": "rfa", "rank": 2}],
    ids=["finetune", "train_mode", "scrub", "rfa"],
)
def test_a_finished_run_hands_over_the_same_flags_again(tmp_path: Path, options: dict[str, Any], flags: str) -> None:
    def given() -> nn.Module:
        model = net().train(flags != "eval")
        if flags == "mixed":
            model[1].eval()
        return model

    kept: list[Any] = []
    for resume in (False, True):
        model = given()
        result = run(tmp_path, model, resume=resume, merge=False, **options)
        flags_now = [module.training for module in model.modules()]
        kept.append((flags_now, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        result.rfa.remove()
        assert [module.training for module in model.modules()] == [module.training for module in given().modules()]
    (first, weights), (again, weights_again) = kept
    assert again == first
    assert all(torch.equal(weights_again[name], weights[name]) for name in weights)


class Keywords(nn.Module):
    """A classifier of keyword arguments, as transformers models are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, pixel_values: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.body(pixel_values * scale)
        return out


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return index


def pairs(kind: type) -> Callable[[list[int]], Any]:
    def collate(items: list[int]) -> Any:
        values = {"pixel_values": X[items], "scale": torch.full((len(items), 1), 2.0)}
        return kind(values), torch.tensor(items) % 3

    return collate


@pytest.mark.parametrize("loaders", [False, True], ids=["datasets", "loaders"])
@pytest.mark.parametrize("method", ["finetune", "rfa", "badt", "npo", "scrub", "salun", "retrain"])
@pytest.mark.filterwarnings("ignore:.*reset_parameters")
def test_any_mapping_is_a_batch_of_keyword_arguments(tmp_path: Path, method: str, loaders: bool) -> None:
    def go(kind: type, out: str, **more: Any) -> Any:
        sets: list[Any] = [Subset(Pairs(), FORGET), Subset(Pairs(), RETAIN)]
        options: dict[str, Any] = {"method": method, "lr": 1e-2, "progress": False, "output_dir": tmp_path / out}
        options |= {"scrub": {"rewind": 0.5}, "rfa": {"rank": 2}}.get(method, {})
        if loaders:
            sets = [DataLoader(data, batch_size=4, shuffle=True, collate_fn=pairs(kind)) for data in sets]
        else:
            options |= {"batch_size": 6, "collate_fn": pairs(kind)}
        return unlearn(Keywords(), *sets, **options, **more)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise RuntimeError("stop here")

    plain = go(dict, "dict")
    with pytest.raises(RuntimeError, match="stop here"):
        go(BatchEncoding, "mapping", callbacks=[stop])
    check_equal(go(BatchEncoding, "mapping", resume=True), plain)


def test_loaders_of_mappings_with_other_keys_are_named() -> None:
    def one(key: str, indices: list[int]) -> Any:
        def collate(items: list[int]) -> Any:
            return BatchEncoding({key: X[items]}), torch.tensor(items) % 3

        return DataLoader(Subset(Pairs(), indices), batch_size=4, collate_fn=collate)

    with pytest.raises(ValueError, match=r"forget: the loader gave inputs \['other'\], expected .* \['pixel_values'\]"):
        unlearn(Keywords(), one("other", FORGET), one("pixel_values", RETAIN), method="finetune", progress=False)
