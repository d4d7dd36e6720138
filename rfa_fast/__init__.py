"""rfa-fast: make a trained model forget, by Residual Feature Alignment on low-rank branches.

The public names live here; everything else is reached through its module. Importing the package
touches no device, sets no flag, and pulls in torch alone: transformers, PEFT, matplotlib and the
rest are imported by the functions that need them.
"""

from __future__ import annotations

from importlib import metadata as _metadata
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# In a checkout the Triton kernels lie beside the package, in `kernels/`; in a wheel they lie inside
# it. Extending the search path, rather than putting the root on `sys.path`, keeps the folder from
# being mistaken for the unrelated PyPI package `kernels`.
_root = _Path(__file__).resolve().parent.parent
if (_root / "kernels" / "availability.py").is_file() and not (_root / "rfa_fast" / "kernels").is_dir():
    __path__.append(str(_root))

from rfa_fast.config import RFAConfig  # noqa: E402
from rfa_fast.objective import RFALoss  # noqa: E402
from rfa_fast.patching import RFA, patch  # noqa: E402
from rfa_fast.step import compile_step  # noqa: E402

if _TYPE_CHECKING:
    from rfa_fast.adapters import load
    from rfa_fast.methods import unlearn

try:
    __version__ = _metadata.version("rfa-fast")
except _metadata.PackageNotFoundError:  # a bare checkout on sys.path
    __version__ = "0+unknown"

__all__ = ["RFA", "RFAConfig", "RFALoss", "__version__", "compile_step", "load", "patch", "unlearn"]

_LAZY = {"load": "rfa_fast.adapters", "unlearn": "rfa_fast.methods"}


def __getattr__(name: str) -> object:
    """Import the two entry points with heavier dependencies on first use."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rfa_fast' has no attribute {name!r}")
