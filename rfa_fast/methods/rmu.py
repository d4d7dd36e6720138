"""Misdirection of a layer's activations: random ones on what is to go, the original ones on what is kept.

Only three weights of a large model are trained, so the optimizer's state and the copy that serves as
the frozen model are small; the frozen model costs a forward pass over the retained samples. Above the
layer nothing is differentiated, and the language-model head stands aside: its logits are never computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rfa_fast.head import standing_aside
from rfa_fast.methods.base import Batch
from rfa_fast.methods.losses import mean_where
from rfa_fast.methods.options import Option, integer, number
from rfa_fast.methods.seeding import derive_seed
from rfa_fast.methods.weights import WeightsMethod, call
from rfa_fast.objective import accumulation_dtype
from rfa_fast.targets import output_embeddings, repeated_blocks, select

_DEPTH = 7 / 32  # layer 7 of a model of 32 blocks, as is common
_TRAINED = 3  # blocks, the layer's own the last of them


class RMU(WeightsMethod):
    """Representation misdirection for unlearning (Li et al., 2024, the WMDP paper, arXiv 2403.03218).

        L_f = E_{x ∈ D_f}[1/|x| Σ_t ‖M_θ(t) − c · u‖²]
        L_r = E_{x ∈ D_r}[1/|x| Σ_t ‖M_θ(t) − M_o(t)‖²]
        L = L_f + α L_r

    M(t) is the output of block ℓ at token t, M_o the original model's; u a unit vector, its entries drawn
    evenly from [0, 1) by the run's seed and then normalised. Padding is no token. Labels are not read.

    Options:
        layer: ℓ, from 0; `None`: 7/32 of the depth, and at least 2.
        steering: c.
        alpha: α.
        targets: `None` trains the last feed-forward weight of the blocks ℓ − 2, ℓ − 1 and ℓ; otherwise as
            :class:`~rfa_fast.methods.weights.WeightsMethod`, as are `train_mode` and `shift_labels`.
            For a mixture of experts name the weights here.

    The defaults of c and α are in common use for models of 7 billion parameters; c should be of the size of
    the activations' norm, which grows with the model.

    Example:
        >>> RMU.settings({"layer": 5})["steering"]
        6.5
    """

    name = "rmu"
    reads_forget_labels = False
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **WeightsMethod.OPTIONS,
        "layer": Option(None, integer(minimum=0, optional=True)),
        "steering": Option(6.5, number(minimum=0, above=True)),
        "alpha": Option(1200.0, number(minimum=0)),
    }

    def _trained(self) -> list[str]:
        blocks = repeated_blocks(self.model)
        layer = self.options["layer"]
        if layer is None:
            layer = min(max(2, round(_DEPTH * len(blocks))), len(blocks) - 1)
        if layer >= len(blocks):
            raise ValueError(f"layer: got {layer}, expected at most {len(blocks) - 1}, the last of the model's blocks")
        self._block = self.model.get_submodule(blocks[layer])
        if self.options["targets"] is not None:
            return super()._trained()
        adaptable = [target.name for target in select(self.model, "all").adapted]
        names = []
        for block in blocks[max(0, layer + 1 - _TRAINED) : layer + 1]:
            inside = [name for name in adaptable if name == block or name.startswith(f"{block}.")]
            if not inside:
                raise ValueError(
                    f"targets: got None for a model without a feed-forward layer in {block}, expected names"
                )
            names.append(f"{inside[-1]}.weight")
        return names

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """L and its two parts, `forget_loss` and `retain_loss`."""
        with self._watched(differentiate=True) as seen:
            call(self.model, batch.inputs)
        ours = self._activation(seen)
        forget = mean_where(_per_sample(ours - self._aim(ours), batch), batch.forget)
        kept = self._part(batch, ~batch.forget)
        retain = torch.zeros_like(forget)
        if kept is not None:
            with self._watched(differentiate=False) as seen:
                self._reference(kept)
            retain = _per_sample(ours[~batch.forget] - self._activation(seen), kept).mean()
        return {"total": forget + self.options["alpha"] * retain, "forget_loss": forget, "retain_loss": retain}

    def _aim(self, like: Tensor) -> Tensor:
        """c · u `(D,)`."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "rmu"))
        u = torch.rand(like.shape[-1], generator=generator, dtype=torch.float64)
        steering: float = self.options["steering"]
        aim: Tensor = steering * u / torch.linalg.vector_norm(u)
        return aim.to(like)

    def _activation(self, seen: list[Tensor]) -> Tensor:
        if len(seen) != 1 or seen[0].ndim not in (2, 3):
            shapes = [tuple(tensor.shape) for tensor in seen]
            raise ValueError(f"layer: got outputs {shapes} from the block in one forward, expected one (B, T, D)")
        return seen[0].to(accumulation_dtype(seen[0].dtype))

    @contextmanager
    def _watched(self, *, differentiate: bool) -> Iterator[list[Tensor]]:
        """The block's output in the forward inside, cut off from what comes after it."""
        seen: list[Tensor] = []

        def watch(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if not isinstance(hidden, Tensor):
                raise TypeError(f"layer: got {type(output).__name__} from the block, expected a tensor or a tuple")
            seen.append(hidden if differentiate else hidden.detach())
            # What comes after may write into it (an activation in place), and what was seen is still to be read.
            rest = hidden.detach().clone()
            return (rest, *output[1:]) if isinstance(output, tuple) else rest

        head = output_embeddings(self.model)
        aside: AbstractContextManager[Any] = standing_aside(head) if isinstance(head, nn.Linear) else nullcontext()
        hook = self._block.register_forward_hook(watch)
        try:
            with aside:
                yield seen
        finally:
            hook.remove()


def _per_sample(error: Tensor, batch: Batch) -> Tensor:
    """‖e‖² of `(B, T, D)`, mean over the tokens of each sample; of `(B, D)` as it is; `(B,)`."""
    squares = error.square().sum(-1)
    if squares.ndim == 1:
        return squares
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    if mask is None or mask.shape != squares.shape:
        return squares.mean(1)
    valid = mask != 0
    return torch.where(valid, squares, 0).sum(1) / valid.sum(1).clamp(min=1)
