"""What runs in each of two processes; a process that is spawned imports it from here, whatever the tests are called."""

from __future__ import annotations

import torch
import torch.distributed as dist
from safetensors.torch import save_file
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
