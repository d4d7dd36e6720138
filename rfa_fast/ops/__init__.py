"""The operators' implementations and their registration with torch.library; see :mod:`rfa_fast.ops.backends`."""

from rfa_fast.ops.backends import FUSED_DTYPES, select

__all__ = ["FUSED_DTYPES", "select"]
