"""Small models and batches for the step and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

VOCABULARY = 96


def tiny_language_model(layers: int = 4, *, tied: bool = True, seed: int = 0) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=16, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=layers,
        vocab_size=VOCABULARY, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def batches(*shapes: tuple[int, int], seed: int = 1) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Inputs, labels (some of them −100) and flags: a different number of forget samples every time."""
    generator = torch.Generator().manual_seed(seed)
    for index, (size, length) in enumerate(shapes):
        ids = torch.randint(0, VOCABULARY, (size, length), generator=generator)
        labels = torch.where(torch.rand(size, length, generator=generator) < 0.2, -100, ids)
        yield {"input_ids": ids}, labels, torch.arange(size) < 1 + index % (size - 1)


class TinyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class TinyBlocks(nn.Sequential):
    """Three residual blocks and a head; `around` runs a block."""

    def __init__(self, around: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__(TinyBlock(), TinyBlock(), TinyBlock(), nn.Linear(5, 3))
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        for block in list(self.children())[:3]:
            x = block(x) if self.around is None else self.around(block, x)
        return self[3](x)
