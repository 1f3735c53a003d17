"""The rules of the project that a program can check."""

from __future__ import annotations

import ast
import configparser
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lightning_distill", "keras_distill")
PRODUCT = sorted(path for package in ("distill_core", *PACKAGES) for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OPTIONAL = ("jsonargparse", "matplotlib", "sklearn", "pytorch_lightning", "tokenizers")
# Modules that each package must work without, the other package included.
ABSENT = {
    "lightning_distill": ("keras", "tensorflow", "keras_distill"),
    "keras_distill": ("torch", "lightning", "pytorch_lightning", "torchmetrics", "lightning_distill"),
}
# These names are not found on the path, as on a machine that lacks them; nor is their metadata.
BLOCK = """
import sys
from importlib.machinery import PathFinder
class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {0} else super().find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, context):
        return () if context.name in {0} else super().find_distributions(context)
sys.meta_path[sys.meta_path.index(PathFinder)] = Absent
"""
REQUIREMENTS_TEXT = (ROOT / "tests" / "REQUIREMENTS.md").read_text(encoding="utf-8")
# Each code is the beginning of one point of a list.
REQUIREMENTS = re.findall(r"(?m)^- \*\*([CKLN]\d+)\*\* ", REQUIREMENTS_TEXT)


def relative(path: Path) -> str:
    """The path of a file as it stands in the repository."""
    return path.relative_to(ROOT).as_posix()


def read_setup() -> configparser.ConfigParser:
    """The parsed setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


@functools.cache
def requirements_in(path: Path) -> frozenset[str]:
    """The requirements that the names and docstrings of a file's tests mention."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.lower().startswith("test"):
            names |= {name.upper() for name in re.findall(r"_([cklnCKLN]\d+)(?=_|$)", node.name)}
            names |= set(re.findall(r"\b[CKLN]\d+\b", ast.get_docstring(node) or ""))
    return frozenset(names)


@pytest.mark.parametrize("path", PRODUCT + TESTS, ids=relative)
def test_file_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_product_code_has_no_assert(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not lines, f"{relative(path)}: raise an error that says what was expected, lines {lines}"


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_exist_and_have_docstrings(name: str) -> None:
    package = importlib.import_module(name)
    public = {name: getattr(package, name) for name in package.__all__ if not name.startswith("__")}
    assert public
    # A class inherits its parent's docstring unless its own namespace is asked.
    own = {
        name: vars(value).get("__doc__") if isinstance(value, type) else value.__doc__ for name, value in public.items()
    }
    bare = [name for name, docstring in own.items() if not docstring]
    assert not bare, f"public names without a docstring of their own: {bare}"


def test_compromised_releases_of_lightning_are_excluded() -> None:
    setup = read_setup()
    lines = [line for extra in setup["options.extras_require"].values() for line in extra.split()]
    for package in ("lightning", "pytorch-lightning"):
        (line,) = [line for line in lines if re.match(rf"{package}[<>=!]", line)]
        assert "!=2.6.2,!=2.6.3" in line


@pytest.mark.parametrize("name", PACKAGES)
def test_package_ships_its_type_information(name: str) -> None:
    assert (ROOT / name / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_package_works_without_the_framework_of_the_other(package: str) -> None:
    use = {
        "lightning_distill": "import torch; print(p.SoftTargetLoss()(torch.ones(2, 3), torch.eye(2, 3)).item())",
        "keras_distill": "from keras import ops; print(float(p.SoftTargetLoss()(ops.eye(2, 3), ops.ones((2, 3)))))",
    }[package]
    code = f"{BLOCK.format(ABSENT[package])}\nimport {package} as p\n{use}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 0


def test_shared_package_needs_no_framework() -> None:
    absent = (*ABSENT["lightning_distill"], *ABSENT["keras_distill"], "pydantic", "yaml")
    modules = [f"distill_core.{path.stem}" for path in (ROOT / "distill_core").glob("[a-z]*.py")]
    code = f"{BLOCK.format(absent)}\nimport {', '.join(modules)}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def test_import_of_the_package_imports_no_optional_dependency() -> None:
    # lightning itself may import some of them where they are installed: only what we add counts.
    code = (
        "import sys, lightning.pytorch, torchmetrics\n"
        "before = set(sys.modules)\n"
        "import lightning_distill\n"
        f"print(*sorted(set({OPTIONAL}) & (set(sys.modules) - before)))\n"
        "print([m for m in sys.modules if m.startswith(('distill_core.guidance.', 'lightning_distill.guidance'))])\n"
        "print(lightning_distill.compare.__name__, lightning_distill.write_report.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    # what compares trainings is imported when it is asked for; balanced weights are part of a training
    assert result.stdout.splitlines() == ["", "['distill_core.guidance.balance']", "compare write_report"]


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_requirement_is_named_by_a_test(requirement: str) -> None:
    assert any(requirement in requirements_in(path) for path in TESTS)


@pytest.mark.parametrize("path", TESTS, ids=relative)
def test_requirements_that_tests_name_are_described(path: Path) -> None:
    unknown = requirements_in(path) - set(REQUIREMENTS)
    assert not unknown, f"tests/REQUIREMENTS.md does not describe {sorted(unknown)}"


def test_no_requirement_is_described_twice() -> None:
    assert sorted(REQUIREMENTS) == sorted(set(REQUIREMENTS))


def test_files_that_hold_requirements_exist() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", REQUIREMENTS_TEXT))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def lower_bounds() -> dict[str, str]:
    """The oldest release of each package that setup.cfg allows."""
    setup = read_setup()
    lines = setup["options"]["install_requires"].splitlines()
    for extra in setup["options.extras_require"].values():
        lines += extra.splitlines()
    matches = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in matches if match}


def test_the_oldest_allowed_releases_are_those_that_the_tests_run_with() -> None:
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    oldest, bounds = dict(re.findall(r"(?m)^([\w-]+)==([\w.]+)$", text)), lower_bounds()
    frameworks = {"torch", "lightning", "pytorch-lightning", "torchmetrics", "keras", "tensorflow"}
    core = {"numpy", "packaging", "rich", "filelock", "pydantic", "pyyaml", "jsonargparse"}
    assert frameworks | core <= oldest.keys()

    def short(release: str) -> list[str]:
        parts = release.split(".")
        while parts[-1] == "0":
            parts.pop()
        return parts

    assert {name: short(release) for name, release in oldest.items()} == {name: short(bounds[name]) for name in oldest}


def test_bounds_are_the_measured_ones() -> None:
    """Lightning before 2.6 refuses the callback or its logging; Keras before 3.12 refuses targets without labels."""
    assert {name: lower_bounds()[name] for name in ("lightning", "pytorch-lightning", "keras")} == {
        "lightning": "2.6",
        "pytorch-lightning": "2.6",
        "keras": "3.12",
    }


def test_make_test_runs_every_file_that_its_last_run_ignores() -> None:
    """On TensorFlow; `make -n` prints the commands without running them."""
    dry_run = ["make", "-n", "test", "STAMP=LICENSE"]
    commands = subprocess.run(dry_run, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    runs = [line for line in commands.replace("\\\n", "").splitlines() if " -m pytest " in line]
    ignored = re.findall(r"--ignore=(\S+)", runs[-1])
    named = [file for run in runs[:-1] if "KERAS_BACKEND" not in run for file in re.findall(r" (tests/\S+\.py)", run)]
    assert ignored
    assert sorted(ignored) == sorted(named)
    assert all((ROOT / file).is_file() for file in ignored)
