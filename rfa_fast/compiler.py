"""How a step is compiled: the settings of dynamo, functorch and inductor, and the one graph pass that is ours.

They are the compiler's own switches, set for the time of a step and put back afterwards; a torch that does not know one
of them goes without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

# What inductor stores on a CPU rather than computes again, as soon as two others read it.
_HEAVY = frozenset({"exp", "log", "log10", "log1p", "log2", "sigmoid", "tanh"})
_COPIES = 4


@contextmanager
def compiler_settings() -> Iterator[None]:
    """Context in which a step is compiled, its backward included.

    What a layer in a checkpointed block reports is reported by its first run only. What is elementwise, an activation
    function or the scale of a norm, is computed again in the backward rather than kept for it: for a product that
    reads it, after another use far away, and at the end of a long chain, too. On a CPU it is computed again for
    each of its uses there (:func:`separate_uses`), unless inductor was given a pass of somebody else's.

    Example:
        >>> with compiler_settings():
        ...     double = torch.compile(lambda x: 2 * x, backend="eager")
        ...     double(torch.ones(2))
        tensor([2., 2.])
    """
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    passes = getattr(inductor, "post_grad_custom_post_pass", None)
    settings = (
        (dynamo, "skip_fwd_side_effects_in_bwd_under_checkpoint", True),
        (functorch, "ban_recompute_materialized_backward", False),
        (functorch, "ban_recompute_used_far_apart", False),
        (functorch, "ban_recompute_long_fusible_chains", False),
        (inductor, "post_grad_custom_post_pass", passes or _separate_uses()),
    )
    with ExitStack() as stack:
        for config, name, value in settings:
            if hasattr(config, name):
                stack.enter_context(config.patch(name, value))
        yield


@contextmanager
def one_graph() -> Iterator[None]:
    """Context that says what to do where a step does not compile; the compiler's own error is the cause of it.

    Raises:
        RuntimeError: the compiler gave up.

    Example:
        >>> with one_graph():
        ...     torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)(torch.ones(2))
        tensor([2., 2.])
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        first = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"compile_step: the step of this model does not compile into one graph: {first}. Take compile=False, which "
            "is the same step uncompiled, or change what the error above this one names"
        ) from error


def separate_uses(graph: Graph) -> int:
    """Give every use of an elementwise result behind an exponential a computation of its own.

    On a CPU inductor stores such a result as soon as two others read it: the backward of a gated feed-forward layer
    then writes silu(g), and its sigmoid in fp32, before the product that comes between their uses, and holds them
    until after it. Computed again they are never stored; the gate is read once more for that. Results that a
    reduction or a product reads stay as they are, and so does what has more uses than a few.

    Args:
        graph: after autograd and decomposition (aten and prims); changed in place.

    Returns:
        The number of nodes that were added.

    Example:
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> e = graph.call_function(torch.ops.aten.exp.default, (x,))
        >>> twice = [graph.call_function(torch.ops.aten.add.Tensor, (e, k)) for k in (1, 2)]
        >>> _ = graph.output(tuple(twice))
        >>> separate_uses(graph), len(e.users)
        (1, 1)
    """
    added, heavy = 0, _behind_exponentials(graph)
    for node in reversed(list(graph.nodes)):
        users = list(node.users)
        if node not in heavy or not 1 < len(users) <= _COPIES or not all(_elementwise(user) for user in users):
            continue
        for user in users[1:]:
            with graph.inserting_before(user):
                copy = graph.node_copy(node)
            user.replace_input_with(node, copy)
            added += 1
    return added


def _behind_exponentials(graph: Graph) -> set[Node]:
    """Elementwise nodes on a CPU in whose own formula, back to what is stored, an exponential or logarithm stands."""
    found: set[Node] = set()
    for node in graph.nodes:
        if not _elementwise(node) or not _on_cpu(node):
            continue
        name = getattr(node.target, "overloadpacket", None)
        if getattr(name, "__name__", "") in _HEAVY or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _elementwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _on_cpu(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.device.type == "cpu"


@cache
def _separate_uses() -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class SeparateUses(CustomGraphPass):
        """:func:`separate_uses` as inductor takes it; its identity, for the compiler's cache, is this file's text."""

        def __call__(self, graph: Graph) -> None:
            separate_uses(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((str(Path(__file__)),))

    return SeparateUses()
