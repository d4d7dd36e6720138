"""What a user installs: the files in the wheel, and what importing it does and does not do.

Imports run in interpreters that see only what a test puts on their path: `-I -S` leaves out the
working directory, `PYTHONPATH` and the editable install of the environment, which would otherwise
answer for a wheel that lacks a file. The libraries come from the environment's site-packages.
"""

from __future__ import annotations

import ast
import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = Path(sysconfig.get_paths()["purelib"])
NOT_COPIED = {"benchmarks", "build", "dist", "docs", "runs"}
# Loaded by the functions that need them, not by `import rfa_fast`.
HEAVY = ("matplotlib", "sklearn", "transformers", "torchvision", "typer", "peft", "datasets", "jinja2")


def run(command: list[str], cwd: Path) -> str:
    """Standard output of a command that must succeed; its errors are in the failure message."""
    # Coverage would otherwise count the copies of the package that these tests make.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTHON"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.fail(
            f"{' '.join(command[:4])} … ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout


def python(code: str, path: list[Path], cwd: Path) -> Any:
    """What `code` leaves in `result`, run where only `path`, in that order, leads to packages."""
    prelude = f"import json, os, sys\nsys.path[:0] = {[str(entry) for entry in path]!r}\nresult = None\n"
    closing = "\nprint(json.dumps(result))"
    return json.loads(run([sys.executable, "-I", "-S", "-c", prelude + code + closing], cwd).splitlines()[-1])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a build leaves nothing behind in the real ones."""

    def unwanted(folder: str, names: list[str]) -> set[str]:
        if Path(folder) != ROOT:
            return {"__pycache__"}
        return {name for name in names if name in NOT_COPIED or name.startswith(".") or name.endswith(".egg-info")}

    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "rfa-fast", ignore=unwanted))


@pytest.fixture(scope="module")
def sources(checkout: Path) -> set[str]:
    """Every file of the two source folders, under the name it has once installed."""
    found = set()
    for folder, name in (("rfa_fast", "rfa_fast"), ("kernels", "rfa_fast/kernels")):
        for file in (checkout / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                found.add(f"{name}/{file.relative_to(checkout / folder).as_posix()}")
    return found


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it, not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(checkout)], folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    wheel.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


@pytest.fixture(scope="module")
def someone_elses_kernels(pytestconfig: pytest.Config) -> Path:
    """The package of that name from PyPI, fetched once and kept in pytest's cache."""
    folder = pytestconfig.cache.mkdir("pypi-kernels")
    if not (folder / "kernels" / "__init__.py").is_file():
        constraints = str(ROOT / "constraints" / "dev.txt")
        arguments = ["--quiet", "--no-deps", "--target", str(folder), "--constraint", constraints, "kernels"]
        run([sys.executable, "-m", "pip", "install", *arguments], folder)
    return folder


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_no_file_makes_the_folder_a_package_of_its_own() -> None:
    for name in ("kernels/__init__.py", "conftest.py", "tests/__init__.py"):
        assert not (ROOT / name).exists(), f"{name} lets `import kernels` find the folder kernels/"


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: zipfile.ZipFile, sources: set[str]) -> None:
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packaged == sources
    assert {"rfa_fast/py.typed", "rfa_fast/kernels/availability.py"} <= packaged
    assert any(name.startswith("rfa_fast/templates/") and name.endswith(".j2") for name in packaged)


def test_the_wheel_has_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rfa_fast"}
    (listed,) = (name for name in wheel.namelist() if name.endswith("top_level.txt"))
    assert wheel.read(listed).decode().split() == ["rfa_fast"]


def test_the_source_distribution_holds_what_the_wheel_and_the_tests_need(
    built: Path, checkout: Path, sources: set[str]
) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {name.replace("rfa_fast/kernels/", "kernels/") for name in sources}
    tests = {f"tests/{file.relative_to(checkout / 'tests').as_posix()}" for file in (checkout / "tests").rglob("*.py")}
    assert expected | tests <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints/dev.txt"} <= names


def test_the_metadata_asks_for_ranges(metadata: Message) -> None:
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">=")[0] for line in required} >= {"torch", "transformers", "peft", "safetensors", "triton"}
    assert [line for line in required if "==" in line.partition(";")[0] or "@" in line] == []
    assert [line for line in required if line.startswith("triton")] == ['triton>=3.6; sys_platform == "linux"']
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_every_import_is_declared(metadata: Message, checkout: Path) -> None:
    imported = {
        name.partition(".")[0]
        for folder in ("rfa_fast", "kernels")
        for file in (checkout / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    distributions = packages_distributions()
    outside = sorted(name for name in imported - sys.stdlib_module_names if name not in ("rfa_fast", "__future__"))
    required = {canonical(re.split(r"[ ;<>=!~\[]", line)[0]) for line in metadata.get_all("Requires-Dist", [])}
    undeclared = [name for name in outside if not {canonical(d) for d in distributions.get(name, [name])} & required]
    assert "torch" in outside
    assert undeclared == []


def test_the_console_script_exists(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "rfa-fast = rfa_fast.cli:main" in wheel.read(name).decode()


def test_the_installed_wheel_imports_from_anywhere(installed: Path, metadata: Message, tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec\n"
        "import rfa_fast, rfa_fast.kernels.availability as kernels\n"
        "result = rfa_fast.__file__, kernels.__file__, rfa_fast.__version__, find_spec('kernels') is None\n"
    )
    package, kernels, version, free = python(code, [installed, LIBRARIES], tmp_path)
    assert Path(package) == installed / "rfa_fast" / "__init__.py"
    assert Path(kernels) == installed / "rfa_fast" / "kernels" / "availability.py"
    assert version == metadata["Version"]
    assert free, "the wheel made `kernels` importable"


def test_importing_needs_no_triton_and_loads_nothing_heavy(installed: Path, tmp_path: Path) -> None:
    code = (
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'triton':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "import rfa_fast\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "from rfa_fast.kernels.availability import triton_status\n"
        "result = sorted(loaded), triton_status('cpu'), torch.cuda.is_initialized()\n"
    )
    loaded, status, initialised = python(code, [installed, LIBRARIES], tmp_path)
    assert "rfa_fast" in loaded
    assert set(loaded) & set(HEAVY) == set()
    assert status == [False, "Triton is not installed; on Linux `pip install triton` brings it."]
    assert not initialised


# A script or a notebook in the root has the root at the head of its path, and there the folder kernels/.
ROOT_CODE = (
    "from importlib.util import find_spec\n"
    "import transformers\n"
    "from transformers.integrations import hub_kernels\n"
    "import rfa_fast, rfa_fast.kernels.availability as ours\n"
    "theirs = find_spec('kernels')\n"
    "result = rfa_fast.__file__, ours.__file__, theirs and theirs.origin, ours.__name__\n"
)


def test_a_bare_checkout_works_beside_the_pypi_package(someone_elses_kernels: Path) -> None:
    package, ours, theirs, name = python(ROOT_CODE, [ROOT, someone_elses_kernels, LIBRARIES], ROOT)
    assert Path(package) == ROOT / "rfa_fast" / "__init__.py"
    assert Path(ours) == ROOT / "kernels" / "availability.py"
    assert name == "rfa_fast.kernels.availability"
    assert Path(theirs) == someone_elses_kernels / "kernels" / "__init__.py"


def test_a_bare_checkout_works_without_the_pypi_package(checkout: Path) -> None:
    package, ours, origin, _ = python(ROOT_CODE, [checkout, LIBRARIES], checkout)
    assert Path(package) == checkout / "rfa_fast" / "__init__.py"
    assert Path(ours) == checkout / "kernels" / "availability.py"
    assert origin is None, "the folder kernels/ must stay without a file that makes it importable as a package"


def test_an_editable_install_keeps_the_root_off_the_path(checkout: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    run([sys.executable, "-c", code], checkout)
    (path,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(path).extractall(site)
    code = (
        "import site\n"
        f"site.addsitedir({str(site)!r})\n"
        "from importlib.util import find_spec\n"
        "import rfa_fast, rfa_fast.kernels.availability as ours\n"
        "result = rfa_fast.__file__, ours.__file__, find_spec('kernels') is None, sys.path\n"
    )
    package, ours, free, entries = python(code, [site, LIBRARIES], tmp_path)
    assert Path(package) == checkout / "rfa_fast" / "__init__.py"
    assert Path(ours) == checkout / "kernels" / "availability.py"
    assert free, "the editable install made `kernels` importable"
    assert str(checkout) not in entries


def test_running_the_tests_leaves_the_root_off_the_path() -> None:
    assert str(ROOT) not in [os.path.realpath(entry) for entry in sys.path if entry]
    assert "kernels" not in sys.modules or not str(sys.modules["kernels"].__file__).startswith(str(ROOT))
