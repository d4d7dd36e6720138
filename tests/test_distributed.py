"""Two processes with DistributedDataParallel, as docs/how-it-works.md has it: patch, wrap, run inside `groups`."""

from __future__ import annotations

import torch
from distributed_case import MODES, loss_of, one_process, patched
from safetensors.torch import load_file


def test_a_wrapped_model_inside_groups_averages_the_gradients(tmp_path):
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
    both = [load_file(tmp_path / f"{process}.safetensors") for process in (0, 1)]
    for mode in MODES:
        alone = []
        for process in (0, 1):
            rfa = patched(mode)
            alone.append(torch.autograd.grad(loss_of(rfa, rfa.model, process), rfa.parameters()))
        assert any(not torch.allclose(one, other) for one, other in zip(*alone, strict=True))
        for name, one, other in zip(rfa.named_parameters(), *alone, strict=True):
            for found in both:
                torch.testing.assert_close(found[f"{mode} {name}"], (one + other) / 2)
