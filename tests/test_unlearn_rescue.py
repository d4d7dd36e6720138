"""`unlearn` where it hurts most: a full disk, an error within a step, Ctrl-C after the last one; and what it counts."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import nets, place, run
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from unlearn_cases import LOADED, OPTIONS, data, net, unseen

from rfa_fast import patch, unlearn
from rfa_fast.experiments.cache import ModelCache
from rfa_fast.files import save_tensors
from rfa_fast.methods import METHODS, NonFiniteError, UnlearnInterrupted, hash_model, read_record, verify_record
from rfa_fast.methods import checks as checks_module
from rfa_fast.methods.checkpoint import RunFolder, RunState
from rfa_fast.prefix_cache import PrefixCache
from rfa_fast.report import RunReport

__all__ = ["place"]

STEPS = 10  # of two epochs of loaders
WEIGHTS: dict[str, Any] = {"batch_size": 10, "forget_per_batch": 4, "lr": 1e-2, "progress": False}


def no_room(*_: Any, **__: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.save_file", no_room)


def kept_model(folder: Path) -> None:
    ModelCache(folder, say=lambda text: None).get("original", {"seed": 0}, net, lambda model: 1.0)


WRITERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensors": (lambda folder: save_tensors({"a": torch.ones(2)}, folder / "a.safetensors"), r"a\.safetensors"),
    "module": (lambda folder: save_tensors(nn.Linear(2, 2), folder / "a.safetensors"), r"a\.safetensors"),
    "checkpoint": (lambda folder: RunFolder(folder).save(RunState(step=1), {}), r"state-00000001\.safetensors"),
    "weights": (lambda folder: METHODS["finetune"](net(), seed=0).save(folder / "adapter"), r"weights\.safetensors"),
    "adapter": (lambda folder: patch(net(), ["4"], rank=2).save(folder), r"adapter_model\.safetensors"),
    "prefix": (
        lambda folder: PrefixCache(folder=folder).put(["key"], torch.ones(1, 2)), r"key\.safetensors"
    ),
    "models": (kept_model, r"original-.*\.safetensors"),
}  # fmt: skip


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_os_error_that_names_the_file_and_leaves_no_half_of_it(writer: str, tmp_path: Path) -> None:
    write, file = WRITERS[writer]
    with pytest.raises(OSError, match=rf"{file}: cannot be written \(I/O error: No space left on device"):
        write(tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_a_file_that_cannot_be_written_anew_keeps_what_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"step": "1"})
    monkeypatch.setattr("safetensors.torch.save_file", no_room)
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"a": torch.zeros(2)}, file)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert load_file(file)["a"].tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("full")
@unseen
def test_ctrl_c_on_a_full_disk_leaves_the_adapters_on_the_model(tmp_path: Path) -> None:
    _, forget, retain = data()
    model = net()
    before = hash_model(model)
    with pytest.raises(UnlearnInterrupted, match=r"the state of step 2 could not be saved .*No space left") as caught:
        unlearn(
            model, forget, retain, output_dir=tmp_path, save="checkpoints", callbacks=[press_at(2)], epochs=3, **OPTIONS
        )
    assert (caught.value.step, len(caught.value.history)) == (2, 2)
    caught.value.rfa.remove()
    assert hash_model(model) == before


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, forget, retain = data()
    options = {**OPTIONS, "epochs": 2, "output_dir": tmp_path / "cut"}
    whole = unlearn(net(), forget, retain, **{**options, "output_dir": tmp_path / "whole"})

    def fill(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            monkeypatch.setattr("safetensors.torch.save_file", no_room)

    model = net()
    before = hash_model(model)
    with pytest.raises(OSError, match="No space left") as caught:
        unlearn(model, forget, retain, checkpoint_every=3, callbacks=[fill], **options)
    if sys.version_info >= (3, 11):
        assert "the state of step 3 is in" in caught.value.__notes__[0]
    assert hash_model(model) == before
    monkeypatch.undo()
    check_equal(unlearn(model, forget, retain, resume=True, **options), whole)


def press_at(step: int) -> Callable[[dict[str, Any]], None]:
    def callback(record: dict[str, Any]) -> None:
        if record["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return callback


def check_equal(resumed: Any, whole: Any) -> None:
    assert hash_model(resumed.model) == hash_model(whole.model)
    left, right = (RunFolder(result.output_dir).read_tensors() for result in (resumed, whole))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert [record["total"] for record in resumed.history] == [record["total"] for record in whole.history]


def broken_loss(method: str, step: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of one step fails once its forward is done."""
    kind, made = METHODS[method], iter(range(1, 1000))
    loss = kind.loss

    def breaks(self: Any, batch: Any) -> Any:
        losses = dict(loss(self, batch))
        if next(made) != step:
            return losses
        if how == "NaN":
            return {**losses, "total": losses["total"] * float("nan")}
        if how == "Ctrl-C twice":
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        raise LookupError("in the loss")

    monkeypatch.setattr(kind, "loss", breaks)


FAILURES = {"error": LookupError, "NaN": NonFiniteError, "Ctrl-C twice": UnlearnInterrupted}


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("loaders", [True, False], ids=["loaders", "datasets"])
@pytest.mark.parametrize("method", ["rfa", "finetune"])
def test_a_step_that_fails_within_its_loss_leaves_the_last_complete_one_to_go_on_from(
    method: str, loaders: bool, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, forget, retain = data()
    given: Any = (DataLoader(forget, 5, shuffle=True), DataLoader(retain, 6, shuffle=True))
    options = {**(LOADED if loaders else OPTIONS), "method": method, "epochs": 2}
    if method != "rfa":
        del options["rank"]

    def go(name: str, **more: Any) -> Any:
        return unlearn(
            net(), *(given if loaders else (forget, retain)), output_dir=tmp_path / name, **{**options, **more}
        )

    whole = go("whole")
    assert len(whole.history) == STEPS
    broken_loss(method, 7, how, monkeypatch)
    with pytest.raises(FAILURES[how]):
        go("cut")
    monkeypatch.undo()
    assert RunFolder(tmp_path / "cut").read_state().step == 6
    check_equal(go("cut", resume=True), whole)


def test_a_label_that_names_no_class_leaves_the_last_complete_step_of_loaders_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, forget, retain = data()

    def go(name: str, **more: Any) -> Any:
        return unlearn(
            net(), DataLoader(forget, 5), DataLoader(retain, 6), output_dir=tmp_path / name, epochs=2, **LOADED, **more
        )

    whole, check = go("whole"), checks_module.batch_labels

    def refuses(batch: Any, classes: Any, step: int, *, forget_too: bool) -> None:
        if step == 4:
            raise ValueError("labels: got 77 at step 4")
        check(batch, classes, step, forget_too=forget_too)

    monkeypatch.setattr(checks_module, "batch_labels", refuses)
    with pytest.raises(ValueError, match="got 77"):
        go("cut")
    monkeypatch.undo()
    check_equal(go("cut", resume=True), whole)


def test_an_error_in_the_first_step_leaves_no_mean_feature_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    _, forget, retain = data()
    broken_loss("rfa", 1, "NaN", monkeypatch)
    with pytest.raises(NonFiniteError) as caught:
        unlearn(net(), forget, retain, **OPTIONS)
    left = {name.rpartition(".")[2] for name in caught.value.rfa.state_tensors()}
    assert left == {"lora_a", "lora_b"}


class Last:
    """An `evaluate` that goes wrong when it is asked for the second time: after the last step."""

    def __init__(self, error: BaseException | None) -> None:
        self.error, self.asked = error, 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.asked += 1
        if self.asked == 2:
            if self.error is not None:
                raise self.error
            signal.raise_signal(signal.SIGINT)
        return {"norm": float(sum(p.detach().square().sum() for p in model.parameters()))}


def go_to_the_end(model: nn.Module, error: BaseException | None, **more: Any) -> Any:
    _, forget, retain = data()
    return unlearn(model, forget, retain, evaluate=Last(error), **OPTIONS, **more)


@pytest.fixture
def whole() -> Any:
    _, forget, retain = data()
    return unlearn(net(), forget, retain, **OPTIONS)


def test_ctrl_c_in_the_last_evaluate_says_that_the_merged_model_has_forgotten(whole: Any, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    for folder, said in ((None, "there is no deletion record"), (tmp_path / "run", r"resume=True, .* writes the del")):
        model = net()
        with pytest.raises(UnlearnInterrupted, match=f"after the last step, 5; .* merged into the model.* {said}") as e:
            go_to_the_end(model, None, output_dir=folder)
        assert (e.value.step, e.value.output_dir, e.value.rfa, e.value.merged) == (5, folder, None, True)
        assert len(e.value.history) == 5
        assert hash_model(model) == hash_model(whole.model)
        assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "run" / "deletion_record.json").exists()
    resumed = go_to_the_end(net(), LookupError("not asked twice"), output_dir=tmp_path / "run", resume=True)
    assert read_record(tmp_path / "run")["model"] == whole.record["model"]
    assert verify_record(tmp_path / "run", resumed.model) == []


def test_ctrl_c_in_the_last_evaluate_keeps_adapters_that_were_not_to_be_merged(whole: Any, tmp_path: Path) -> None:
    model = net()
    with pytest.raises(UnlearnInterrupted, match="adapters of step 5 stay on the model") as caught:
        go_to_the_end(model, None, merge=False)
    assert caught.value.merged is False
    caught.value.rfa.merge()
    assert hash_model(model) == hash_model(whole.model)
    model = net()
    before = hash_model(model)
    with pytest.raises(UnlearnInterrupted, match="the state of step 5 is in .* and the model is as before") as caught:
        go_to_the_end(model, None, merge=False, output_dir=tmp_path)
    assert (caught.value.rfa, hash_model(model, adapters=True)) == (None, before)
    resumed = go_to_the_end(model, LookupError("not asked twice"), merge=False, output_dir=tmp_path, resume=True)
    resumed.rfa.merge()
    assert hash_model(model) == hash_model(whole.model)


def test_a_second_ctrl_c_does_not_cut_the_record_in_two(
    whole: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rfa_fast.methods import run as module

    build = module.build_record

    def pressed(**given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return build(**given)

    monkeypatch.setattr(module, "build_record", pressed)
    _, forget, retain = data()
    result = unlearn(net(), forget, retain, evaluate=lambda m: {"x": 0.0}, output_dir=tmp_path, **OPTIONS)
    assert read_record(tmp_path)["model"] == result.record["model"] == whole.record["model"]


def notes(error: BaseException) -> str:
    """What was added to an error; the words to look for where Python has no notes yet."""
    return " ".join(getattr(error, "__notes__", [])) if sys.version_info >= (3, 11) else ""


def test_an_error_in_the_last_evaluate_says_what_the_model_holds(whole: Any, tmp_path: Path) -> None:
    noted = sys.version_info >= (3, 11)
    model = net()
    with pytest.raises(LookupError) as caught:
        go_to_the_end(model, LookupError("no figures"), output_dir=tmp_path / "run")
    assert hash_model(model) == hash_model(whole.model)
    if noted:
        assert "after the last step, 5; the unlearning itself is finished, and its result merged" in notes(caught.value)
        assert "resume=True, given the model from before, writes the deletion record to" in notes(caught.value)
    go_to_the_end(net(), LookupError("not asked twice"), output_dir=tmp_path / "run", resume=True)
    assert read_record(tmp_path / "run")["model"] == whole.record["model"]
    for folder in (None, tmp_path / "live"):
        model = net()
        before = hash_model(model)
        with pytest.raises(LookupError) as caught:
            go_to_the_end(model, LookupError("no figures"), output_dir=folder, merge=False)
        assert hash_model(model, adapters=True) == before
        if noted:
            assert "the model is as before" in notes(caught.value)
    resumed = go_to_the_end(model, LookupError("not asked twice"), output_dir=folder, merge=False, resume=True)
    resumed.rfa.merge()
    assert hash_model(model) == hash_model(whole.model)


@pytest.fixture
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    ("method", "options", "drawn"),
    [
        ("finetune", {}, 0),
        ("retrain", {}, 0),
        ("neggrad", {}, 20),
        ("scrub", {}, 14),
        ("scrub", {"max_epochs": 2, "epochs": 3}, 28),
        ("scrub", {"max_epochs": 0}, 0),
    ],
)
def test_forget_samples_are_counted_in_the_epochs_alone_that_use_them(
    method: str, options: dict[str, Any], drawn: int
) -> None:
    _, forget, retain = data()
    result = unlearn(net(), forget, retain, method=method, **WEIGHTS, **options)
    assert len(forget) == 14
    assert result.record["training"]["forget_samples_drawn"] == drawn
    assert sum(record["forget"] for record in result.history) >= 20  # what the batches held


def test_a_max_pass_that_is_cut_short_says_what_it_left_out() -> None:
    _, forget, retain = data()
    with pytest.warns(UserWarning, match="10 forget samples were drawn, fewer than the 14 to forget"):
        result = unlearn(net(), forget, retain, method="scrub", max_steps=1, **WEIGHTS)
    assert result.record["training"]["forget_samples_drawn"] == 10


@pytest.mark.filterwarnings("error:unlearn:UserWarning")
def test_a_report_says_how_often_forget_samples_came_where_a_method_uses_them(place: Path) -> None:
    words = ["--data", "images.npz", "--forget-class", "1", "--batch-size", "8", "--lr", "0.01", "--no-distances"]
    for method, said in (("finetune", "layers: 3."), ("scrub", "each sample to forget came once; trained layers: 3.")):
        output = str(place / method)
        run("unlearn", f"{nets(place)}:build", *words, "--method", method, "--no-progress", "--output", output)
        note = RunReport.from_json(place / method / "report.json").scenarios[0].notes[0]
        assert note.endswith(said)
        assert ("came" in note) == (method == "scrub")
