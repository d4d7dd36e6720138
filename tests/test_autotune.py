"""The choice of a configuration: tables, measurements, and what is kept of them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from kernel_cases import launches
from rfa_fast.kernels import autotune, tuning
from rfa_fast.kernels.tuning import FP32, GENERIC, TABLES, TARGETS, UNALIGNED, Config, candidates, choose, exact

from rfa_fast.functional import rfa_conv2d, rfa_linear

CHANNELS = torch.channels_last
SIZES = {"N": 64, "K": 32, "R": 8}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("RFA_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("RFA_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "_known", {})
    return tmp_path / "tuning.json"


def scripted(fastest):
    """A timer for which one route is fast, and the record of what it timed."""
    timed = []

    def timer(call):
        config = call()
        timed.append(config)
        return 1.0 if config.route == fastest else 2.0

    return timer, timed


def test_the_fastest_of_all_routes_wins_and_is_measured_once(fresh):
    timer, timed = scripted("vendor")
    x = torch.zeros(3, 32)
    first = autotune.tuned("linear_forward", x, SIZES, lambda config: config, timer=timer)
    assert first.route == "vendor"
    assert {config.route for config in timed} == {"fused", "vendor", "single"}
    again = autotune.tuned("linear_forward", torch.zeros(99, 32), SIZES, lambda config: config, timer=timer)
    assert again == first  # whatever the number of rows
    assert len(timed) == 4  # the table's at half the depth, which is what fp32 took before it had an entry
    (key,) = json.loads(fresh.read_text())
    assert key.endswith("/linear_forward/float32/N=64/K=32/R=8")


def test_what_runs_untuned_is_among_what_is_timed():
    cases = ((torch.float32, (64, 32)), (torch.bfloat16, (64, 32)), (torch.bfloat16, (63, 33)))
    for kernel in TABLES:
        for dtype, widths in cases:
            listed = autotune.contenders(kernel, torch.device("cpu"), dtype, *widths)
            assert listed[0] == choose(kernel, torch.device("cpu"), dtype, *widths)
            assert len(set(listed)) == len(listed)
            assert {config.route for config in listed} == {"fused", *autotune.ROUTES.get(kernel, ())}
    unaligned = autotune.contenders("linear_gradient", torch.device("cpu"), torch.bfloat16, 63)
    assert unaligned[0] == candidates("linear_gradient", GENERIC, aligned=False)[0]


def test_convolutions_that_differ_in_more_than_their_sizes_are_measured_apart(fresh, monkeypatch):
    """A stride, a dilation, groups or a memory format change what is fastest at the same N, C, pixels and rank."""
    monkeypatch.setattr(autotune, "tuned", partial(autotune.tuned, timer=lambda call: 1.0))
    for stride, size, layout in ((1, 4, torch.contiguous_format), (2, 8, torch.contiguous_format), (1, 4, CHANNELS)):
        x = torch.randn(2, 16, size, size).to(memory_format=layout)
        rfa_conv2d(
            x, torch.randn(16, 16, 1, 1), torch.randn(2, 16, 1, 1), torch.randn(16, 2, 1, 1), scale=1.0, stride=stride,
            backend="triton",
        )  # fmt: skip
    assert len(json.loads(fresh.read_text())) == 3


def test_results_outlive_the_process_and_other_results_are_kept(fresh, monkeypatch):
    timer, timed = scripted("single")
    x = torch.zeros(3, 32)
    autotune.tuned("linear_forward", x, SIZES, lambda config: config, timer=timer)
    monkeypatch.setattr(autotune, "_known", {})
    autotune.tuned("linear_input_gradient", x, SIZES, lambda config: config, timer=timer)
    monkeypatch.setattr(autotune, "_known", {})
    measured = len(timed)
    assert autotune.tuned("linear_forward", x, SIZES, lambda config: config, timer=timer).route == "single"
    assert len(timed) == measured
    assert len(json.loads(fresh.read_text())) == 2


def test_off_on_a_cpu_and_in_a_trace_the_table_is_taken(monkeypatch):
    timer, timed = scripted("vendor")
    default = choose("linear_forward", torch.device("cpu"), torch.float32)
    assert autotune.tuned("linear_forward", torch.zeros(1), SIZES, lambda config: config) == default
    fake = torch._subclasses.FakeTensorMode().from_tensor(torch.zeros(1))
    assert autotune.tuned("linear_forward", fake, SIZES, lambda config: config, timer=timer) == default
    monkeypatch.delenv("RFA_FAST_AUTOTUNE")
    assert autotune.tuned("linear_forward", torch.zeros(1), SIZES, lambda config: config, timer=timer) == default
    assert timed == []


def test_a_configuration_that_does_not_fit_is_left_out_and_none_at_all_is_an_error():
    from triton.runtime.errors import OutOfResources

    def refuse(config):
        if config.route != "vendor":
            raise OutOfResources(200_000, 100_000, "shared memory")
        return config

    timer, _ = scripted("fused")
    x = torch.zeros(1)
    assert autotune.tuned("linear_forward", x, SIZES, refuse, timer=timer).route == "vendor"

    def refuse_all(config):
        raise OutOfResources(200_000, 100_000, "shared memory")

    with pytest.raises(RuntimeError, match="no configuration runs on this device: .*shared memory"):
        autotune.tuned("linear_forward", x, {"N": 1}, refuse_all, timer=timer)


def test_a_broken_file_is_named_and_measured_again(fresh):
    fresh.write_text('{"a": [1, 2')
    timer, _ = scripted("vendor")
    with pytest.warns(UserWarning, match=r"tuning.json: cannot be read .*measured again"):
        assert autotune.tuned("linear_forward", torch.zeros(1), SIZES, lambda c: c, timer=timer).route == "vendor"
    assert len(json.loads(fresh.read_text())) == 1


def test_a_folder_that_cannot_be_written_loses_nothing_in_this_process(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RFA_FAST_CACHE", str(tmp_path / "file"))
    timer, timed = scripted("vendor")
    with pytest.warns(UserWarning, match="cannot be written .*holds for this process"):
        autotune.tuned("linear_forward", torch.zeros(1), SIZES, lambda config: config, timer=timer)
    measured = len(timed)
    assert autotune.tuned("linear_forward", torch.zeros(1), SIZES, lambda c: c, timer=timer).route == "vendor"
    assert len(timed) == measured


@pytest.mark.parametrize("route", ["vendor", "single"])
def test_every_route_gives_the_same_layer(monkeypatch, route):
    tensors = {"x": torch.randn(70, 20), "weight": torch.randn(33, 20), "bias": torch.randn(33)}
    group = torch.randint(-1, 2, (70,), dtype=torch.int8)
    results = []
    for table in (TABLES["linear_forward"], {GENERIC: (Config(16, 16, 16, warps=4, stages=2, route=route),)}):
        monkeypatch.setitem(tuning.TABLES, "linear_forward", table)
        monkeypatch.setitem(tuning.TABLES, "linear_input_gradient", table)
        leaves = [
            torch.randn(s, generator=torch.Generator().manual_seed(1)).requires_grad_() for s in ((5, 20), (33, 5))
        ]
        x = tensors["x"].clone().requires_grad_()
        with launches() as seen:
            out = rfa_linear(
                **tensors | {"x": x}, lora_a=leaves[0], lora_b=leaves[1], scale=0.5, group=group, backend="triton"
            )
            total = out.output.square().sum() + out.retain_loss + out.forget_loss
            results.append([out.output, total, *torch.autograd.grad(total, [x, *leaves])])
    assert ("lora_down_kernel" in seen) == (route == "vendor")
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)


def test_every_table_has_a_generic_entry_and_knows_its_targets():
    for kernel, table in TABLES.items():
        assert GENERIC in table, kernel
        assert set(table) <= {GENERIC, FP32, *TARGETS}, kernel
        assert candidates(kernel, "sm_75") == table[GENERIC]
        for target in TARGETS:
            assert candidates(kernel, target, aligned=False) == UNALIGNED.get((kernel, target), table[GENERIC])
    assert all(kernel in TABLES and target in TARGETS for kernel, target in UNALIGNED)
    assert exact("row_error", "sm_90") == TABLES["row_error"][FP32][0]
    half = exact("lora_a_gradient", "gfx942")
    assert half == replace(TABLES["lora_a_gradient"][GENERIC][0], block_k=64)
    with pytest.raises(ValueError, match="kernel: got 'linear', expected one of 'linear_forward'"):
        candidates("linear", GENERIC)
