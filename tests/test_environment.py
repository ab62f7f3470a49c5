"""pyproject.toml (ranges), requirements.lock (versions) and environment.yml (versions for conda) agree."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.paths import PROJECT

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
EXTRAS = PYPROJECT["optional-dependencies"]
UNLOCKED = {"gpu", "quantized", "slurm", "vllm"}
LOCKED_EXTRAS = [line for extra, lines in EXTRAS.items() if extra not in UNLOCKED for line in lines]
LOCKED_RANGES = [Requirement(line) for line in PYPROJECT["dependencies"] + LOCKED_EXTRAS]
LOCK_TEXT = (PROJECT / "requirements.lock").read_text()
LOCK = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", LOCK_TEXT, flags=re.MULTILINE))
CONDA = yaml.safe_load((PROJECT / "environment.yml").read_text())["dependencies"]
CONDA_PIP = next(entry["pip"] for entry in CONDA if isinstance(entry, dict))


@pytest.mark.parametrize("requirement", LOCKED_RANGES, ids=lambda requirement: requirement.name)
def test_the_lock_lies_in_the_range(requirement):
    version = LOCK[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"{requirement} does not admit {version}: run `make lock`"


def test_the_lock_is_nothing_but_versions():
    lines = [line for line in LOCK_TEXT.splitlines() if line and not line.lstrip().startswith("#")]
    assert lines == [f"{name}=={version}" for name, version in LOCK.items()]
    assert not re.search(r"://|file:|--|/(?:opt|home|root|tmp|work)/", LOCK_TEXT.replace("make lock", ""))


def test_versions_in_the_lock_name_no_build():
    assert not [name for name, version in LOCK.items() if "+" in version]


def test_the_lock_names_no_cuda_libraries():
    assert not [name for name in LOCK if name.startswith(("nvidia-", "cuda-"))]


def test_conda_has_the_lock_s_versions_of_the_direct_dependencies():
    pins = {str(Requirement(line)) for line in CONDA_PIP if not line.startswith("--")}
    expected = set()
    for requirement in LOCKED_RANGES:
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        expected.add(f"{requirement.name}{extras}=={LOCK[canonicalize_name(requirement.name)]}")
    assert pins == expected


def test_conda_takes_the_other_versions_from_the_lock():
    assert "--constraint requirements.lock" in CONDA_PIP


def test_conda_has_the_python_the_lock_was_solved_for():
    assert "python=3.11" in CONDA
    assert "--python-version 3.11" in (PROJECT / "Makefile").read_text()


def test_the_lock_is_solved_for_every_other_extra():
    extras = re.search(r"^EXTRAS := (.*)$", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    assert set(extras) == EXTRAS.keys() - UNLOCKED


def test_every_dependency_has_its_reason_beside_it():
    text = (PROJECT / "pyproject.toml").read_text()
    for line in PYPROJECT["dependencies"] + [line for extra in EXTRAS.values() for line in extra]:
        assert re.search(rf'^    "{re.escape(line)}",\s+# \w', text, flags=re.MULTILINE), line


ROOTS = ["deltamem", "deltamem_vllm", "kernels", "pipelines", "workflow", "benchmarks", "examples", "tests"]


@pytest.mark.parametrize("root", ROOTS)
def test_every_import_is_a_declared_dependency(root):
    declared = {canonicalize_name(Requirement(line).name) for line in PYPROJECT["dependencies"]}
    declared |= {
        canonicalize_name(Requirement(line).name)
        for extra in EXTRAS.keys() - {"docs", "test"}
        for line in EXTRAS[extra]
    }
    if root in ("benchmarks", "tests"):
        declared |= {canonicalize_name(requirement.name) for requirement in LOCKED_RANGES}
    own = {"deltamem", "deltamem_kernels", "deltamem_vllm", "pipelines", "benchmarks", "conftest", "examples", "tests"}
    distributions = metadata.packages_distributions()
    for path in sorted((PROJECT / root).rglob("*.py")):
        for module in imported_modules(path) - own - sys.stdlib_module_names:
            owners = {canonicalize_name(name) for name in distributions.get(module, [module])}
            assert owners & declared, f"{path.relative_to(PROJECT)} imports {module}, which pyproject.toml lacks"


def imported_modules(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            modules.add(node.module.split(".")[0])
    return modules
