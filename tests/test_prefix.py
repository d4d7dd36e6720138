"""The frozen prefix: run once in teacher mode, kept between epochs, and never anything but what the blocks return."""

from __future__ import annotations

import copy
import warnings
import weakref

import pytest
import torch
from step_cases import TinyBlocks, batches, tiny_language_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models import resnet18

import rfa_fast
from rfa_fast.prefix import Prefix
from rfa_fast.prefix_cache import PrefixCache, sample_keys
from rfa_fast.step import compile_step


def counted(blocks):
    """A list that grows by the index of every block that runs."""
    calls = []
    for index, block in enumerate(blocks):
        inner = next(block.children())
        inner.register_forward_hook(lambda *_, index=index: calls.append(index))
    return calls


def test_which_blocks_it_is():
    net = TinyBlocks()
    names = ["0", "1", "2"]
    assert Prefix(net, names, ["1.up", "3"]).names == ("0",)
    assert Prefix(net, names, ["0.down"]).names == ()
    assert Prefix(net, ["1", "2"], ["0.up", "2.up"]).names == ()
    assert Prefix(net, [], ["0.up"]).names == ()


def test_teacher_mode_runs_it_once():
    torch.manual_seed(0)
    model = TinyBlocks()
    other = copy.deepcopy(model)
    calls = counted(list(model)[:3])
    rfa = rfa_fast.patch(model, ["2.up"], rank=2, seed=0, mode="teacher")
    batch = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2
    with torch.no_grad():
        rfa.layers["2.up"].lora_b.normal_()
    ours = rfa.loss(*batch)
    assert calls == [0, 1, 2, 2]
    whole = rfa_fast.patch(other, ["2.up"], rank=2, seed=0, mode="teacher")
    whole._prefix = Prefix(other, [], [])
    whole.layers["2.up"].lora_b.data.copy_(rfa.layers["2.up"].lora_b)
    for a, b in zip(ours, whole.loss(*batch), strict=True):
        assert torch.equal(a, b)
    assert all("forward" not in block.__dict__ for block in model)


@torch.jit.script
def scripted_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a + b


class Averaged(nn.Module):
    """Reads what every one of its blocks returned, as a weighted sum of layers does."""

    def __init__(self, blocks, as_tuple, how="kept"):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Single(as_tuple) for _ in range(blocks)), nn.Linear(5, 3)
        self.how = how

    def forward(self, x):
        if self.how != "kept":
            return self.head(self.summed(x))
        seen = ()
        for layer in self.layers:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
            seen = (*seen, x)
        return self.head(sum(seen))

    def summed(self, x):
        total = torch.zeros_like(x)
        for layer in self.layers:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
            if self.how == "let go":
                total = total + x
            elif self.how == "scripted":
                total = scripted_sum(total, x)
            elif self.how == "by the entry":
                total = total + x[:, :1].numpy().max() if not x.requires_grad else total + x[:, :1].max()
            else:
                x += 1.0
                total = x
        return total


class Single(nn.Module):
    def __init__(self, as_tuple):
        super().__init__()
        self.up, self.as_tuple = nn.Linear(5, 5), as_tuple

    def forward(self, x):
        return (x + self.up(x).tanh(), None) if self.as_tuple else x + self.up(x).tanh()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("as_tuple", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("how", ["kept", "let go", "by the entry", "written into"])
@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_teacher_mode_of_a_model_that_reads_every_block(blocks, how, as_tuple, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, last = Averaged(blocks, as_tuple, how), f"layers.{blocks - 1}.up"
    other = copy.deepcopy(model)
    batch = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2
    losses = []
    for each, names in ((model, [f"layers.{i}" for i in range(blocks)]), (other, [])):
        rfa = rfa_fast.patch(each, [last], rank=2, seed=0, mode="teacher")
        rfa._prefix = Prefix(each, names, [last])
        assert len(rfa._prefix.names) == (blocks - 1 if names else 0)
        with torch.no_grad():
            rfa.layers[last].lora_b.normal_(generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(rfa.parameters(), lr=0.0)
        losses.append(compile_step(rfa, optimizer, compile=compiled, backend="eager")(*batch))
    for a, b in zip(*losses, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


def cached_step(model, targets):
    """One step with a cache of a model that may have no use for one."""
    rfa = rfa_fast.patch(model, targets, rank=2, seed=0)
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), cache_prefix=True, compile=False)
    return step(torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2)


@pytest.mark.parametrize("blocks", [3, 5])
@pytest.mark.parametrize("how", ["kept", "let go", "written into"])
def test_a_model_that_reads_every_block_has_no_use_for_a_cache(how, blocks):
    with pytest.raises(ValueError, match=r"reads the output of block 'layers\.0' itself"):
        cached_step(Averaged(blocks, False, how), [f"layers.{blocks - 1}.up"])


class Noisy(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + torch.rand(())


def test_what_nobody_sees_shows_in_what_the_model_gives():
    """TorchScript and C++ extensions read a tensor without a word."""
    words = r"gives something else where its frozen blocks answer with what '{}' returned"
    with pytest.raises(ValueError, match=words.format(r"layers\.1")):
        cached_step(Averaged(3, False, "scripted"), ["layers.2.up"])
    with pytest.raises(ValueError, match=words.format("1")):
        cached_step(Noisy(*(nn.Linear(5, 5) for _ in range(3))), ["2"])


def test_what_a_model_returns_beside_its_logits_is_its_own_affair():
    """Attention weights are collected in the blocks, which have none where they answer."""
    model = tiny_language_model(4)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    rfa = rfa_fast.patch(model, "deep", rank=2, seed=0)
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), cache_prefix=True, compile=False)
    batch = next(iter(batches((4, 8))))
    plain = rfa_fast.patch(tiny_language_model(4), "deep", rank=2, seed=0)
    assert step(*batch).total.item() == pytest.approx(plain.loss(*batch).total.item(), rel=1e-5)


class Towers(nn.Module):
    """Two lists of blocks, the first of which runs last; or a model that does something else with two blocks."""

    def __init__(self, how):
        super().__init__()
        self.second = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.first = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head, self.how = nn.Linear(5, 3), how

    def forward(self, x):
        blocks = [*self.first, *self.second]
        if self.how == "twice":
            blocks = [*self.second, *self.first, *self.second, *self.first]
        elif self.how == "both":
            return self.head(self.run(self.first, x) * self.run(self.second, x))
        elif self.how == "skip":
            x = self.run([*self.second, self.first[0]], x)
            return self.head(x + self.first[1](x))
        elif self.how == "written into":
            x = self.run([*self.second, *self.first], x)
            x += 1.0
            return self.head(x)
        return self.head(self.run(blocks, x))

    def run(self, blocks, x):
        for block in blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("order", "runs block 'first.1' before 'second.0'"),
        ("both", "runs block 'first.1' before 'second.0'"),
        ("twice", "calls block 'second.0' twice"),
        ("skip", "reads the output of block 'first.0' itself"),
        ("written into", "writes into the output of block 'first.1'"),
    ],
)
def test_models_whose_prefix_is_more_than_its_last_output_have_no_cache(how, words):
    with pytest.raises(ValueError, match=f"cache_prefix: got a model that {words}"):
        cached_step(Towers(how), ["head"])


@pytest.mark.parametrize("how", ["order", "both", "twice", "skip", "written into"])
@pytest.mark.parametrize("wrapped", [False, "eager", "groups", "inference", "blocks"])
def test_teacher_mode_of_models_that_call_their_blocks_as_they_like(how, wrapped):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Towers(how)
    rfas = [rfa_fast.patch(copy.deepcopy(model), ["head"], rank=2, seed=0, mode="teacher") for _ in range(2)]
    rfas[1]._prefix = Prefix(rfas[1].model, [], [])
    batch = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2
    if wrapped == "blocks":
        for block in (rfas[0].model.second[1], rfas[0].model.first[0]):
            block.compile(backend="eager")
    losses = []
    for rfa in rfas:
        with torch.no_grad():
            rfa.layers["head"].lora_b.fill_(0.3)
        if wrapped == "groups":
            compiled = torch.compile(rfa.model, backend="eager")
            with rfa.groups(batch[2]):
                compiled(batch[0])
                losses.append([float(rfa.alignment_loss())])
        elif wrapped == "inference":
            with torch.inference_mode():
                losses.append([float(value) for value in rfa.loss(*batch)])
        else:
            losses += [[float(value) for value in rfa.loss(*batch)] for _ in range(2)][1:]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_teacher_mode_gives_hidden_states_and_hooks_what_they_read_later():
    model, seen = tiny_language_model(4), []
    rfa = rfa_fast.patch(model, ["layers.3.mlp.up_proj"], rank=2, seed=0, mode="teacher")
    model.model.layers[1].register_forward_hook(lambda _, args, output: seen.append(output))
    ids = torch.randint(5, 60, (4, 7))
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    seen.clear()
    with rfa.groups(torch.arange(4) < 2, torch.ones(4, 7, dtype=torch.bool)):
        found = model(input_ids=ids, output_hidden_states=True).hidden_states
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    rfa.loss({"input_ids": ids}, ids, torch.arange(4) >= 2)  # in this order already
    assert len(seen) == 4
    assert all(torch.allclose(output, expected[2], atol=1e-6) for output in seen)


def test_blocks_that_hand_on_nested_tensors():
    torch.manual_seed(0)
    inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = inner, nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.inner(x, src_key_padding_mask=torch.arange(4).expand(6, 4) >= 3).mean(1))

    rfa = rfa_fast.patch(Net().eval(), ["head"], rank=2, seed=0, mode="teacher", rows="batch")
    batch = torch.randn(6, 4, 8), torch.arange(6) % 3, torch.arange(6) < 2
    ours = rfa.loss(*batch)
    rfa._prefix = Prefix(rfa.model, [], [])
    for a, b in zip(ours, rfa.loss(*batch), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_of_what_is_handed_on_nothing_is_kept():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    rfa = rfa_fast.patch(net, ["4"], rank=2, mode="teacher")
    outputs, alive = [], []
    net[1].register_forward_pre_hook(lambda _, args: outputs.append(weakref.ref(args[0])))
    net[4].register_forward_pre_hook(lambda *_: alive.append(outputs[-1]() is not None))
    rfa.loss(torch.randn(6, 4), torch.arange(6) % 3, torch.arange(6) < 2)
    assert alive == [False, True]  # the adapted model's blocks hand on an empty one


class Once(nn.Sequential):
    """Reads what lies between its blocks in the adapted model's forward alone."""

    def forward(self, x):
        for block in self:
            x = block(x)
            if torch.is_grad_enabled():
                x.sum()
        return x


def test_an_output_that_only_the_adapted_model_reads_is_said():
    rfa = rfa_fast.patch(Once(*(nn.Linear(4, 4) for _ in range(3))), ["2"], rank=2, mode="teacher")
    with pytest.raises(ValueError, match="block '0': got its output read in the adapted model's forward but not"):
        rfa.loss(torch.randn(6, 4), torch.arange(6) % 3, torch.arange(6) < 2)


def test_a_compiled_step_runs_it_once_as_well():
    torch._dynamo.reset()
    counter, calls = CompileCounterWithBackend("eager"), {}
    for mode in ("residual", "teacher"):
        rfa = rfa_fast.patch(tiny_language_model(4), "deep", rank=2, seed=0, mode=mode)
        step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), backend=counter)
        for batch in batches((4, 8), (4, 8)):
            step(*batch)
        graph = counter.graphs[-1].graph
        calls[mode] = sum("scaled_dot_product" in str(node.target) for node in graph.nodes)
    assert calls == {"residual": 4, "teacher": 4 + 2}
    assert counter.frame_count == 2


@pytest.mark.parametrize("mode", ["residual", "teacher"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_cached_prefix_changes_nothing(mode, where, tmp_path):
    model = tiny_language_model(4)
    other = copy.deepcopy(model)
    cache = PrefixCache(2**20, tmp_path / "prefix" if where == "disk" else None)
    steps = []
    for each, option in ((other, False), (model, cache)):
        rfa = rfa_fast.patch(each, "deep", seed=0, mode=mode)
        optimizer = torch.optim.SGD(rfa.parameters(), lr=0.1)
        steps.append(compile_step(rfa, optimizer, cache_prefix=option, compile=False))
    calls = counted(model.model.layers)
    seen = list(batches((4, 8), (3, 8)))
    whole = 2  # the first time that the prefix runs for the cache, the model behind it does as well, and does so again
    for epoch in range(2):
        for batch in seen:
            calls.clear()
            losses = [step(*batch) for step in steps]
            for a, b in zip(*losses, strict=True):
                assert torch.allclose(a, b, rtol=1e-6)
            assert (0 in calls) == (epoch == 0)
            assert calls.count(3) == (2 if mode == "teacher" else 1) + whole
            whole = 0
    assert (cache.hits, cache.misses) == (7, 7)
    if where == "disk":
        again = PrefixCache(2**20, tmp_path / "prefix")
        what = (rfa._prefix.names, None)
        again.open(model, *what)
        assert again.size == cache.size > 0
        assert again.get(sample_keys(seen[0][0], 4), torch.device("cpu")) is not None
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight += 1
        with pytest.raises(ValueError, match="outputs of another model"):
            again.open(model, *what)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="holds no prefix cache"):
            PrefixCache(1, tmp_path / "full").open(model)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("change", ["targets", "autocast", "buffer", "weight"])
def test_a_cache_of_another_prefix_is_refused(change, where, tmp_path):
    def stepping(cache, targets="deep", autocast=None, changed=None):
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), *(torch.nn.Linear(4, 4) for _ in range(6)))
        model.load_state_dict(state)
        for name in changed or ():
            model.state_dict()[name] += 1
        rfa = rfa_fast.patch(model, targets, rank=2, seed=0)
        optimizer = torch.optim.SGD(rfa.parameters(), lr=0.1)
        return compile_step(rfa, optimizer, cache_prefix=cache, compile=False, autocast=autocast)

    state = torch.nn.Sequential(torch.nn.BatchNorm1d(4), *(torch.nn.Linear(4, 4) for _ in range(6))).state_dict()
    others = {
        "targets": {"targets": ["6"]}, "autocast": {"autocast": torch.bfloat16},
        "buffer": {"changed": ["0.running_mean"]}, "weight": {"changed": ["2.weight"]},
    }  # fmt: skip
    folder = tmp_path if where == "disk" else None
    cache = PrefixCache(folder=folder)
    stepping(cache, ["5"])(torch.ones(2, 4), torch.tensor([0, 1]), torch.tensor([True, False]))
    stepping(cache if folder is None else PrefixCache(folder=folder), ["5"])
    with pytest.raises(ValueError, match="another model, prefix or dtype"):
        stepping(cache if folder is None else PrefixCache(folder=folder), **{"targets": ["5"], **others[change]})


@pytest.mark.parametrize("mode", ["residual", "teacher"])
@pytest.mark.parametrize("targets", [r"layer4\.1\.conv2|fc", r"layer3\.0\.conv1|fc", "fc", "deep"])
def test_a_cache_of_blocks_in_several_lists(mode, targets):
    torch.manual_seed(0)
    steps, models = [], []
    first = resnet18(num_classes=3)
    for option in (False, True):
        models.append(copy.deepcopy(first).train())
        rfa = rfa_fast.patch(models[-1], targets, rank=2, seed=0, mode=mode)
        steps.append(compile_step(rfa, torch.optim.SGD(rfa.parameters(), 1e-4), cache_prefix=option, compile=False))
    calls = []
    models[1].layer1[0].conv1.register_forward_hook(lambda *_: calls.append(len(calls)))
    seen = [(torch.randn(n, 3, 32, 32), torch.arange(n) % 3, torch.arange(n) < 2) for n in (4, 3)]
    for batch in (*seen, *seen):
        for a, b in zip(*(step(*batch) for step in steps), strict=True):
            assert torch.allclose(a, b, rtol=1e-5)
    assert steps[1].cache.hits == 7
    assert len(calls) == 2
    assert all(torch.equal(buffer, models[1].get_buffer(name)) for name, buffer in first.named_buffers())


def test_compiled_with_a_cache():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    rfas = [rfa_fast.patch(tiny_language_model(2), "deep", rank=2, seed=0) for _ in range(2)]
    plain, compiled = (
        compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), cache_prefix=on, compile=on, backend=counter)
        for rfa, on in zip(rfas, (False, True), strict=True)
    )
    seen = list(batches((4, 8), (3, 6)))
    for batch in (*seen, *seen):
        for a, b in zip(compiled(*batch), plain(*batch), strict=True):
            assert torch.allclose(a, b, rtol=1e-5)
    assert counter.frame_count == 2
    assert compiled.cache.hits == 7


def test_augmented_inputs_are_refused():
    rfa = rfa_fast.patch(TinyBlocks(), ["2.up"], rank=2, seed=0)
    optimizer = torch.optim.SGD(rfa.parameters(), lr=0.1)
    x, labels, forget = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2
    step = compile_step(rfa, optimizer, cache_prefix=PrefixCache(2**20, samples=6), compile=False)
    step(x, labels, forget)
    step(x, labels, forget)
    with pytest.raises(ValueError, match="more different samples than the 6 there are.*augmented"):
        step(x + 0.1, labels, forget)
    small = compile_step(rfa, optimizer, cache_prefix=PrefixCache(6 * 20), compile=False)
    small(x, labels, forget)
    with pytest.warns(UserWarning, match="full with 6 samples"):
        small(x + 0.1, labels, forget)
    with pytest.raises(ValueError, match="no sample a second time.*augmented"):
        small(x + 0.2, labels, forget)


def test_a_full_cache_keeps_what_it_has():
    cache = PrefixCache(40)
    rows = torch.randn(3, 5)
    keys = sample_keys(rows, 3)
    with pytest.warns(UserWarning, match="full with 2 samples"):
        cache.put(keys, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(keys, torch.device("cpu")) is None
        cache.put(keys, rows)
    assert torch.equal(cache.get(keys[:2], torch.device("cpu")), rows[:2])
    assert cache.size == 40


def test_what_cannot_be_cached():
    for arguments, words in (((0,), "budget: got 0"), ((1.5,), "budget: got 1.5")):
        with pytest.raises(ValueError, match=words):
            PrefixCache(*arguments)
    rfa = rfa_fast.patch(TinyBlocks(), ["0.up"], rank=2)
    optimizer = torch.optim.SGD(rfa.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="cache_prefix: got True for a model whose first block is adapted"):
        compile_step(rfa, optimizer, cache_prefix=True)
    mixing = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
    mixed = rfa_fast.patch(mixing, ["2"], rank=2)
    with pytest.raises(ValueError, match="cache_prefix: got a model whose batch norm '1' takes its statistics from"):
        compile_step(mixed, torch.optim.SGD(mixed.parameters(), lr=0.1), cache_prefix=True)
    with pytest.raises(TypeError, match="cache_prefix: got str"):
        compile_step(rfa, optimizer, cache_prefix="yes")


def test_keys_follow_the_content():
    ids, mask = torch.arange(6).reshape(2, 3), torch.ones(2, 3, dtype=torch.bool)
    one = sample_keys({"input_ids": ids, "attention_mask": mask}, 2)
    assert sample_keys({"attention_mask": mask, "input_ids": ids}, 2) == one
    assert one[0] != one[1]
    assert sample_keys({"input_ids": ids.int(), "attention_mask": mask}, 2)[0] != one[0]
    assert sample_keys({"input_ids": ids, "attention_mask": mask, "scale": torch.ones(1)}, 2)[0] != one[0]
    assert sample_keys({"input_ids": ids[1:], "attention_mask": mask[1:]}, 1) == one[1:]


class Late(nn.Module):
    """Registers the blocks of its way up before the one in the middle, as a U-Net does."""

    def __init__(self):
        super().__init__()
        self.downs = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.bottleneck = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        for layer in self.downs:
            x = torch.tanh(layer(x))
        x = torch.tanh(self.bottleneck(x))
        for layer in self.ups:
            x = torch.tanh(layer(x))
        return self.head(x)


def late(mode):
    torch.manual_seed(0)
    net = Late().double()
    rfa = rfa_fast.patch(net, ["bottleneck"], rank=2, mode=mode, seed=0)
    with torch.no_grad():
        for parameter in rfa.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return net, rfa


def test_a_block_that_runs_behind_an_adapted_layer_runs_again_for_the_student():
    net, rfa = late("teacher")
    assert "ups.0" in rfa._prefix.names  # by the order they are registered in
    x, labels = torch.randn(6, 5, dtype=torch.double), torch.tensor([0, 1, 2, 0, 1, 2])
    forget = torch.tensor([False, False, False, False, True, True])
    found = rfa.loss(x, labels, forget)
    expected = nn.functional.cross_entropy(net(x)[:4], labels[:4])
    assert found.retain_task.item() == pytest.approx(expected.item(), rel=1e-12)
    found.task.backward()
    assert all(float(p.grad.norm()) > 0 for p in rfa.parameters())


class Stemmed(nn.Module):
    """Registers what runs first behind its blocks."""

    def __init__(self):
        super().__init__()
        self.layers, self.stem = nn.ModuleList(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_cache_is_refused_where_an_adapted_layer_runs_before_the_blocks():
    rfa = rfa_fast.patch(Stemmed(), ["stem"], rank=2, seed=0)
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), 0.1), cache_prefix=True, backend="eager")
    with pytest.raises(ValueError, match=r"runs an adapted layer before block 'layers\.2'"):
        step(torch.randn(4, 5), torch.tensor([0, 1, 2, 0]), torch.tensor([False, False, False, True]))


def test_keys_of_lists_tell_tensors_apart_that_differ_in_the_middle():
    one, other = torch.zeros(64, 64), torch.zeros(64, 64)
    other[32, 32] = 1.0
    keys = [sample_keys({"images": [image], "x": torch.ones(2, 1)}, 2) for image in (one, other, one.clone())]
    assert keys[0] == keys[2] != keys[1]
    with pytest.raises(TypeError, match="got object for 'thing', expected tensors"):
        sample_keys({"thing": object(), "x": torch.ones(2, 1)}, 2)


def test_a_copy_made_after_a_loss_runs_its_own_blocks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    rfa = rfa_fast.patch(net, ["2"], rank=2, mode="teacher", seed=0)
    x, labels, forget = torch.randn(4, 4), torch.tensor([0, 1, 2, 0]), torch.tensor([False, False, True, True])
    rfa.loss(x, labels, forget)
    twin = copy.deepcopy(rfa)
    with torch.no_grad():
        twin.model[0].weight.add_(1.0)
    fresh = copy.deepcopy(rfa_fast.patch(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)], nn.Linear(4, 3)), ["2"],
                                         rank=2, mode="teacher", seed=0))  # fmt: skip
    fresh.model.load_state_dict(twin.model.state_dict())
    assert twin.loss(x, labels, forget).total.item() == pytest.approx(fresh.loss(x, labels, forget).total.item())
    assert twin.loss(x, labels, forget).total.item() != pytest.approx(rfa.loss(x, labels, forget).total.item())
