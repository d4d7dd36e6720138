"""Packages of the distribution; everything else about it is declared in pyproject.toml.

The folder `kernels/` at the root is installed as `rfa_fast.kernels`, so that the wheel has one top
level name and never collides with the unrelated distribution that is called `kernels` on PyPI. Only
the mapping of that folder needs code; there is nothing to compile.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rfa_fast", "rfa_fast.*"]), "rfa_fast.kernels"],
    package_dir={"rfa_fast.kernels": "kernels"},
    include_package_data=False,  # only what the next line names
    package_data={"rfa_fast": ["py.typed", "templates/*"]},
)
