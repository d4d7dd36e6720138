"""The benchmark's contenders compute what they claim: against our reference, a hand count, the model's own loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import BertConfig, BertForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from rfa_fast.experiments.floor import Floor, floor_of
from rfa_fast.experiments.models import seeded
from rfa_fast.experiments.rivals import NAMES, Setting, StepBatch, contender, ours, task_loss
from rfa_fast.experiments.rivals_peft import PaperArrangement, adapters_of, rows_of, student_of
from rfa_fast.experiments.sharing import quiet, sharing_copy, weight_bytes
from rfa_fast.targets import select

FORGET = torch.tensor([False, True, False, True])
IDS = torch.randint(97, (4, 10), generator=torch.Generator().manual_seed(0))


def qwen():
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64,
        )
    )  # fmt: skip


def bert():
    return BertForSequenceClassification(
        BertConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )


def resnet():
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=9)


def masked():
    mask, labels = torch.ones_like(IDS), IDS.clone()
    mask[0, 7:] = mask[1, 8:] = 0
    labels[2, :3] = -100
    return StepBatch({"input_ids": IDS, "attention_mask": mask}, labels, FORGET)


CLASSES = torch.tensor([0, 1, 1, 0])
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CASES = {
    "qwen": (qwen, StepBatch({"input_ids": IDS}, IDS, FORGET)),
    "qwen-padded": (qwen, masked()),
    "bert-padded": (bert, StepBatch(dict(masked().inputs), CLASSES, FORGET)),
    "resnet": (
        resnet,
        StepBatch(IMAGES, CLASSES, FORGET),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    make, batch = CASES[request.param]
    return SimpleNamespace(name=request.param, model=seeded(0, make).eval(), batch=batch)


def moved(parameters, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {name: p + 0.05 * torch.randn(p.shape, generator=generator) for name, p in parameters.items()}


def put(parameters, values):
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])


def test_the_papers_arrangement_is_our_teacher_mode_reference(case):
    setting = Setting("all", gamma=0.3, weights=(0.7, 1.3, 0.9, 1.1))
    arrangement = PaperArrangement(case.model, setting)
    reference = ours(case.model, setting, mode="teacher", compiled=False, backend="reference")
    theirs = adapters_of(arrangement.student)
    assert set(theirs) == set(reference.parameters)
    values = moved(reference.parameters)
    put(reference.parameters, values)
    put(theirs, values)
    got = arrangement.terms(case.batch.inputs, rows_of(case.batch, case.model))
    expected = reference.rfa.loss(case.batch.inputs, case.batch.labels, case.batch.forget)
    for name, value in got.items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=2e-5, atol=1e-6, msg=name)
    got["total"].backward()
    expected.total.backward()
    for name, parameter in theirs.items():
        wanted = reference.parameters[name].grad
        assert float(wanted.norm()) > 0
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()), msg=name)


def test_plain_peft_minimises_the_models_own_loss(case):
    rival = contender("peft", case.model, case.batch, Setting())
    with torch.no_grad():
        if isinstance(case.batch.inputs, dict):
            expected = case.model(**case.batch.inputs, labels=case.batch.labels).loss
        else:
            expected = F.cross_entropy(case.model(case.batch.inputs), case.batch.labels)
    torch.testing.assert_close(rival.step(case.batch), expected)


def test_plain_loss_counts_every_token():
    net = seeded(0, lambda: nn.Sequential(nn.Embedding(97, 8), nn.Linear(8, 5)))
    labels = IDS % 5
    got = task_loss(net, StepBatch(IDS, labels, FORGET))
    torch.testing.assert_close(got, F.cross_entropy(net(IDS).transpose(1, 2), labels))


UNCOMPILED = [n for n in NAMES if n.endswith("-eager") or n in ("paper", "peft", "finetune")]


@pytest.mark.parametrize("name", UNCOMPILED)
def test_every_contender_learns_and_leaves_the_model_alone(name):
    model, batch = seeded(0, qwen).eval(), CASES["qwen"][1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    each = contender(name, model, batch, Setting())
    if name != "finetune":
        assert len(each.unmoved()) == 3
    each.step(batch)
    assert 0 < each.gradient_norm < float("inf")
    assert each.unmoved() == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(type(m).__module__.startswith(("torch", "transformers")) for m in model.modules())


def test_the_gradient_norm_is_that_of_the_first_step():
    model, batch = seeded(0, qwen).eval(), CASES["qwen"][1]
    each = contender("finetune", model, batch, Setting())
    model(**batch.inputs, labels=batch.labels).loss.backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    each.step(batch)
    first = each.gradient_norm
    each.step(batch)
    assert each.gradient_norm == first == pytest.approx(float(expected), rel=1e-5)


def test_bf16_adapters_are_a_choice_of_peft_and_fp32_ones_the_default():
    model = seeded(0, qwen).to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        assert {p.dtype for p in adapters_of(student_of(model, Setting(), dtype)).values()} == {dtype}
    with pytest.raises(TypeError, match="adapter_dtype: got torch.float16, expected"):
        student_of(model, Setting(), torch.float16)


def test_frozen_weights_are_shared_and_only_the_teacher_is_a_copy():
    model, batch = seeded(0, qwen).eval(), CASES["qwen"][1]
    own = {p.data_ptr() for p in model.parameters()}
    arrangement = PaperArrangement(model, Setting())
    student = {p.data_ptr() for n, p in arrangement.student.named_parameters() if "lora" not in n}
    assert student == own
    assert not own & {p.data_ptr() for p in arrangement.teacher.parameters()}
    first = contender("paper", model, batch, Setting())
    second = contender("paper", model, batch, Setting(), teacher=first.teacher)
    assert {p.data_ptr() for p in first.teacher.parameters()} == {p.data_ptr() for p in second.teacher.parameters()}
    twin = contender("finetune", model, batch, Setting(), in_place=True)
    assert {p.data_ptr() for p in twin.parameters.values()} == own


def test_a_sharing_copy_keeps_ties_and_counts_once():
    model = seeded(0, qwen)
    twin = sharing_copy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight is not model.lm_head.weight
    assert weight_bytes(twin) == weight_bytes(model) == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_checkpointing_stays_on_in_a_quiet_model_and_dropout_off():
    model = seeded(0, bert)
    model.activation_checkpointing_enable()
    layers = [module for module in quiet(model.train()).modules() if module.training]
    assert "BertLayer" in {type(layer).__name__ for layer in layers}
    assert not any(isinstance(layer, nn.Dropout) for layer in layers)


def test_the_floor_of_a_decoder_by_hand():
    """2 layers, FFN of the second adapted; 40 tokens of which 36 have a label, H 32, F 48, KV 16, V 97."""
    model, batch = seeded(0, qwen).eval(), CASES["qwen"][1]
    names = [target.name for target in select(model, "deep").adapted]
    floor = floor_of(model, batch.inputs, batch.labels, names)
    tokens, rows = 40, 36
    projections = 2 * 32 * 32 + 2 * 32 * 16
    feed_forward = 3 * 32 * 48
    attention = 2 * 4 * 4 * 10 * 5 * 8  # two products, 4 samples × 4 heads, half of 10 × 10, 8 wide
    head = 32 * 97
    forward = 2 * (tokens * (projections + feed_forward) + attention) + rows * head
    # Behind the second layer's gate and up: the head's p·W and the dX of `down`; nothing reads the dX of gate and up.
    backward = rows * head + tokens * 32 * 48
    assert floor.flops == 2 * (forward + backward)
    assert floor.features[names[0]] == (4, 10, 48)
    assert floor.run() is None


def test_the_floor_of_a_decoder_adapted_from_its_first_layer():
    model, batch = seeded(0, qwen).eval(), CASES["qwen"][1]
    deep = floor_of(model, batch.inputs, batch.labels, [t.name for t in select(model, "deep").adapted])
    whole = floor_of(model, batch.inputs, batch.labels, [t.name for t in select(model, "all").adapted])
    # Adapting the first layer's FFN as well: dX of its `down`, and of all that the second layer reads.
    more = 40 * 32 * 48 + 40 * 2 * 32 * 48 + 40 * (2 * 32 * 32 + 2 * 32 * 16) + 4 * 4 * 4 * 10 * 5 * 8
    assert whole.flops - deep.flops == 2 * more


def test_the_floor_of_a_resnet_by_hand():
    model, batch = seeded(0, resnet).eval(), CASES["resnet"][1]
    floor = floor_of(model, batch.inputs, batch.labels, ["layer4.0.conv2", "fc"])
    convolutions = [
        (64, 3, 49, 16), (64, 64, 9, 8), (64, 64, 9, 8), (128, 64, 9, 4), (128, 128, 9, 4), (128, 64, 1, 4),
        (256, 128, 9, 2), (256, 256, 9, 2), (256, 128, 1, 2), (512, 256, 9, 1), (512, 512, 9, 1), (512, 256, 1, 1),
    ]  # fmt: skip
    forward = sum(4 * n * c * taps * size**2 for n, c, taps, size in convolutions) + 4 * 512 * 9
    assert floor.flops == 2 * (forward + 4 * 512 * 9)  # back: dX of fc alone, the convolution before is the first
    floor.run()
    assert floor.features == {"layer4.0.conv2": (4, 512, 1, 1), "fc": (4, 9)}
    behind = floor_of(model, batch.inputs, batch.labels, ["layer4.0.conv1"])
    assert behind.flops == 2 * (forward + 4 * 512 * 9 + 4 * 512 * 512 * 9)


def test_a_product_that_cannot_be_replayed_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.ConvTranspose1d(2, 2, 1), nn.Flatten())
    with pytest.raises(ValueError, match="model: got a step that dispatches aten.convolution"):
        floor_of(net, torch.ones(2, 4), torch.tensor([0, 1]), ["0"])
    assert Floor([]).flops == 0


def test_an_unknown_contender_is_named():
    with pytest.raises(ValueError, match="name: got 'theirs', expected one of floor, ours"):
        contender("theirs", nn.Sequential(nn.Linear(2, 2)), CASES["resnet"][1], Setting())
