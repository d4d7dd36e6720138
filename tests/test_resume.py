"""A run that was cut short and resumed must end like one that was not: weights, optimizer, history, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from rfa_fast import unlearn
from rfa_fast.methods import NonFiniteError, UnlearnInterrupted, hash_model, verify_record
from rfa_fast.methods.checkpoint import RunFolder, RunState

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from case import data, net
from rfa_fast import unlearn

def die(record):
    if record["step"] == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

forget, retain = data()
unlearn(net(), forget, retain, output_dir={out!r}, callbacks=[die], checkpoint_every=3, **{options!r})
"""

# Written to a file for the process that is killed, and used here, so that both have the same case.
CASE = '''
import torch
from torch import nn
from torch.utils.data import Dataset, Subset


class Noisy(Dataset):
    """Random augmentation from three generators: what a resumed run has to repeat."""

    def __init__(self, n=66):
        generator = torch.Generator().manual_seed(5)
        self.x, self.labels = torch.randn(n, 2, 6, 6, generator=generator), [i % 3 for i in range(n)]
        self.ids = [f"sample-{i}" for i in range(n)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        import random
        import numpy

        noise = torch.randn(2, 6, 6) * 0.1 + float(numpy.random.rand()) + random.random()
        return self.x[index] + noise, self.labels[index]


class Jitter(nn.Module):  # draws in every forward, in eval mode too
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def data():
    everything = Noisy()
    forget = [i for i in range(66) if i % 3 == 0]
    return Subset(everything, forget), Subset(everything, [i for i in range(66) if i % 3])


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Jitter(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3)
    )
'''
namespace: dict[str, Any] = {"__name__": "case"}
exec(compile(CASE, "case.py", "exec"), namespace)
data, net = namespace["data"], namespace["net"]

OPTIONS: dict[str, Any] = {
    "targets": ["0", "5", "6"], "rank": 2, "batch_size": 12, "epochs": 2, "lr": 1e-2, "progress": False
}  # fmt: skip
STEPS = 12


def stop_at(step: int, error: BaseException) -> Any:
    def callback(record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise error

    return callback


def run(out: Path, model: nn.Module | None = None, **extra: Any) -> Any:
    forget, retain = data()
    return unlearn(net() if model is None else model, forget, retain, output_dir=out, **{**OPTIONS, **extra})


def losses(result: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in result.history]


def check_equal(resumed: Any, whole: Any) -> None:
    assert hash_model(resumed.model) == hash_model(whole.model)
    left, right = (RunFolder(r.output_dir).read_tensors() for r in (resumed, whole))
    assert left.keys() == right.keys()
    assert any(k.startswith("optimizer.exp_avg_sq.") for k in left)
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert losses(resumed) == losses(whole)
    lines = [json.loads(line) for line in (resumed.output_dir / "history.jsonl").read_text().splitlines()]
    assert lines == resumed.history
    assert resumed.record["model"] == whole.record["model"]


@pytest.mark.parametrize("step", [1, 6, STEPS], ids=["first", "end of epoch", "last"])
@pytest.mark.parametrize(
    "extra",
    [{}, {"mode": "teacher", "forget_per_batch": "natural"}, {"adapter": "dora"}, {"adapter": "pissa", "norm": "l2"}],
    ids=["residual", "teacher", "dora", "pissa"],
)
def test_error_then_resume(tmp_path: Path, step: int, extra: dict[str, Any]) -> None:
    whole = run(tmp_path / "whole", **extra)
    assert (len(whole.history), whole.history[5]["epoch"], whole.history[6]["epoch"]) == (STEPS, 1, 2)
    model = net()
    before = hash_model(model)
    with pytest.raises(RuntimeError, match="stop here") as caught:
        run(tmp_path / "cut", model, callbacks=[stop_at(step, RuntimeError("stop here"))], **extra)
    assert hash_model(model) == before
    assert not any(hasattr(module, "rfa_name") for module in model.modules())
    if sys.version_info >= (3, 11):
        assert "resume=True" in caught.value.__notes__[0]
    assert RunFolder(tmp_path / "cut").read_state().step == step
    check_equal(run(tmp_path / "cut", model, resume=True, **extra), whole)


def test_killed_then_resumed(tmp_path: Path) -> None:
    (tmp_path / "case.py").write_text(CASE)
    out = tmp_path / "run"
    script = SCRIPT.format(folder=str(tmp_path), step=5, out=str(out), options=OPTIONS)
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are in their order
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=threads)
    assert killed.returncode == -signal.SIGKILL
    assert RunFolder(out).read_state().step == 3
    assert len((out / "history.jsonl").read_text().splitlines()) == 5
    with (out / "history.jsonl").open("a") as file:
        file.write('{"step": 6, "to')  # a kill in the middle of a line
    check_equal(run(out, resume=True), run(tmp_path / "whole"))


def test_checkpoints_alone_are_written_late_and_gone_on_from(tmp_path: Path) -> None:
    whole, seen = run(tmp_path / "whole"), {}

    def look(record: dict[str, Any]) -> None:
        seen[record["step"]] = (tmp_path / "run").exists()
        if record["step"] == 7:  # what a kill would leave
            shutil.copytree(tmp_path / "run", tmp_path / "cut")

    alone = run(tmp_path / "run", save="checkpoints", checkpoint_every=5, callbacks=[look])
    assert (seen[5], seen[6]) == (False, True)  # step 5 is saved after its callbacks
    assert sorted(p.name for p in alone.output_dir.iterdir()) == [
        "history.jsonl", "state-00000010.safetensors", "state.json"
    ]  # fmt: skip
    assert RunFolder(tmp_path / "cut").read_state().step == 5
    assert len((tmp_path / "cut" / "history.jsonl").read_text().splitlines()) == 7
    resumed = run(tmp_path / "cut", save="checkpoints", resume=True)
    for result in (alone, resumed):
        assert hash_model(result.model) == hash_model(whole.model)
        assert losses(result) == losses(whole)
        assert result.record["model"] == whole.record["model"]
        assert not {"deletion_record.json", "adapter"} & {p.name for p in result.output_dir.iterdir()}


def test_a_short_run_that_keeps_checkpoints_alone_writes_nothing(tmp_path: Path) -> None:
    result = run(tmp_path / "run", save="checkpoints")
    assert (result.output_dir, list(tmp_path.iterdir())) == (None, [])
    with pytest.raises(RuntimeError, match="stop here"):
        run(tmp_path / "cut", save="checkpoints", callbacks=[stop_at(4, RuntimeError("stop here"))])
    assert RunFolder(tmp_path / "cut").read_state().step == 4
    assert len((tmp_path / "cut" / "history.jsonl").read_text().splitlines()) == 4
    assert hash_model(run(tmp_path / "cut", save="checkpoints", resume=True).model) == hash_model(result.model)
    with pytest.raises(ValueError, match="save: got 'nothing', expected one of 'all', 'checkpoints'"):
        run(tmp_path / "other", save="nothing")


def test_nothing_is_said_to_be_saved_where_nothing_could_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "save", full)
    with pytest.raises(RuntimeError) as caught:
        run(tmp_path / "run", save="checkpoints", callbacks=[stop_at(4, RuntimeError("stop here"))])
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert "could not be saved" in note
        assert "nothing was saved yet; the model is as before" in note


def test_interrupted_then_resumed(tmp_path: Path) -> None:
    model = net()
    before = hash_model(model)

    def press(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(UnlearnInterrupted, match=r"is in .*cut and .*resume=True") as caught:
        run(tmp_path / "cut", model, callbacks=[press])
    assert (caught.value.step, caught.value.output_dir, caught.value.rfa) == (4, tmp_path / "cut", None)
    assert hash_model(model) == before
    check_equal(run(tmp_path / "cut", model, resume=True), run(tmp_path / "whole"))


def test_resumed_twice(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(tmp_path / "cut", callbacks=[stop_at(2, RuntimeError())])
    with pytest.raises(RuntimeError):
        run(tmp_path / "cut", resume=True, callbacks=[stop_at(7, RuntimeError())])
    check_equal(run(tmp_path / "cut", resume=True), run(tmp_path / "whole"))
    assert len(list((tmp_path / "cut").glob("state-*.safetensors"))) == 1


class OneByOne(Sampler[int]):
    """Draws from torch's generator for every sample."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        bag = list(range(self.n))
        while bag:
            yield bag.pop(int(torch.randint(len(bag), ())))


@pytest.mark.parametrize("kind", ["torch's generator", "a generator of its own", "a sampler of its own"])
def test_loaders_resume(tmp_path: Path, kind: str) -> None:
    options, (forget, retain) = {k: v for k, v in OPTIONS.items() if k != "batch_size"}, data()

    def go(out: str, **extra: Any) -> Any:
        generator = torch.Generator().manual_seed(11) if kind == "a generator of its own" else None
        state = None if generator is None else generator.get_state()
        loaders = [
            DataLoader(part, size, shuffle=True, generator=generator)
            if kind != "a sampler of its own"
            else DataLoader(part, size, sampler=OneByOne(len(part)))
            for part, size in ((forget, 3), (retain, 9))
        ]
        try:
            return unlearn(net(), *loaders, output_dir=tmp_path / out, **options, **extra)
        finally:
            assert generator is None or torch.equal(generator.get_state(), state)

    whole = go("whole")
    assert len(whole.history) == 10
    for step in (3, 5, 7):
        with pytest.raises(RuntimeError):
            go(f"cut{step}", callbacks=[stop_at(step, RuntimeError())])
        check_equal(go(f"cut{step}", resume=True), whole)


@pytest.mark.parametrize("what", ["inputs", "labels"])
def test_other_samples_under_the_same_names(tmp_path: Path, what: str) -> None:
    """The settings hold the names of the samples, positions or lines most often: a file may have changed since."""
    with pytest.raises(RuntimeError):
        run(tmp_path / "cut", callbacks=[stop_at(5, RuntimeError())])
    model, (forget, retain) = net(), data()
    before = hash_model(model)
    if what == "inputs":
        forget.dataset.x += 0.01
    else:
        forget.dataset.labels = [(label + 1) % 3 for label in forget.dataset.labels]
    assert retain.dataset is forget.dataset
    with pytest.raises(ValueError, match="resume: the data sets gave another batch at step 5 than in the run"):
        unlearn(model, forget, retain, output_dir=tmp_path / "cut", resume=True, **OPTIONS)
    assert hash_model(model) == before
    check_equal(run(tmp_path / "cut", resume=True), run(tmp_path / "whole"))


def test_data_with_a_generator_of_its_own_go_on_and_that_is_said(tmp_path: Path) -> None:
    class Own(Dataset[Any]):
        draws, labels = np.random.default_rng(0), [i % 3 for i in range(20)]

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((2, 6, 6), float(self.draws.random())), index % 3

    _, retain = data()

    def go(**extra: Any) -> Any:
        return unlearn(net(), Own(), retain, output_dir=tmp_path, **OPTIONS, **extra)

    with pytest.raises(RuntimeError):
        go(callbacks=[stop_at(3, RuntimeError())])
    with pytest.warns(UserWarning, match="from a generator that torch, numpy.random and random do not seed"):
        assert len(go(resume=True).history) == go(resume=True).record["training"]["steps"]


def test_loader_that_does_not_repeat_itself(tmp_path: Path) -> None:
    class Fickle(Dataset[Any]):
        calls = 0

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            Fickle.calls += 1
            return torch.full((2, 6, 6), float(Fickle.calls)), index % 3

    options = {k: v for k, v in OPTIONS.items() if k != "batch_size"}
    forget, _ = data()

    def go(**extra: Any) -> Any:
        return unlearn(net(), DataLoader(forget, 4), DataLoader(Fickle(), 5), output_dir=tmp_path, **options, **extra)

    with pytest.raises(RuntimeError):
        go(callbacks=[stop_at(3, RuntimeError())])
    with pytest.raises(ValueError, match="another batch at step 3"):
        go(resume=True)


def test_folder_of_another_run(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="8 forget samples were drawn, fewer than the 22"):
        run(tmp_path, max_steps=2)
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(FileExistsError, match=r"already holds the run of rfa that ended after step 2.*resume=True"):
        run(tmp_path)
    assert kept == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        run(tmp_path / "file")
    (tmp_path / "state.json").unlink()
    with pytest.raises(FileExistsError, match=r"but no state\.json"):
        run(tmp_path, resume=True)


def test_other_versions_are_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(tmp_path, callbacks=[stop_at(2, RuntimeError())])
    state = (tmp_path / "state.json").read_text()
    (tmp_path / "state.json").write_text(
        state.replace(f'"torch": "{torch.__version__.partition("+")[0]}', '"torch": "1.0')
    )
    with pytest.warns(UserWarning, match=r"begun with other versions \(torch: '1.0"):
        run(tmp_path, resume=True)


def test_other_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(tmp_path, callbacks=[stop_at(2, RuntimeError())])
    with pytest.raises(ValueError, match="other settings") as caught:
        run(tmp_path, resume=True, lr=5e-3, rank=4, epochs=3)
    for line in ("lr: 0.01 in the run, 0.005 now", "options.rank: 2 in the run, 4 now", "epochs: 2 in the run, 3 now"):
        assert line in str(caught.value)
    assert "gamma" not in str(caught.value)
    forget, retain = data()
    fewer = Subset(forget.dataset, list(forget.indices)[:-1])
    with pytest.raises(ValueError, match=r"forget_count: 22 in the run, 21 now"):
        unlearn(net(), fewer, retain, output_dir=tmp_path, resume=True, **OPTIONS)
    other = net()
    with torch.no_grad():
        other[6].bias[0] += 1
    before = hash_model(other)
    with pytest.raises(ValueError, match=r"model: '"):
        run(tmp_path, other, resume=True)
    assert hash_model(other) == before
    assert not any(hasattr(module, "rfa_name") for module in other.modules())
    assert RunFolder(tmp_path).read_state().step == 2


def test_nothing_to_resume_starts_anew_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no run in .* a new one begins"):
        resumed = run(tmp_path / "new", resume=True)
    check_equal(resumed, run(tmp_path / "whole"))


def test_finished_run_resumed_is_the_same_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    document = (tmp_path / "deletion_record.json").read_bytes()
    again = run(tmp_path, resume=True)
    assert hash_model(again.model) == hash_model(first.model)
    assert (tmp_path / "deletion_record.json").read_bytes() == document
    assert again.record == first.record
    assert again.history == first.history
    assert verify_record(tmp_path, again.model, data()[0].dataset.ids[::3]) == []


@pytest.mark.parametrize("damage", ["truncated", "missing", "state", "not ours"])
def test_damaged_state(tmp_path: Path, damage: str) -> None:
    with pytest.raises(RuntimeError):
        run(tmp_path, callbacks=[stop_at(2, RuntimeError())])
    tensors = tmp_path / "state-00000002.safetensors"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-7])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "state":
        (tmp_path / "state.json").write_text('{"schema": ')
    else:
        (tmp_path / "state.json").write_text('{"schema": "something else"}')
    expected = FileNotFoundError if damage == "missing" else ValueError
    model = net()
    before = hash_model(model)
    with pytest.raises(expected, match="another folder"):
        run(tmp_path, model, resume=True)
    assert hash_model(model) == before
    assert not any(hasattr(module, "rfa_name") for module in model.modules())


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = RunFolder.save

    def full(self: RunFolder, state: RunState, tensors: Any) -> None:
        if state.step >= 4:
            raise OSError(28, "No space left on device")
        save(self, state, tensors)

    monkeypatch.setattr(RunFolder, "save", full)
    model = net()
    before = hash_model(model)
    with pytest.raises(OSError, match="No space left") as caught:
        run(tmp_path / "cut", model, checkpoint_every=2)
    if sys.version_info >= (3, 11):
        assert "the state of step 2 is in" in caught.value.__notes__[0]
    assert hash_model(model) == before

    def press(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(UnlearnInterrupted, match="could not be saved") as stopped:
        run(tmp_path / "other", model, callbacks=[press])
    assert stopped.value.rfa is not None
    stopped.value.rfa.remove()
    monkeypatch.undo()
    check_equal(run(tmp_path / "cut", model, resume=True), run(tmp_path / "whole"))


def test_last_good_state_is_saved_before_a_nan(tmp_path: Path) -> None:
    poisoned: list[int] = []

    def poison(record: dict[str, Any]) -> None:
        if record["step"] == 4 and not poisoned:
            poisoned.append(1)
            namespace["Noisy"].__getitem__ = lambda self, index: (self.x[index] * float("nan"), self.labels[index])

    sound = namespace["Noisy"].__getitem__
    model = net()
    try:
        with pytest.raises(NonFiniteError, match=r"step 5: .*the state of step 4 is in") as caught:
            run(tmp_path / "cut", model, callbacks=[poison])
    finally:
        namespace["Noisy"].__getitem__ = sound
    assert (caught.value.step, caught.value.rfa, caught.value.output_dir) == (5, None, tmp_path / "cut")
    assert caught.value.layers[0] == "0"
    assert all(bool(torch.isfinite(t).all()) for t in RunFolder(tmp_path / "cut").read_tensors().values())
    check_equal(run(tmp_path / "cut", model, resume=True), run(tmp_path / "whole"))


def test_until_holds_after_resume(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"norm": float(sum(p.detach().square().sum() for p in model.parameters()))}

    seen: list[float] = []

    def until(figures: Any) -> bool:
        seen.append(figures["norm"])
        return len(seen) % 4 == 0

    options = {"evaluate": evaluate, "until": until, "until_every": 2}
    whole = run(tmp_path / "whole", **options)
    assert (whole.stopped, len(whole.history), len(seen)) == ("until", 8, 4)
    # The fourth question falls together with an error: the answer must not be lost.
    with pytest.raises(RuntimeError):
        run(tmp_path / "cut", callbacks=[stop_at(8, RuntimeError())], **options)
    resumed = run(tmp_path / "cut", resume=True, **options)
    assert resumed.stopped == "until"
    check_equal(resumed, whole)
    assert resumed.record["metrics"] == whole.record["metrics"]
