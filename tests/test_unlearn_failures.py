"""`unlearn` interrupted, with NaN, and with everything that can be given wrongly: nothing is lost or changed."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset
from unlearn_cases import LAYERS, OPTIONS, data, net, unseen

import rfa_fast
from rfa_fast import patch, unlearn
from rfa_fast.data import ImageDataset
from rfa_fast.methods import NonFiniteError, UnlearnInterrupted, hash_model
from rfa_fast.methods.loop import Loop


def untouched(model: nn.Module, before: str) -> bool:
    return hash_model(model, adapters=True) == before and not any(hasattr(m, "rfa_name") for m in model.modules())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from [(torch.zeros(1, 6, 6), 0)] * 4


def texts(lengths: list[int], label: int, masked: bool = True) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(label)
    items = []
    for length in lengths:
        ids = torch.randint(1, 20, (length,), generator=generator)
        item = {"input_ids": ids, "labels": torch.tensor(label)}
        items.append({**item, "attention_mask": torch.ones_like(ids)} if masked else item)
    return items


class Words(nn.Module):
    """A classifier of token ids; its mean leaves padding out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.widths: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.widths.append(input_ids.shape[1])
        mask = attention_mask[..., None].float()
        hidden = self.hidden(self.embed(input_ids)).relu() * mask
        logits: Tensor = self.out(hidden.sum(1) / mask.sum(1))
        return logits


EVERYTHING, FORGET, RETAIN = data()


@unseen
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_without_a_folder_leaves_the_adapters(presses: int) -> None:
    _, forget, retain = data()
    handler = signal.getsignal(signal.SIGINT)

    def press(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    model = net()
    with pytest.raises(KeyboardInterrupt, match="adapters of step 2 stay on the model") as caught:
        unlearn(model, forget, retain, callbacks=[press], epochs=3, **OPTIONS)
    assert isinstance(caught.value, UnlearnInterrupted)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (caught.value.step, caught.value.output_dir, len(caught.value.history)) == (2, None, 2)
    two = unlearn(net(), forget, retain, max_steps=2, epochs=3, **OPTIONS)
    caught.value.rfa.merge()
    assert hash_model(model) == hash_model(two.model)


def test_ctrl_c_while_merging_waits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, forget, retain = data()
    merge = rfa_fast.RFA.merge

    def pressed(self: Any, dtype: Any = None) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return merge(self, dtype)

    monkeypatch.setattr(rfa_fast.RFA, "merge", pressed)
    result = unlearn(net(), forget, retain, **{**OPTIONS, "progress": True})
    monkeypatch.undo()
    assert hash_model(result.model) == hash_model(unlearn(net(), forget, retain, **OPTIONS).model)
    assert "cannot be cut in two" in capsys.readouterr().err


def test_error_in_a_callback_restores_the_model() -> None:
    _, forget, retain = data()
    model = net()
    before = hash_model(model)

    def fails(record: dict[str, Any]) -> None:
        raise LookupError("in a callback")

    with pytest.raises(LookupError, match="in a callback"):
        unlearn(model, forget, retain, callbacks=[fails], **OPTIONS)
    assert untouched(model, before)
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


class Explosive(nn.Module):
    """Multiplies by a number, or breaks its gradient."""

    def __init__(self, forward: float = 1.0, backward: float = 1.0) -> None:
        super().__init__()
        self.scales = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scales[0]
        if y.requires_grad:
            y.register_hook(lambda g: g * self.scales[1])
        return y


@unseen
@pytest.mark.parametrize(
    ("place", "module", "layers", "message"),
    [
        (4, Explosive(forward=float("nan")), ["5", "7"], "the loss is not finite .* first in layer '5', '7'"),
        (5, Explosive(forward=float("inf")), ["7"], "the loss is not finite .* first in layer '7'"),
        (7, Explosive(forward=float("nan")), [], "task's loss alone: every layer's alignment is finite"),
        (4, Explosive(backward=float("nan")), ["0"], "the gradient is not finite, first in parameter '0.lora_"),
    ],
    ids=["nan", "inf", "task", "gradient"],
)
def test_not_finite_names_the_layer(place: int, module: nn.Module, layers: list[str], message: str) -> None:
    _, forget, retain = data()
    sound = net()
    model = nn.Sequential(*sound[:place], nn.Identity(), *sound[place:])
    names = [f"{i}" for i, m in enumerate(model) if isinstance(m, nn.Conv2d | nn.Linear)]

    def explode(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            model[place] = module

    options = {**OPTIONS, "targets": names}
    with pytest.raises(NonFiniteError, match=message) as caught:
        unlearn(model, forget, retain, callbacks=[explode], **options)
    assert (caught.value.step, caught.value.layers, len(caught.value.history)) == (3, layers, 2)
    assert "the optimizer has not seen it" in str(caught.value)
    assert all(bool(torch.isfinite(t).all()) for t in caught.value.rfa.state_tensors().values())
    caught.value.rfa.merge()
    model[place] = nn.Identity()
    two = unlearn(nn.Sequential(*net()[:place], nn.Identity(), *net()[place:]), forget, retain, max_steps=2, **options)
    assert hash_model(model) == hash_model(two.model)


def test_not_finite_at_the_first_step_and_in_the_inputs() -> None:
    everything, forget, retain = data()
    everything.images[forget.indices] = float("nan")
    model = net()
    before = hash_model(model)
    with pytest.raises(NonFiniteError, match="inputs already hold NaN") as caught:
        unlearn(model, forget, retain, **OPTIONS)
    assert all(bool(torch.isfinite(t).all()) for t in caught.value.rfa.state_tensors().values())
    caught.value.rfa.remove()
    assert untouched(model, before)


def test_a_gradient_whose_norm_is_beyond_float32_is_not_finite(tmp_path: Path) -> None:
    """Every element is finite; the step was made and its record could not be written."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        model[1].weight.fill_(1e-30)
    before = hash_model(model)
    data = ImageDataset(torch.full((8, 1, 6, 6), 3e38), [0, 1] * 4, ("a", "b", "c"))
    sets = Subset(data, range(2)), Subset(data, range(2, 8))
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient's norm is inf, beyond float32"):
        unlearn(model, *sets, method="finetune", lr=1e-3, batch_size=4, progress=False, output_dir=tmp_path / "run")
    assert hash_model(model) == before


def test_an_error_while_the_state_is_saved_leaves_the_model_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, forget, retain = data()
    model = net()
    before = hash_model(model)

    def broken(self: Loop) -> None:
        raise ValueError("cannot be written")

    def fails(record: dict[str, Any]) -> None:
        monkeypatch.setattr(Loop, "save", broken)
        raise LookupError("in a callback")

    with pytest.raises(ValueError, match="cannot be written") as caught:
        unlearn(model, forget, retain, callbacks=[fails], output_dir=tmp_path / "run", **OPTIONS)
    assert isinstance(caught.value.__context__, LookupError)
    assert untouched(model, before)
    assert all(p.requires_grad for p in model.parameters())


def relabelled(label: int) -> ImageDataset:
    wrong = ImageDataset(EVERYTHING.images, EVERYTHING.labels, EVERYTHING.classes)
    wrong.labels[6] = label
    return wrong


UNSET = {"batch_size": None, "forget_per_batch": "auto"}
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("method", {"method": "rfb"}, ValueError, "method: got 'rfb', expected one of 'rfa'"),
    ("epochs 0", {"epochs": 0}, ValueError, "epochs: got 0, expected an integer >= 1"),
    ("epochs None", {"epochs": None}, TypeError, "epochs: got None"),
    ("batch_size", {"batch_size": 2.5}, TypeError, "batch_size: got 2.5"),
    ("checkpoint_every", {"checkpoint_every": -1}, ValueError, "checkpoint_every: got -1"),
    ("lr", {"lr": -1.0}, ValueError, "lr: got -1.0, expected a finite number > 0"),
    ("lr nan", {"lr": float("nan")}, ValueError, "lr: got nan"),
    ("weight_decay", {"weight_decay": "x"}, TypeError, "weight_decay: got 'x'"),
    ("max_grad_norm", {"max_grad_norm": 0}, ValueError, "max_grad_norm: got 0, expected a finite number > 0"),
    ("schedule", {"schedule": "step"}, ValueError, "schedule: got 'step', expected 'constant', 'linear' or 'cosine'"),
    ("seed", {"seed": 1.5}, TypeError, "seed: got 1.5"),
    ("until alone", {"until": lambda f: True}, ValueError, "until: .* expected evaluate="),
    ("evaluate", {"evaluate": 3}, TypeError, "evaluate: got int, expected a callable"),
    ("evaluate's result", {"evaluate": lambda m: 3}, TypeError, "evaluate: got int from it"),
    ("evaluate's values", {"evaluate": lambda m: {"a": "b"}}, TypeError, "evaluate: got {'a': 'b'} from it"),
    ("callbacks", {"callbacks": print}, TypeError, "callbacks: got builtin_function_or_method, expected a list"),
    ("a callback", {"callbacks": [3]}, TypeError, "callbacks: got int among them"),
    ("resume alone", {"resume": True}, ValueError, "resume: got True without output_dir"),
    ("merge", {"merge": torch.int8}, TypeError, "merge: got torch.int8, expected True, False or a floating dtype"),
    ("autocast", {"autocast": torch.float16}, ValueError, "autocast: got torch.float16, expected torch.bfloat16"),
    ("device", {"device": "cuda:99"}, ValueError, "device: got 'cuda:99', which cannot be used here"),
    ("model", {"model": 3}, TypeError, "model: got int, expected a torch.nn.Module"),
    ("no parameters", {"model": nn.ReLU()}, ValueError, "model: got one without parameters"),
    ("option", {"rnak": 4}, ValueError, "got unknown rnak, expected some of"),
    ("option's value", {"gamma": 3}, ValueError, "gamma: got 3"),
    ("targets", {"targets": 3}, TypeError, "targets: got 3"),
    ("no layer", {"targets": ["7"]}, ValueError, "7"),
    ("rank", {"rank": 9}, ValueError, "rank: got 9, expected at most 4 for layer '0'"),
    ("forget", {"forget": 3}, TypeError, "forget: got int, expected both sets as map-style datasets"),
    ("dict", {"retain": {"a": 1}}, TypeError, "retain: got dict"),
    ("no forget", {"forget": Subset(EVERYTHING, [])}, ValueError, "forget: got a data set without samples"),
    ("no retain", {"retain": []}, ValueError, "retain: got a data set without samples"),
    ("overlap", {"retain": EVERYTHING}, ValueError, r"retain: got 14 samples that are in forget too \(1, 10, 13"),
    ("label", {"retain": relabelled(3)}, ValueError, "retain: got label 3 at position 6, expected 0 to 2"),
    ("label in a subset", {"retain": Subset(relabelled(-1), [0, 6])}, ValueError, "got label -1 at position 1"),
    ("forget_per_batch", {"forget_per_batch": 10}, ValueError, "forget_per_batch: got 10, expected less than"),
    ("loader and dataset", {"forget": DataLoader(FORGET)}, TypeError, "forget: got a DataLoader beside a dataset"),
    (
        "batch_size of loaders", {"forget": DataLoader(FORGET), "retain": DataLoader(RETAIN)}, ValueError,
        "batch_size, forget_per_batch: got a value beside DataLoaders",
    ),
    (
        "drop_last", {"forget": DataLoader(FORGET, 4, drop_last=True), "retain": DataLoader(RETAIN), **UNSET},
        ValueError, "forget: got a DataLoader with drop_last=True",
    ),
    (
        "drop_last of a batch_sampler",
        {"forget": DataLoader(FORGET, batch_sampler=BatchSampler(range(14), 4, True)), "retain": DataLoader(RETAIN),
         **UNSET},
        ValueError, "forget: got a DataLoader with drop_last=True",
    ),
    (
        "sampler that leaves out", {"forget": DataLoader(FORGET, 4, sampler=range(9)), "retain": DataLoader(RETAIN),
                                    **UNSET},
        ValueError, "forget: got a DataLoader whose sampler gives 9 of the 14 samples",
    ),
    (
        "until and rewind",
        {"method": "scrub", "rewind": 0.5, "evaluate": lambda model: {}, "until": lambda figures: True, },
        ValueError, "until: got a condition beside rewind",
    ),
    (
        "stream", {"forget": DataLoader(Stream()), "retain": DataLoader(RETAIN), **UNSET},
        ValueError, "forget: got a DataLoader over a dataset without length",
    ),
    (
        "label of a loader",
        {"forget": DataLoader(FORGET, 4), "retain": DataLoader(relabelled(77), 9, sampler=range(5, 40)), **UNSET},
        ValueError, "labels: got 77",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_changes_nothing(given: dict[str, Any], error: type[Exception], message: str, tmp_path: Any) -> None:
    model = net()
    before = hash_model(model)
    arguments: dict[str, Any] = {"model": model, "forget": FORGET, "retain": RETAIN, **OPTIONS, **given}
    if "resume" not in given:
        arguments["output_dir"] = tmp_path / "run"
    with pytest.raises(error, match=message):
        unlearn(**arguments)
    assert untouched(model, before)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_model_that_is_patched_already_and_one_without_weights() -> None:
    model = net()
    rfa = patch(model, LAYERS, rank=2)
    live = hash_model(model, adapters=True)
    with pytest.raises(ValueError, match="already patched"):
        unlearn(model, FORGET, RETAIN, **OPTIONS)
    assert hash_model(model, adapters=True) == live
    rfa.remove()
    with pytest.raises(TypeError, match="meta"):
        unlearn(net().to("meta"), FORGET, RETAIN, **OPTIONS)


def test_labels_of_forget_are_not_read() -> None:
    wrong = [(image, -7) for image, _ in (FORGET[i] for i in range(len(FORGET)))]
    ours, theirs = net(), net()
    unlearn(ours, wrong, RETAIN, **OPTIONS)
    unlearn(theirs, FORGET, RETAIN, **OPTIONS)
    assert hash_model(ours) == hash_model(theirs)


def test_labels_are_known_from_a_configuration() -> None:
    class Config:
        num_labels = 2
        pad_token_id = 0

    model = Words()
    model.config = Config()  # type: ignore[assignment]
    keep = texts([3, 4], 0) + texts([3], 2)

    class Labelled(Dataset[Any]):
        labels = (0, 0, 2)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return keep[index]

    with pytest.raises(ValueError, match="retain: got label 2 at position 2, expected 0 to 1"):
        unlearn(model, texts([2], 1), Labelled(), targets=["hidden"], rank=2, progress=False)
    with pytest.raises(ValueError, match="labels: got 2 at step 1, expected 0 to 1"):
        unlearn(model, texts([2], 1), keep, targets=["hidden"], rank=2, progress=False)


def test_epochs_that_each_draw_too_few_are_said_to_leave_samples_out() -> None:
    forget = Subset(EVERYTHING, range(20))
    retain = Subset(EVERYTHING, range(20, 40))
    options = {**OPTIONS, "batch_size": 2, "forget_per_batch": 1, "epochs": 1}
    with pytest.warns(UserWarning, match="samples to forget were drawn in an epoch, anew in each") as said:
        unlearn(net(), Subset(EVERYTHING, range(25)), Subset(EVERYTHING, range(25, 40)), **{**options, "epochs": 2})
    assert "at most 15 of the 25" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unlearn(net(), forget, retain, **{**options, "epochs": 2})
