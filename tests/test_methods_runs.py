"""Whole runs of the methods that train weights: resuming, putting back, files, options, the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from typer.testing import CliRunner

from rfa_fast import patch, unlearn
from rfa_fast.cli import app
from rfa_fast.data import ImageDataset
from rfa_fast.methods import METHODS, Batch, NonFiniteError, hash_model
from rfa_fast.methods.checkpoint import RunFolder
from rfa_fast.methods.forget_pass import ForgetPass
from rfa_fast.methods.start import initial_tensors

WEIGHTS = [name for name in METHODS if name != "rfa"]
RUN: dict[str, Any] = {"batch_size": 6, "lr": 1e-2, "epochs": 2, "progress": False}
EXTRA: dict[str, dict[str, Any]] = {
    "scrub": {"max_epochs": 2, "rewind": 0.6}, "rmu": {"targets": ["5"], "layer": 1}
}  # fmt: skip


def net(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.2), nn.Linear(48, 3)
    )


def data(n: int = 15) -> tuple[Subset[Any], Subset[Any]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 1, 6, 6, generator=generator)
    everything = ImageDataset(images, [i % 3 for i in range(n)], classes=("a", "b", "c"))
    forget = [i for i in range(n) if i % 3 == 1]
    return Subset(everything, forget), Subset(everything, [i for i in range(n) if i % 3 != 1])


def run(name: str, model: nn.Module | None = None, **more: Any) -> Any:
    forget, retain = data()
    return unlearn(
        net() if model is None else model, forget, retain, method=name, **{**RUN, **EXTRA.get(name, {}), **more}
    )


def stop_at(step: int) -> Any:
    def callback(record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise RuntimeError("stop here")

    return callback


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, Any]:
    """Runs that nobody stopped, by method."""
    return {}


def figures(result: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in result.history]


@pytest.mark.parametrize(
    ("name", "step"),
    [*(("scrub", step) for step in (1, 3, 4, 5, 8)), ("salun", 2), ("badt", 3), ("retrain", 4)],
    ids=lambda value: str(value),
)
def test_cut_short_and_resumed_is_bit_equal(tmp_path: Path, whole_runs: dict[str, Any], name: str, step: int) -> None:
    if name not in whole_runs:
        whole_runs[name] = run(name, output_dir=tmp_path / "whole")
    whole = whole_runs[name]
    # 5 samples to forget and 10 to keep, 6 a batch: 3 steps over the kept beside 2 others, 1 over the others alone.
    turns = [1, 2, 2, 2, 3, 4, 4, 4] if name == "scrub" else [1, 1, 1, 2, 2, 2]
    assert [record["epoch"] for record in whole.history] == turns
    model = net()
    before = hash_model(model)
    with pytest.raises(RuntimeError, match="stop here"):
        run(name, model, output_dir=tmp_path / "cut", callbacks=[stop_at(step)])
    assert hash_model(model) == before
    assert not model[1].running_mean.requires_grad
    resumed = run(name, model, output_dir=tmp_path / "cut", resume=True)
    assert hash_model(resumed.model) == hash_model(whole.model) != before
    assert figures(resumed) == figures(whole)
    left, right = (RunFolder(r.output_dir).read_tensors() for r in (resumed, whole))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert resumed.record["model"] == whole.record["model"]
    assert resumed.record["model"]["before"] == before


@pytest.mark.parametrize("loaders", [False, True])
def test_a_max_pass_of_scrub_reads_what_is_to_be_forgotten_once(loaders: bool) -> None:
    forget, retain = data(24)
    seen: list[tuple[int, Tensor]] = []

    class Noted(METHODS["scrub"]):  # type: ignore[misc]
        def loss(self, batch: Batch) -> Any:
            seen.append((len(seen), batch.inputs[batch.forget].sum((1, 2, 3))))
            return super().loss(batch)

    sets = (DataLoader(forget, 3, shuffle=True), DataLoader(retain, 4)) if loaders else (forget, retain)
    options = {} if loaders else {"batch_size": 3, "forget_per_batch": 1}
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(METHODS, "scrub", Noted)
        result = unlearn(net(), *sets, method="scrub", epochs=2, max_epochs=2, progress=False, **options)
    counts = [(r["epoch"], r["retain"], r["forget"]) for r in result.history]
    expected = sorted(float(image.sum()) for image, *_ in (forget[i] for i in range(len(forget))))
    for epoch in (1, 3):
        assert [count[1:] for count in counts if count[0] == epoch] == [(0, 3), (0, 3), (0, 2)]
        steps = [i for i, count in enumerate(counts) if count[0] == epoch]
        found = torch.cat([seen[i][1] for i in steps]).tolist()
        assert sorted(found) == pytest.approx(expected)
    assert sum(count[1] for count in counts if count[0] == 2) == len(retain)
    assert result.stopped == "finished"


@pytest.mark.parametrize("name", WEIGHTS)
def test_put_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    before = hash_model(model)
    result = run(name, model, merge=False, output_dir=tmp_path)
    assert hash_model(model) != before
    assert not model.training
    method = result.rfa
    method.remove()
    assert hash_model(model) == before == result.record["model"]["before"]
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert model[2].inplace
    with pytest.raises(ValueError, match="merged or removed"):
        method.remove()


def test_merged_model_its_file_and_its_record(tmp_path: Path) -> None:
    model = net()
    result = run("neggrad", model, output_dir=tmp_path, targets="head")
    assert result.rfa is None
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    saved = load_file(tmp_path / "adapter" / "weights.safetensors")
    assert {"5.weight", "5.bias", "1.running_mean"} <= saved.keys()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in saved.items())
    assert torch.equal(model[0].weight, net()[0].weight)
    assert result.record["layers"] == ["1", "5"]  # the batch norm's statistics have moved
    assert result.record["settings"]["options"] == {"targets": "head", "train_mode": True, "shift_labels": None}
    assert result.record["merge_rounding"] == {"5": 0.0}


def test_rounding_of_a_merge_is_measured_and_said() -> None:
    model = net()
    with pytest.warns(UserWarning, match="lost .* of the change of '5'"):
        result = run("finetune", model, merge=torch.bfloat16, targets="head", lr=1e-4, epochs=1)
    assert model[5].weight.dtype == torch.bfloat16
    assert result.record["merge_rounding"]["5"] > 0.1


def test_bfloat16_weights_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="a step smaller than its rounding changes nothing"):
        METHODS["finetune"](net().bfloat16(), seed=0)


def test_batch_statistics_are_of_the_groups_own_samples() -> None:
    (forget, retain), images = data(), torch.stack([data()[0].dataset[i][0] for i in range(15)])
    for name, part in (("neggrad", forget), ("finetune", retain)):
        model = net()
        method = METHODS[name](model, seed=0)
        mask = torch.tensor([i % 3 == 1 for i in range(15)])
        method.loss(Batch(images, torch.arange(15) % 3, mask))
        mean = net()[0](images[part.indices]).mean((0, 2, 3))
        torch.testing.assert_close(model[1].running_mean, 0.1 * mean)
        method.remove()
        method = METHODS[name](model, seed=0, train_mode=False)
        method.loss(Batch(images, torch.arange(15) % 3, mask))
        assert torch.equal(model[1].running_mean, torch.zeros(3))
        assert method.volatile_tensors() == {}
        assert METHODS[name](net(), seed=0, train_mode=False, targets="head").layers() == ["5"]


@pytest.mark.parametrize("name", ["scrub", "npo", "badt"])
def test_the_reference_is_the_original_in_eval_behaviour(name: str) -> None:
    model = net()
    model[1].running_mean += 0.5
    images = torch.randn(4, 1, 6, 6)
    model.eval()
    expected = model(images).detach()
    model.train()
    method = METHODS[name](model, seed=0)
    with torch.no_grad():
        for tensor in method.state_tensors().values():
            tensor += 1
    live = hash_model(model)
    given = Batch(images, torch.arange(4) % 3, torch.tensor([True, False, True, False]))
    rows = method._reference_rows(given)  # type: ignore[attr-defined]
    assert torch.equal(rows.logits, expected)
    assert not rows.logits.requires_grad
    assert hash_model(model) == live
    assert all(module.training for module in model.modules())


def test_nan_leaves_no_trace_in_the_batch_statistics() -> None:
    forget, retain = data()
    retain.dataset.images[14] = float("nan")
    model = net()
    with pytest.raises(NonFiniteError, match="already hold NaN.*the weights of step . stay on the model") as caught:
        unlearn(model, forget, retain, method="finetune", **RUN)
    assert caught.value.step < 4
    assert torch.isfinite(model[1].running_mean).all()
    assert int(model[1].num_batches_tracked) == caught.value.step - 1
    caught.value.rfa.remove()
    assert hash_model(model) == hash_model(net())


def test_a_single_sample_has_no_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    method = METHODS["neggrad"](model, seed=0)
    lone = Batch(torch.randn(3, 4), torch.arange(3), torch.tensor([False, True, False]))
    method.loss(lone)["total"].backward()
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert model[1].training


def test_scrub_rewinds_to_the_epoch_closest_to_the_error_wished_for() -> None:
    forget, _ = data()
    images, labels = torch.stack([x for x, _ in forget]), torch.tensor([y for _, y in forget])

    def error(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return float((model(images).argmax(1) != labels).double().mean())

    after = [run("scrub", max_epochs=2, rewind=None, epochs=e, lr=3e-4, seed=1).model for e in (1, 2)]
    errors = [error(model) for model in after]
    plain = [hash_model(model) for model in after]
    assert errors[0] != errors[1], errors
    for wished, expected in zip(errors, plain, strict=True):
        assert hash_model(run("scrub", max_epochs=2, rewind=wished, lr=3e-4, seed=1).model) == expected


def test_salun_from_loaders_has_the_mask_of_the_data_sets() -> None:
    forget, retain = data()
    masks = []
    for parts in ((forget, retain), (DataLoader(forget, 2, shuffle=True), DataLoader(retain, 4, shuffle=True))):
        more = {"batch_size": None} if isinstance(parts[0], DataLoader) else {}
        result = unlearn(net(), *parts, method="salun", merge=False, **{**RUN, **more})
        masks.append({k: v for k, v in result.rfa.state_tensors().items() if k.startswith("mask.")})
    assert masks[0].keys() == {f"mask.{name}" for name, _ in net().named_parameters()}
    same = [float((masks[0][k] == masks[1][k]).double().mean()) for k in masks[0]]
    assert min(same) > 0.98  # sums in another order may move a weight across the threshold
    total = sum(m.numel() for m in masks[0].values())
    assert abs(sum(int(m.sum()) for m in masks[0].values()) - total / 2) <= 1


def test_pass_over_what_is_forgotten_repeats_itself_and_leaves_the_generators() -> None:
    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.randn(2), index

    whole = ForgetPass.of_loader(DataLoader(Noisy(), 2, shuffle=True), seed=0, device=torch.device("cpu"))
    state = torch.get_rng_state()
    first, again = list(whole), list(whole)
    assert torch.equal(state, torch.get_rng_state())
    assert [batch.labels.tolist() for batch in first] == [[0, 1], [2, 3], [4]]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, again, strict=True))  # type: ignore[arg-type]
    assert not torch.equal(first[0].inputs, first[1].inputs)  # type: ignore[arg-type]


def test_a_parameter_that_nobody_draws_is_named() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.token = nn.Linear(2, 2), nn.Parameter(torch.full((400,), 7.0))

    model = Token()
    with pytest.warns(UserWarning, match=r"^token: no reset_parameters"):
        drawn = initial_tensors(model, 0)
    assert 0.01 < drawn["token"].std() < 0.03
    assert torch.equal(model.token, torch.full((400,), 7.0))


@pytest.mark.parametrize("name", WEIGHTS)
def test_settings_are_complete_and_refuse_the_unknown(name: str) -> None:
    settings = METHODS[name].settings({})
    assert METHODS[name].settings(settings) == settings
    with pytest.raises(ValueError, match=f"{name}: got unknown options rank, expected some of .*train_mode"):
        METHODS[name].settings({"rank": 8})


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        pytest.param("badt", {"retain_share": 0}, ValueError, "got 0, expected a number > 0 and <= 1", id="share"),
        pytest.param("badt", {"temperature": True}, TypeError, "temperature: got True", id="temperature"),
        pytest.param("scrub", {"rewind": 1.5}, ValueError, "rewind: got 1.5", id="rewind"),
        pytest.param("scrub", {"max_epochs": 1.0}, TypeError, "max_epochs: got 1.0, expected an integer", id="integer"),
        pytest.param("npo", {"beta": float("nan")}, TypeError, "beta: got nan", id="nan"),
        pytest.param("neggrad", {"targets": 3}, TypeError, "targets: got 3", id="targets"),
        pytest.param("neggrad", {"train_mode": "no"}, TypeError, "train_mode: got 'no'", id="flag"),
        pytest.param("retrain", {"initial": "gone.safetensors"}, FileNotFoundError, "initial: gone", id="no file"),
        pytest.param("retrain", {"initial": "w.pt"}, ValueError, "initial: got w.pt, a pickle", id="pickle"),
        pytest.param("retrain", {"targets": "all"}, ValueError, "got unknown options targets", id="retrain in part"),
        pytest.param("rmu", {"layer": 9, "targets": ["5"]}, ValueError, "layer: got 9, expected at most 1", id="layer"),
        pytest.param("finetune", {"targets": "layer9"}, ValueError, "which matched no layer", id="no layer"),
    ],
)  # fmt: skip
def test_wrong_options_change_nothing(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    before = hash_model(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        run(name, model, **options)
    assert (hash_model(model), [p.requires_grad for p in model.parameters()]) == before


def test_models_that_are_refused(tmp_path: Path) -> None:
    model = net()
    handle = patch(model, ["5"], rank=2)
    with pytest.raises(ValueError, match="got one that is patched"):
        METHODS["neggrad"](model, seed=0)
    handle.remove()
    save_file({"5.weight": torch.zeros(3, 48)}, tmp_path / "part.safetensors")
    save_file({k: torch.zeros(1) for k in net().state_dict()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="lacks 0.weight"):
        METHODS["badt"](model, seed=0, initial=str(tmp_path / "part.safetensors"))
    with pytest.raises(ValueError, match=r"has 0.weight of shape \(1,\)"):
        METHODS["retrain"](model, seed=0, initial=str(tmp_path / "other.safetensors"))
    assert all(p.requires_grad for p in model.parameters())


NETS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The beginning of a command on a small network in the current folder."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rfa_fast.report_page.draw_plots", lambda scenario, anchor: [])
    name = f"methods_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    images = np.random.default_rng(0).integers(0, 255, (30, 6, 6)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(30) % 3)
    return ["unlearn", f"{name}:build", "--data", "images.npz", "--forget-class", "1", "--no-progress"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "forgetful"], "--method: got 'forgetful', expected one of rfa, retrain, neggrad, finetune, badt"),
        (["--method", "badt", "--rank", "4"], "--rank: got a value for --method badt, expected none"),
        (["--method", "npo", "--keep-adapter"], "--keep-adapter: got a value for --method npo"),
        (["--method", "badt", "--method-option", "beta=1"], "badt: got unknown options beta, expected some of targets"),
        (["--method", "badt", "--method-option", "retain_share"], "expected KEY=VALUE"),
        (["--method-option", "rank=4", "--rank", "2"], "got rank beside --rank, expected it once"),
        (["--method-option", "ranks=4"], "got unknown ranks, expected some of"),
    ],
    ids=["unknown", "rank", "keep-adapter", "option", "form", "twice", "rfa's"],
)
def test_command_line_refuses(words: list[str], more: list[str], message: str) -> None:
    result = CliRunner().invoke(app, [*words, *more])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("runs").exists()


def test_command_line_runs_a_method(words: list[str]) -> None:
    more = ["--method", "scrub", "--method-option", "temperature=2", "--method-option", "train_mode=false"]
    result = CliRunner().invoke(app, [*words, *more, "--batch-size", "8", "--lr", "0.01", "--output", "out"])
    assert result.exit_code == 0, result.output
    from rfa_fast.methods import read_record
    from rfa_fast.report import RunReport

    settings = read_record("out")["settings"]
    assert settings["method"] == "scrub"
    assert settings["options"]["temperature"] == 2
    assert settings["options"]["train_mode"] is False
    scenario = RunReport.from_json(Path("out") / "report.json").scenarios[0]
    assert scenario.settings["method"]["method"] == "scrub"
    assert set(scenario.feature_distance["D_f"]) == {"0", "4"}
    assert "trained layers: 3" in scenario.notes[0]
    before = CliRunner().invoke(app, ["unlearn", "--help"]).stdout
    assert "simnpo" in before
