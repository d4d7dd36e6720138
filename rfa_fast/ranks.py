"""Does every rank fit its layer?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rfa_fast.config import RFAConfig
from rfa_fast.targets import Plan


def fit_ranks(model: nn.Module, plan: Plan, config: RFAConfig) -> RFAConfig:
    """Check every rank against its layer.

    Of the layers that a placement takes some are smaller than the rank (a head of two classes, a squeeze of four
    channels). They get the largest rank they can hold, at the same scale, which reaches every matrix the larger rank
    could; for a layer that was named, and for a rank in `rank_pattern`, a rank that does not fit is an error.

    Args:
        model: the model, unpatched.
        plan: its layers to adapt.
        config: the options; patterns must name adapted layers.

    Returns:
        The options, with a rank and alpha of its own for each placed layer that is smaller than the rank.

    Raises:
        ValueError: a rank above `min(outputs, inputs)` of its layer (per group of a grouped
            convolution), or a pattern that names no adapted layer.
    """
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    names = {target.name for target in plan.adapted}
    rows = config.rows if isinstance(config.rows, Mapping) else {}
    for label, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas), ("rows", rows)):
        foreign = sorted(set(pattern) - names)
        if foreign:
            raise ValueError(
                f"{label}: got {foreign[0]!r}, expected names of adapted layers: {', '.join(sorted(names)[:8])}"
            )
    for target in plan.adapted:
        module = model.get_submodule(target.name)
        weight: Tensor = module.weight  # type: ignore[assignment]
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        largest = min(weight.shape[0] // groups, weight[0].numel())
        rank = config.rank_of(target.name)
        if rank <= largest:
            continue
        if not target.is_placed or target.name in config.rank_pattern:
            raise ValueError(
                f"rank: got {rank}, expected at most {largest} for layer {target.name!r} with weight "
                f"{tuple(weight.shape)}; lower rank, or give this layer its own in rank_pattern"
            )
        ranks[target.name] = largest
        alphas[target.name] = config.scale_of(target.name) * (largest**0.5 if config.rslora else largest)
    return RFAConfig.from_dict({**config.to_dict(), "rank_pattern": ranks, "alpha_pattern": alphas})
