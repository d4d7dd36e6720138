"""What a method leaves in a model besides its weights: buffers, what was learnt before, gradients of others."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

from rfa_fast import unlearn
from rfa_fast.methods import train
from rfa_fast.methods.start import initial_tensors

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(INPUTS, torch.arange(24) % 3)
FORGET = Subset(DATA, [i for i in range(24) if i % 3 == 0])
RETAIN = Subset(DATA, [i for i in range(24) if i % 3])


class Centred(nn.Module):
    """A running average that is a new tensor after every batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
        return x - self.centre


def centred():
    torch.manual_seed(0)
    return nn.Sequential(Centred(), nn.Linear(4, 3))


def run(model, method="finetune", **options):
    settings = {"batch_size": 4, "lr": 1e-2, "merge": False, "progress": False}
    return unlearn(model, FORGET, RETAIN, method=method, **settings | options)


def test_a_buffer_that_is_replaced_in_the_forward_is_saved_put_back_and_resumed(tmp_path):
    model = centred()
    there = model[0].centre
    whole = run(model, output_dir=tmp_path / "whole", epochs=2)
    moved = model[0].centre.clone()
    assert moved.norm() > 0
    saved = load_file(tmp_path / "whole" / "adapter" / "weights.safetensors")
    assert torch.equal(saved["0.centre"], moved)
    whole.rfa.remove()
    assert model[0].centre is there
    assert torch.equal(there, torch.zeros(4))

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    parts = centred()
    with pytest.raises(KeyboardInterrupt):
        run(parts, output_dir=tmp_path / "parts", epochs=2, callbacks=[stop])
    again = centred()
    run(again, output_dir=tmp_path / "parts", epochs=2, resume=True)
    assert torch.equal(again[0].centre, moved)


def test_a_failed_run_leaves_such_a_buffer_as_it_was():
    model = centred()

    def fail(record):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run(model, callbacks=[fail])
    assert torch.equal(model[0].centre, torch.zeros(4))


class Gained(nn.Linear):
    """`reset_parameters` is nn.Linear's and knows nothing of the gain."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.ones(outputs))

    def forward(self, x):
        return super().forward(x) * self.gain


class Codes(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.zeros(8))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return x + self.codes


def test_from_scratch_draws_what_no_reset_touches_and_names_what_stays():
    model = nn.Sequential(Gained(4, 8), Codes(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].gain.fill_(7.0)
        model[1].codes.fill_(5.0)
        model[2].running_mean.fill_(3.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fresh = initial_tensors(model, 0)
    assert fresh["0.gain"].abs().max() < 0.1
    assert torch.equal(fresh["2.running_mean"], torch.zeros(8))
    assert torch.equal(fresh["1.codes"], torch.full((8,), 5.0))
    texts = sorted(str(one.message) for one in said)
    assert len(texts) == 2
    assert texts[0].startswith("0.gain: no reset_parameters() in their modules, or none that draws them")
    assert texts[1].startswith("1.codes: nothing resets these buffers")
    assert torch.equal(model[0].gain, torch.full((8,), 7.0))
    assert not any(tensor.isnan().any() for tensor in fresh.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm], ids=["weight", "spectral"])
def test_a_normalised_weight_is_drawn_anew_too(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model(torch.ones(1, 4))  # else torch refuses to copy what it computed from the parameters
    learnt = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.warns(UserWarning, match=r"no reset_parameters|nothing resets"):
        fresh = initial_tensors(model, 0)
    assert not any(torch.equal(fresh[name], tensor) for name, tensor in learnt.items())


def test_a_usual_network_starts_as_it_always_did_and_says_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = initial_tensors(model, 3)
    assert torch.equal(fresh["1.weight"], torch.ones(4))
    assert fresh["0.weight"].abs().max() <= 27**-0.5  # Kaiming-uniform with a = sqrt(5): a bound of 1/sqrt(fan-in)
    assert torch.equal(initial_tensors(model, 3)["0.weight"], fresh["0.weight"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Stacked(nn.Module):
    def __init__(self, *, inplace):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.activation, self.head = nn.ReLU(inplace=inplace), nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = self.activation(block(x))
        return self.head(x)


def test_rmu_reads_what_the_block_gave_not_what_was_written_over_it():
    histories = []
    for inplace in (False, True):
        torch.manual_seed(0)
        options = {"layer": 2, "targets": ["blocks.2.down"], "train_mode": False}
        histories.append(run(Stacked(inplace=inplace), "rmu", **options).history)
    losses = [[(record["forget_loss"], record["retain_loss"]) for record in history] for history in histories]
    assert losses[0] == losses[1]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_a_step_that_is_not_finite_leaves_the_statistics_of_the_step_before():
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    inputs[13] = torch.nan
    model = network()
    with pytest.raises(FloatingPointError, match="weights are those of the step before"):
        train(model, TensorDataset(inputs, torch.arange(16) % 3), batch_size=16, progress=False)
    assert torch.equal(model[1].running_mean, torch.zeros(8))
    assert int(model[1].num_batches_tracked) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_frozen_layers_have_from_before_count_for_nothing():
    histories = []
    for stale in (False, True):
        model = network()
        for parameter in model[:3].parameters():
            parameter.grad = torch.full_like(parameter, torch.nan) if stale else None
            parameter.requires_grad_(False)
        histories.append(train(model, DATA, batch_size=8, max_grad_norm=0.3, lr=1e-2, progress=False).history)
    norms = [[record["grad_norm"] for record in history] for history in histories]
    assert norms[0] == norms[1]


class Noting(Dataset):
    """Eight samples, and which of them were taken, in order."""

    def __init__(self):
        self.seen = []

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.seen.append(index)
        return DATA[index]


def test_a_loaders_sampler_is_told_the_epoch():
    data = Noting()
    sampler = DistributedSampler(data, 1, 0, seed=0)
    train(network(), DataLoader(data, batch_size=4, sampler=sampler), epochs=3, progress=False)
    epochs = [tuple(data.seen[i : i + 8]) for i in (0, 8, 16)]
    assert len(set(epochs)) == 3


def test_a_batch_of_one_sample_trains_past_a_batch_norm():
    model = network()
    result = train(model, Subset(DATA, [0, 1, 2]), batch_size=2, progress=False)
    assert [record["samples"] for record in result.history] == [2, 1]
    assert int(model[1].num_batches_tracked) == 1


class Sine(nn.Linear):
    """Its reset reads a buffer."""

    def __init__(self, inputs, outputs):
        self.__dict__["ready"] = False
        super().__init__(inputs, outputs)
        self.register_buffer("omega", torch.tensor(4.0))
        self.ready = True

    def reset_parameters(self):
        if self.ready:
            nn.init.uniform_(self.weight, -1 / self.omega.item(), 1 / self.omega.item())
            nn.init.zeros_(self.bias)


def test_a_reset_that_reads_a_buffer_finds_it_there():
    model = nn.Sequential(Sine(4, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = initial_tensors(model, 0)
    assert 0.2 < fresh["0.weight"].abs().max() <= 0.25
    assert fresh["0.omega"] == 4.0


def test_the_callers_own_epochs_are_counted_on():
    data = Noting()
    sampler = DistributedSampler(data, 1, 0, seed=0)
    for epoch in range(3):
        sampler.set_epoch(2 * epoch)
        train(network(), DataLoader(data, batch_size=4, sampler=sampler), epochs=2, progress=False)
    orders = [tuple(data.seen[i : i + 8]) for i in range(0, 48, 8)]
    assert len(set(orders)) == 6
    plain = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        plain.append(tuple(sampler))
    assert orders == plain


class Dropping(nn.Module):
    """Lets go of a buffer in its first forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(2))

    def forward(self, x):
        self.cache = None
        return x


def test_a_buffer_that_is_gone_hides_no_error():
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, torch.arange(16) % 3)
    model = nn.Sequential(Dropping(), nn.Linear(4, 3))
    calls = []

    def spoil(record):
        calls.append(record["step"])
        model[1].weight.data[0] = torch.nan

    with pytest.raises(FloatingPointError, match="step 2: loss nan"):
        train(model, data, batch_size=8, progress=False, callbacks=[spoil])
    assert calls == [1]
    assert model[0].cache is None
