"""The source distribution and the wheel, and the wheel beside frameworks that are absent or too old."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from test_project import BLOCK, ROOT, lower_bounds, read_setup

import distill_core

FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "keras", "tensorflow", "jax")
EXTRAS = ("lightning", "keras", "jax", "cli", "export", "plots", "language", "report", "launcher", "all", "docs", "dev")
HALVES = ("lightning", "keras")
PACKAGES = ("distill_core", "lightning_distill", "keras_distill")
# The packages that only extras install; what a framework itself needs is not among them.
OF_EXTRAS = {
    "lightning": ("keras", "tensorflow", "jax", "pydantic", "matplotlib", "sklearn", "jsonargparse"),
    "keras": ("torch", "lightning", "torchmetrics", "pydantic", "yaml", "matplotlib", "sklearn", "jsonargparse"),
}


class Built(NamedTuple):
    files: list[str]  # of the source distribution, from its own folder
    wheel: list[str]
    metadata: Mapping[str, str]
    requirements: list[Requirement]
    site: Path  # the unpacked wheel


def project_files() -> list[str]:
    """The files of the project; in an unpacked source distribution, its files."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split("\n")
        return sorted({name for name in listed if name and (ROOT / name).is_file()})
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    made = (
        "build",
        "dist",
        "__pycache__",
        "lightning_logs",
        "demo_output",
    )  # by tools and programs, as hidden folders are
    return sorted(
        path.as_posix()
        for path in files
        if not any(folder in made or (folder.startswith(".") and folder != ".ci") for folder in path.parts[:-1])
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A source distribution of the project, and a wheel that is built from the unpacked source distribution."""
    folder = tmp_path_factory.mktemp("packages")
    for name in project_files():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "source" / name)
    (archive,) = build("sdist", folder / "source", folder)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    (wheel,) = build("wheel", unpacked, folder)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
        names = file.namelist()
    files = sorted(path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file())
    metadata = HeaderParser().parsestr(next((folder / "site").glob("*.dist-info/METADATA")).read_text(encoding="utf-8"))
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    return Built(files, names, metadata, requirements, folder / "site")


def build(kind: str, source: Path, folder: Path) -> list[Path]:
    """Build with setuptools as pip does, without an environment of its own: tests have no network."""
    code = f"import sys, setuptools.build_meta as backend; backend.build_{kind}(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder / kind)]
    (folder / kind).mkdir()
    result = subprocess.run(command, capture_output=True, text=True, cwd=source, check=False)
    assert result.returncode == 0, result.stderr
    return [*(folder / kind).iterdir()]


def run(built: Built, code: str, *, absent: Sequence[str] = (), before: Path | None = None) -> Any:
    """Run code in a process that imports the unpacked wheel; return the value passed to ``say``, or the error."""
    path = os.pathsep.join(str(folder) for folder in (before, built.site) if folder is not None)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "KERAS_BACKEND": "tensorflow"}
    indented = "\n".join(f"    {line}" for line in code.splitlines())
    script = (
        f"{BLOCK.format((*absent, '-'))}\nimport json\n"
        "def say(value):\n    print(json.dumps(value))\n"
        f"try:\n{indented}\nexcept ImportError as e:\n    say([type(e).__name__, e.name, str(e)])"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        cwd=built.site.parent,
        env=environment,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_source_distribution_holds_every_file_of_the_project(built: Built) -> None:
    skipped = re.compile(r"\.git/|\.github/|\.gitignore$|docs/_build/")
    assert [name for name in project_files() if name not in built.files and not skipped.match(name)] == []


def test_the_wheel_holds_the_packages_alone(built: Built) -> None:
    info = f"lightning_distill-{distill_core.__version__}.dist-info"
    assert {name.split("/")[0] for name in built.wheel} == {*PACKAGES, info}
    product = [name for name in project_files() if name.split("/")[0] in PACKAGES]
    assert {name for name in built.wheel if not name.startswith(info)} == set(product)
    assert {f"{info}/licenses/LICENSE", *(f"{name}/py.typed" for name in PACKAGES)} <= set(built.wheel)


def test_the_metadata_names_version_licence_and_addresses(built: Built) -> None:
    metadata = built.metadata
    assert metadata["Version"] == distill_core.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    addresses = [line.split(", ") for line in metadata.get_all("Project-URL")]
    assert {name for name, _ in addresses} == {"Homepage", "Documentation", "Source", "Issues", "Changelog"}


def test_the_version_and_the_addresses_stand_in_one_place() -> None:
    version = re.compile(rf"(?<![\d.]){re.escape(distill_core.__version__)}(?![\d.])")
    product = [name for name in project_files() if name.split("/")[0] in PACKAGES and name.endswith(".py")]
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in [*product, "setup.cfg", "pyproject.toml"]}
    assert [name for name, text in texts.items() if version.search(text)] == ["distill_core/__init__.py"]
    (host,) = set(re.findall(r"https?://([^/\s]+)", read_setup()["metadata"]["project_urls"]))
    others = [name for name in project_files() if name in product or name in ("CITATION.cff", "SECURITY.md")]
    assert [name for name in others if host in (ROOT / name).read_text(encoding="utf-8")] == []


def test_the_plain_installation_pulls_no_framework(built: Built) -> None:
    plain = [requirement.name for requirement in built.requirements if requirement.marker is None]
    assert sorted(plain) == ["filelock", "numpy", "packaging", "rich"]


def test_no_extra_for_one_framework_pulls_another(built: Built) -> None:
    def named(extra: str) -> set[str]:
        return {
            requirement.name
            for requirement in built.requirements
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        }

    assert built.metadata.get_all("Provides-Extra") == list(EXTRAS)
    assert named("lightning") == {"torch", "lightning", "torchmetrics"}
    assert named("keras") == {"keras", "tensorflow"}
    assert named("jax") == {"keras", "jax"}
    assert [
        name
        for extra in ("cli", "export", "plots", "language", "report", "launcher")
        for name in named(extra)
        if name in FRAMEWORKS
    ] == []
    (whole,) = [requirement for requirement in built.requirements if requirement.extras > {"keras"}]
    assert whole.extras == {"lightning", "keras", "cli", "plots", "report", "launcher"}


def test_every_bound_of_a_package_is_the_same(built: Built) -> None:
    seen: dict[str, str] = {}
    for requirement in built.requirements:
        assert seen.setdefault(requirement.name, str(requirement.specifier)) == str(requirement.specifier)


def test_the_checks_at_import_use_the_bounds_of_setup_cfg(built: Built) -> None:
    code = (
        "from distill_core import installed\n"
        f"say({{name: installed._lower_bound(name) for name in {sorted(lower_bounds())}}})"
    )
    assert run(built, code) == lower_bounds()


HINTS = {
    "lightning": 'pip install "lightning>=2.6"',
    "torch": 'pip install "torch>=2.6"',
    "torchmetrics": 'pip install "torchmetrics>=1.4"',
    "keras": 'pip install "keras>=3.12" "tensorflow>=2.18"',
    "tensorflow": 'pip install "tensorflow>=2.18"',
    "jax": 'pip install "jax>=0.4.34"',
    "jsonargparse": 'pip install "jsonargparse[signatures]>=4.39"',
    "matplotlib": 'pip install "matplotlib>=3.8"',
    "sklearn": 'pip install "scikit-learn>=1.4"',
    "pydantic": 'pip install "pydantic>=2.7"',
    "yaml": 'pip install "pyyaml>=6.0"',
}


def absence(user: str, *modules: str) -> str:
    verb, pronoun = ("is", "it") if len(modules) == 1 else ("are", "them")
    command = " ".join(["pip install", *(HINTS[module].removeprefix("pip install ") for module in modules)])
    return f"{user} needs {', '.join(modules)}, which {verb} not installed. Install {pronoun} with: {command}"


USES = {
    "lightning": """
import lightning_distill as package
import torch
loss = package.SoftTargetLoss()(torch.ones(2, 3), torch.eye(2, 3)).item()
data = torch.utils.data.TensorDataset(torch.ones(4, 2))
cache = package.TeacherCache.build(torch.nn.Linear(2, 3), data, folder)
""",
    "keras": """
import keras
import keras_distill as package
import numpy as np
loss = float(package.SoftTargetLoss()(np.eye(2, 3), np.ones((2, 3))))
teacher = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
cache = package.TeacherCache.build(teacher, np.ones((4, 2)), folder)
""",
}
# Each command fails, and its line is kept.
COMMANDS = """
import contextlib, io
lines = []
for words in {words}:
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = main(words)
    lines.append([code, stderr.getvalue()])
"""


@pytest.mark.parametrize("half", HALVES)
def test_the_plain_installation_beside_a_framework(built: Built, tmp_path: Path, half: str) -> None:
    """Losses, caches and a star import work; what needs an extra is one error that names the package."""
    prog = f"{half}-distill"
    commands = [["demo"], ["validate-config", "x"], *([["fit"]] if half == "lightning" else [])]
    code = (
        f"folder = {str(tmp_path)!r}\n{USES[half]}\nfrom distill_core.cli.{half} import main\n"
        f"names = {{}}\nexec('from {half}_distill import *', names)\n"
        f"try:\n    package.Distillation\nexcept ModuleNotFoundError as error:\n    launcher = str(error)\n"
        f"{COMMANDS.format(words=commands)}\n"
        "say([loss > 0, cache.manifest.length, 'TeacherCache' in names, 'Distillation' in names, launcher, lines])"
    )
    missing = absence("The launcher", "pydantic", *(["yaml"] if half == "keras" else []))
    lines = [
        [1, f"{prog} demo: {absence('The demo', 'matplotlib', 'sklearn')}\n"],
        [1, f"{prog} validate-config: {missing}\n"],
        [1, f"{prog} fit: {absence('This command', 'jsonargparse')}\n"],
    ][: len(commands)]
    assert run(built, code, absent=OF_EXTRAS[half]) == [True, 4, True, False, missing, lines]


MODULES = {
    "lightning": {"torch": "", "lightning": "", "torchmetrics": ""},
    "keras": {"keras": "class config:\n    backend = staticmethod(lambda: 'tensorflow')"},
}


def write_modules(folder: Path, half: str, **versions: str) -> None:
    """Write modules that have the names of the frameworks, and little more than a version."""
    for name, text in {**dict.fromkeys(versions, ""), **MODULES[half]}.items():
        version = f"__version__ = {versions.get(name, '99.0')!r}\n"
        (folder / f"{name}.py").write_text(version + text, encoding="utf-8")


@pytest.mark.parametrize(
    ("half", "absent"),
    [
        ("lightning", ["torch", "lightning", "torchmetrics"]),
        ("lightning", ["lightning"]),
        ("lightning", ["torchmetrics"]),
        ("keras", ["keras"]),
        ("keras", ["tensorflow"]),
    ],
)
def test_without_its_framework_a_half_is_one_error_with_the_command(
    built: Built, tmp_path: Path, half: str, absent: list[str]
) -> None:
    write_modules(tmp_path, half)
    message = absence(f"{half}_distill", *absent)
    error = run(built, f"import {half}_distill", absent=absent, before=tmp_path)
    assert error == ["ModuleNotFoundError", absent[0], message]
    command = ["cache", "info", "x"] if half == "lightning" else ["validate-config", "x"]
    code = f"from distill_core.cli.{half} import main\n{COMMANDS.format(words=[command])}\nsay(lines)"
    ((status, line),) = run(built, code, absent=absent, before=tmp_path)
    name = " ".join(command[:-1])
    assert (status, line) == (1, f"{half}-distill {name}: {message}\n")


@pytest.mark.parametrize(
    ("absent", "others"),
    [
        (("jax", "tensorflow", "torch"), ""),
        (("jax", "tensorflow"), ". Or set the environment variable KERAS_BACKEND=torch"),
        (("jax",), ". Or set the environment variable KERAS_BACKEND=tensorflow or KERAS_BACKEND=torch"),
    ],
)
def test_a_backend_that_keras_cannot_import_is_named_with_those_that_are_installed(
    built: Built, tmp_path: Path, absent: tuple[str, ...], others: str
) -> None:
    write_modules(tmp_path, "keras")
    (tmp_path / "keras.py").write_text("import jax", encoding="utf-8")
    error = run(built, "import keras_distill", absent=absent, before=tmp_path)
    assert error == ["ModuleNotFoundError", "jax", absence("keras_distill", "jax") + others]


@pytest.mark.parametrize(
    ("half", "name", "version", "bound"),
    [
        ("lightning", "torch", "2.5.1+cu124", "2.6"),
        ("lightning", "lightning", "2.5.6", "2.6"),
        ("lightning", "torchmetrics", "1.3.2", "1.4"),
        ("keras", "keras", "3.11.3", "3.12"),
        ("keras", "tensorflow", "2.17.1", "2.18"),
    ],
)
def test_a_framework_that_is_too_old_is_named_at_import(
    built: Built, tmp_path: Path, half: str, name: str, version: str, bound: str
) -> None:
    write_modules(tmp_path, half, **{name: version})
    message = (
        f"{half}_distill needs {name} {bound} or newer, but {name} {version} is installed."
        f' Upgrade it with: pip install "{name}>={bound}"'
    )
    assert run(built, f"import {half}_distill", before=tmp_path) == ["ImportError", name, message]


def test_a_prerelease_of_the_oldest_release_is_accepted(built: Built, tmp_path: Path) -> None:
    """Builds of vendors have such names."""
    write_modules(tmp_path, "lightning", torch="2.6.0a0+df5bbc09c2.nv24.12")
    code = "from distill_core.installed import unusable\nsay(unusable('x', 'torch') is None)"
    assert run(built, code, before=tmp_path) is True


def test_an_error_inside_a_framework_is_not_hidden(built: Built, tmp_path: Path) -> None:
    write_modules(tmp_path, "lightning")
    (tmp_path / "torch.py").write_text("import a_part_of_torch", encoding="utf-8")
    error = run(built, "import lightning_distill", before=tmp_path)
    assert error == ["ModuleNotFoundError", "a_part_of_torch", "No module named 'a_part_of_torch'"]


def test_without_metadata_the_hint_has_no_bounds(built: Built, tmp_path: Path) -> None:
    """As in a source tree on the path, which was not installed."""
    write_modules(tmp_path, "lightning", torch="0.1")
    code = (
        "from importlib import metadata\n"
        "def requires(name):\n    raise metadata.PackageNotFoundError(name)\n"
        "metadata.requires = requires\nimport lightning_distill"
    )
    _, name, message = run(built, code, absent=("lightning",), before=tmp_path)
    assert (name, message.partition(". ")[2]) == ("lightning", "Install it with: pip install lightning")


def test_no_hint_names_a_distribution_that_is_not_published() -> None:
    product = [name for name in project_files() if name.split("/")[0] in PACKAGES and name.endswith(".py")]
    lines = [line for name in product for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if "pip install" in line and "-distill" in line] == []
