"""Triton's interpreter without the work it does twice.

Every call of one jit function by another wraps each builtin of the language once more, for the rest of the launch:
a kernel that calls helpers in a loop spends most of its time in wrappers around wrappers. And each access makes the
table of numpy's types anew. Neither changes what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def install() -> None:
    """Make the interpreter of this process quick; a second call does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter._patch_lang, "once"):
        return
    look_up = interpreter._get_np_dtype
    of_scalar = functools.lru_cache(maxsize=None)(look_up)
    # Types of blocks and pointers cannot be hashed, those of scalars can.
    interpreter._get_np_dtype = lambda kind: look_up(kind) if kind.scalar.is_ptr() else of_scalar(kind.scalar)
    wrap: Callable[[Any], Any] = interpreter._patch_lang
    wrapped: set[int] = set()

    def wrap_once(function: Any) -> Any:
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if languages <= wrapped:
            return interpreter._LangPatchScope()
        new = languages - wrapped
        scope, restore = wrap(function), interpreter._LangPatchScope.restore
        wrapped.update(new)

        def restored() -> None:
            restore(scope)
            wrapped.difference_update(new)

        scope.restore = restored
        return scope

    wrap_once.once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = wrap_once
