"""Two processes with DistributedDataParallel, as docs/how-it-works.md has it: patch, wrap, run inside `groups`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import rfa_fast

MODES = ("residual", "teacher")


def patched(mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    rfa = rfa_fast.patch(net, "all", rank=2, seed=0, mode=mode)
    with torch.no_grad():
        for parameter in rfa.parameters():
            parameter.add_(torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view_as(parameter))
    return rfa


def loss_of(rfa, model, process):
    """Task and alignment of this process's batch; another number of samples to forget in each."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(process), dtype=torch.float64)
    with rfa.groups(torch.arange(6) < process + 1):
        return nn.functional.cross_entropy(model(x), torch.arange(6) % 3) + rfa.alignment_loss()


def one_process(process, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=process, world_size=2)
    found = {}
    for mode in MODES:
        rfa = patched(mode)
        wrapped = nn.parallel.DistributedDataParallel(rfa.model)  # has to outlive the backward
        loss_of(rfa, wrapped, process).backward()
        found |= {f"{mode} {name}": p.grad for name, p in rfa.named_parameters().items()}
    save_file({name: grad.contiguous() for name, grad in found.items()}, f"{folder}/{process}.safetensors")
    dist.destroy_process_group()


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
