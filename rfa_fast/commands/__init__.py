"""What the commands of `rfa-fast` do; :mod:`rfa_fast.cli` puts them together.

Each module is imported with the program, so none imports more than typer, rich and torch at its top:
`rfa-fast --help` must not wait for transformers.
"""
