"""`python -m rfa_fast`: the console script, where that is not on the path."""

from __future__ import annotations

from rfa_fast.cli import main

if __name__ == "__main__":
    main()
