"""Both command lines: help without a framework, files that cannot run code, text that cannot control the terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from malformed import write_cache
from test_project import ROOT, read_setup

import distill_core.cli.keras
import distill_core.cli.lightning
from distill_core.cli import EXIT_CODES

Capture = pytest.CaptureFixture[str]
Main = Callable[[Sequence[str]], int]
MAINS: dict[str, Main] = {"lightning": distill_core.cli.lightning.main, "keras": distill_core.cli.keras.main}
HEAVY = ("torch", "lightning", "tensorflow", "keras", "numpy", "jax", "pydantic", "yaml", "rich")
HELP = {
    "lightning": [
        *([], ["demo"], ["fit"], ["export"], ["validate-config"], ["report"], ["completion"]),
        *(["cache"], ["cache", "build"], ["cache", "info"]),
    ],
    "keras": [[], ["demo"], ["export"], ["validate-config"], ["report"], ["completion"]],
}


def python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else []), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)


@pytest.mark.parametrize("half", MAINS)
def test_help_and_version_import_no_framework(half: str) -> None:
    """Neither do they import other slow packages, and neither does wrong usage."""
    words = [["--version"], ["nonsense"], *([*command, "--help"] for command in HELP[half])]
    code = (
        f"import sys\nfrom distill_core.cli.{half} import main\n"
        f"codes = [main(words) for words in {words}]\n"
        f"print('END', codes, [name for name in {HEAVY} if name in sys.modules])"
    )
    result = python(code)
    assert result.stdout.splitlines()[-1] == f"END {[0, 2] + [0] * len(HELP[half])} []", result.stderr


def test_the_console_scripts_are_those_quick_commands() -> None:
    scripts = read_setup()["options.entry_points"]["console_scripts"].split("\n")
    expected = {f"{half}-distill = distill_core.cli.{half}:main" for half in MAINS}
    assert {line.strip() for line in scripts if line} == expected


@pytest.mark.parametrize("half", MAINS)
@pytest.mark.parametrize(
    ("words", "code", "begin"),
    [
        (["--version"], 0, "{prog} " + distill_core.__version__ + "\n"),
        (["--help"], 0, "usage: {prog} "),
        (["export", "--help"], 0, "usage: {prog} export "),
        (["exprot"], 2, "{prog}: argument command: invalid choice: 'exprot'"),
        (["demo"], 1, "Traceback"),
        (["demo", "--output", "-m"], 2, "{prog} demo: argument --output: expected one argument"),
    ],
    ids=["version", "help", "help of a command", "a wrong command", "a command", "a wrong option"],
)
def test_as_a_module_the_package_answers_without_its_framework(
    tmp_path: Path, half: str, words: list[str], code: int, begin: str
) -> None:
    """The modules in the folder replace the frameworks: an import of them fails."""
    for name in ("torch", "lightning", "torchmetrics", "keras"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a framework was imported')\n")
    result = python("", "-m", f"{half}_distill", *words, cwd=tmp_path)
    output = result.stderr if code else result.stdout
    assert (result.returncode, output[: len(begin.format(prog=f"{half}-distill"))]) == (
        code,
        begin.format(prog=f"{half}-distill"),
    )
    assert ("a framework was imported" in output) == (code == 1)


@pytest.mark.parametrize("half", MAINS)
def test_as_a_module_the_package_runs_its_commands(tmp_path: Path, half: str) -> None:
    result = python("", "-W", "ignore", "-m", f"{half}_distill", "validate-config", "no.yaml", cwd=tmp_path)
    expected = f"{half}-distill validate-config: cannot read no.yaml: No such file or directory"
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, expected)


@pytest.mark.parametrize("half", MAINS)
def test_another_module_that_imports_the_package_keeps_its_own_help(tmp_path: Path, half: str) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text(f"import {half}_distill\n")
    (tmp_path / "own" / "__main__.py").write_text("import sys\nprint('own help', sys.argv[1:])\n")
    result = python("", "-W", "ignore", "-m", "own", "--help", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "own help ['--help']\n"), result.stderr


@pytest.mark.parametrize("half", MAINS)
def test_the_help_of_every_command_explains_the_exit_codes(half: str, capsys: Capture) -> None:
    for words in HELP[half]:
        assert MAINS[half]([*words, "--help"]) == 0
        assert EXIT_CODES in " ".join(capsys.readouterr().out.split())


def test_the_help_of_cache_build_says_that_the_file_runs_code(capsys: Capture) -> None:
    assert MAINS["lightning"](["cache", "build", "--help"]) == 0
    assert "The file runs code" in " ".join(capsys.readouterr().out.split())


def loader_of(class_path: str, **init_args: Any) -> str:
    return yaml.safe_dump(
        {"distillation": {"train": {"dataloader": {"class_path": class_path, "init_args": init_args}}}}
    )


SIDE_EFFECT = "open('ran', 'w').close()\n"


@pytest.mark.parametrize("half", MAINS)
@pytest.mark.parametrize(
    ("class_path", "code"),
    [
        ("harmful.loader", 0),
        ("harmful.loadr", 2),
        ("harmful_package.inner.loader", 0),
        ("harmful_package.inner.loadr", 2),
        ("harmful_package.outer.loader", 2),
        ("harmful_package.imported", 0),
    ],
)
def test_validate_config_imports_nothing_that_the_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, half: str, class_path: str, code: int
) -> None:
    (tmp_path / "harmful_package").mkdir()
    for name in ("harmful.py", "harmful_package/__init__.py", "harmful_package/inner.py"):
        (tmp_path / name).write_text(
            f"{SIDE_EFFECT}from os.path import join as imported\n\ndef loader(rows=1):\n    {SIDE_EFFECT}"
        )
    (tmp_path / "config.yaml").write_text(loader_of(class_path))
    monkeypatch.chdir(tmp_path)
    assert MAINS[half](["validate-config", "config.yaml"]) == code
    assert not (tmp_path / "ran").exists()
    assert not [name for name in sys.modules if name.startswith("harmful")]
    out, error = capsys.readouterr()
    assert (out == "config.yaml: OK\n") == (code == 0)
    assert error.count("\n") == (code == 2)


@pytest.mark.parametrize("half", MAINS)
def test_validate_config_checks_that_the_settings_of_the_criterion_fit(
    tmp_path: Path, capsys: Capture, half: str
) -> None:
    name = "IntermediateLayersKnowledgeDistillationLoss"
    settings = {"layer_mappings": [["a", "b"], ["c", "d"]], "loss_types": ["MSE"]}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"distillation": {"train": {"criterion": {name: settings}}}}))
    assert MAINS[half](["validate-config", str(file)]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith(f"{file}: distillation.train.criterion.{name}: Expected `loss_types` to hold 2 entries")


NINE = ", ".join(f"k{index}: *{{0}}" for index in range(9))
EXPLOSION = "".join(
    f"a{level}: &a{level} {{{NINE.format(f'a{level - 1}') if level else 'k: x'}}}\n" for level in range(9)
).encode()
CHAIN = "".join(f"a{level}: &a{level} [{f'*a{level - 1}' if level else 1}]\n" for level in range(120)).encode()

BAD_YAML: dict[str, tuple[bytes, str]] = {
    "aliases that explode": (EXPLOSION, "Expected aliases to repeat at most 10000 values"),
    "an alias that contains itself": (b"model: &a {name: *a}\n", "but got one that contains itself, line 1"),
    "latin-1": ("model: {name: café}\n".encode("latin-1"), "UTF-8, but got the byte 0xe9 in line 1. Save it as UTF-8"),
    "keys that are numbers": (b"1: 2\n", "Expected the names of sections to be text, but got 1"),
    "keys that are numbers in a section": (b"model: {1: 2}\n", "Expected `model"),
    "a key twice": (
        b"model: {name: a, name: b}\n",
        "Expected each key once, but got 'name' twice in a mapping, line 1",
    ),
    "a deep nest": (b"model: " + b"[" * 100_000, "nested at most 100 deep"),
    "a deep nest of mappings": (b"model: " + b"{a: " * 100_000, "nested at most 100 deep"),
    "aliases that make a deep nest": (CHAIN, "nested at most 100 deep"),
    "a date that does not exist": (b"model: {name: 2024-13-45}\n", "a value that cannot be read"),
    "a Python object": (b"model: !!python/object/apply:os.getcwd []\n", "a YAML file, but got could not determine"),
    "two documents": (b"model: {}\n---\nmodel: {}\n", "a YAML file, but got expected a single document"),
    "an empty file": (b"", "a mapping of sections, but got an empty file"),
    "a list": (b"- 1\n", "a mapping of sections, but got a list"),
    "control characters": (b"model: {name: '\x1b[2J'}\n", "a YAML file, but got"),
    "an escaped control character as a key": (b'model: {"\\e]0;title\\a": 1}\n', "\\x1b]0;title\\x07"),
}


@pytest.mark.parametrize("half", MAINS)
@pytest.mark.parametrize("case", BAD_YAML)
def test_a_bad_yaml_file_is_one_line_that_names_it(tmp_path: Path, capsys: Capture, half: str, case: str) -> None:
    content, words = BAD_YAML[case]
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    commands = [["validate-config", str(file)]]
    if half == "lightning" and "section" not in case and "control" not in case:  # a build has other keys
        commands.append(["cache", "build", str(file)])
    for command in commands:
        assert MAINS[half](command) == 2
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1), error
        assert f"{file}: Expected" in error
        assert words in error
        assert "\x1b" not in error


@pytest.mark.parametrize("half", MAINS)
def test_a_missing_file_exits_1_in_every_command(tmp_path: Path, capsys: Capture, half: str) -> None:
    commands = [["validate-config"]]
    if half == "lightning":
        commands += [["fit", "--config"], ["cache", "build"], ["cache", "info"], ["cache", "verify"]]
    for command in commands:
        assert MAINS[half]([*command, str(tmp_path / "nowhere")]) == 1
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)
        assert "nowhere" in error


def test_names_from_a_cache_control_neither_the_terminal_nor_the_markup(tmp_path: Path, capsys: Capture) -> None:
    write_cache(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["teacher"]["class"] = "[/x][bold]N\x1b]0;title\x07\u202eet\n"
    manifest["layers"]["feature0"] = "[red]\x1b[2J|output"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert MAINS["lightning"](["cache", "info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert r"teacher [/x][bold]N\x1b]0;title\x07\u202eet\n" in printed
    assert r"[red]\x1b[2J" in printed
    assert "\x1b" not in printed


BUILDS: dict[str, tuple[dict[str, Any], str]] = {
    "a teacher that is a number": (
        {"teacher": {"class_path": "math.sqrt", "init_args": {}}},
        "`teacher` to be a class_path with init_args",
    ),
    "a teacher that is a dict": (
        {"teacher": {"class_path": "builtins.dict"}},
        "a torch.nn.Module, but got a dict",
    ),
    "a dataset that is a module": ({"dataset": {"class_path": "torch.nn.ReLU"}}, "to make a dataset with a length"),
    "a teacher that fails": (
        {"teacher": {"class_path": "torch.nn.Linear", "init_args": {"in_features": "x", "out_features": 1}}},
        "to be made by torch.nn.Linear, but that raised",
    ),
    "a class_path that is a list": ({"teacher": {"class_path": ["a"]}}, "`teacher` to be a class_path with init_args"),
    "init_args in a list": ({"teacher": {"class_path": "torch.nn.ReLU", "init_args": []}}, "to be a class_path"),
    "init_args with numbers for names": ({"teacher": {"class_path": "torch.nn.ReLU", "init_args": {1: 2}}}, "by names"),
    "a path that is a number": ({"path": 3}, "`path` to name a folder, but got path=3"),
    "top_k in words": ({"top_k": "3"}, "`top_k` to be null or a whole number from 1 to"),
    "layers in one word": ({"layers": "body"}, "`layers` to be a list of layer names"),
    "a batch_size of 0": ({"batch_size": 0}, "`batch_size` to be a whole number from 1 to"),
    "outputs of 1": ({"outputs": 1}, "`outputs` to be one of True, False, but got outputs=1"),
}


@pytest.mark.parametrize("case", BUILDS)
def test_a_build_that_cannot_be_right_is_one_line_before_it_begins(tmp_path: Path, capsys: Capture, case: str) -> None:
    changes, words = BUILDS[case]
    network = {"class_path": "cache_nets.network", "init_args": {"width": 8}}
    values = {"path": "cache", "teacher": network, "dataset": {"class_path": "cache_nets.table"}, **changes}
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(values))
    assert MAINS["lightning"](["cache", "build", str(tmp_path / "build.yaml")]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert words in error
    assert not (tmp_path / "cache").exists()


def test_a_build_finds_classes_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "my_build_network.py").write_text("import torch\n\ndef net():\n    return torch.nn.Linear(6, 2)\n")
    values = {
        "path": "cache",
        "teacher": {"class_path": "my_build_network.net"},
        "dataset": {"class_path": "cache_nets.table"},
    }
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert MAINS["lightning"](["cache", "build", "build.yaml"]) == 0
    assert sys.path == path
    assert (tmp_path / "cache" / "manifest.json").exists()


LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}}


@pytest.mark.filterwarnings("ignore:No seed found", "ignore:You defined a `validation_step`")
@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (None, "train_dataloader"),
        (
            {
                "class_path": "lightning_distill.FeatureDistillation",
                "init_args": {"student_layer": "layer9", "teacher_layer": "layer9"},
            },
            "layer9",
        ),
    ],
    ids=["no data", "a layer that does not exist"],
)
def test_an_error_that_fit_finds_in_a_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, terms: Any, words: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-distill"])
    (tmp_path / "data_of_two.py").write_text(
        "import torch\nfrom lightning.pytorch import LightningDataModule\n\n\nclass Data(LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        items = torch.utils.data.TensorDataset(torch.ones(2, 2), torch.zeros(2).long())\n"
        "        return torch.utils.data.DataLoader(items)\n"
    )
    monkeypatch.chdir(tmp_path)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    values = {
        "model": {
            "class_path": "lightning_distill.DistillModule",
            "init_args": {"student": LINEAR, "teacher": LINEAR, **({"terms": terms} if terms else {})},
        },
        "trainer": {"max_epochs": 1, **quiet},
        **({"data": {"class_path": "data_of_two.Data"}} if terms else {}),
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(values))
    assert MAINS["lightning"](["fit", "--config", "fit.yaml"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-distill fit: ")]
    assert len(errors) == 1
    assert words in errors[0]
