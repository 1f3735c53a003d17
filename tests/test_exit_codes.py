"""Both command lines through the same mistakes: equal exit codes, equal words, one line each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import distill_core.cli.keras
import distill_core.cli.lightning
from distill_core.cli import SHOW_TRACEBACK

Capture = pytest.CaptureFixture[str]
Main = Callable[[Sequence[str]], int]
MAINS: dict[str, Main] = {"lightning": distill_core.cli.lightning.main, "keras": distill_core.cli.keras.main}

# words, exit code, words of the one line; {output} and {source} are the forms of each half
BOTH: dict[str, tuple[list[str], int, str]] = {
    "no command": ([], 2, "the following arguments are required: command"),
    "an unknown command": (["train"], 2, "invalid choice: 'train'"),
    "an unknown option": (["--quiet", "demo"], 2, "unrecognized arguments: --quiet"),
    "demo: an unknown option": (["demo", "--fast"], 2, "unrecognized arguments: --fast"),
    "demo: a wrong number": (["demo", "--seeds", "0"], 2, "Expected a whole number, 1 or more, but got '0'"),
    "demo: a missing value": (["demo", "--seeds"], 2, "expected one argument"),
    "demo: extra words": (["demo", "now"], 2, "unrecognized arguments: now"),
    "demo: a folder that is a file": (["demo", "--quick", "--output", "file"], 1, "cannot write file: File exists"),
    "validate-config: no file": (["validate-config"], 2, "the following arguments are required: FILE"),
    "validate-config: a missing file": (["validate-config", "no.yaml"], 1, "cannot read no.yaml: No such file or dir"),
    "validate-config: a folder": (["validate-config", "folder"], 1, "cannot read folder: Is a directory"),
    "validate-config: extra words": (["validate-config", "file", "x"], 2, "unrecognized arguments: x"),
    "validate-config: bad YAML": (["validate-config", "bad.yaml"], 2, "bad.yaml: Expected a YAML file, but got"),
    "validate-config: a wrong key": (
        ["validate-config", "key.yaml"],
        2,
        "key.yaml: Expected `modell` to be a known key",
    ),
    "export: no output": (["export", "x"], 2, "the following arguments are required: OUTPUT"),
    "export: a missing file": (["export", "no{source}", "x{output}"], 1, "cannot read no{source}: No such file or dir"),
    "export: a folder": (["export", "folder", "x{output}"], 1, "cannot read folder: Is a directory"),
    "export: a wrong file": (["export", "bad.yaml", "x{output}"], 2, "bad.yaml"),
    "export: an unknown form": (["export", "bad.yaml", "x.pb"], 2, "Expected OUTPUT to end with one of"),
    "export: onto a folder": (["export", "bad.yaml", "folder{output}"], 2, "but got the folder 'folder{output}'"),
    "export: onto itself": (["export", "same{output}", "same{output}"], 2, "Expected OUTPUT to be another file"),
    "report: no folder": (["report"], 2, "the following arguments are required: FOLDER"),
    "report: a missing folder": (["report", "no"], 2, "but got 'no', which is not a folder. Pass the folder that"),
    "report: a folder of other things": (["report", "folder"], 2, "but got 'folder', without comparison.json."),
    "report: a wrong file": (["report", "results"], 2, "comparison.json to hold JSON, but got Expecting"),
    "completion: no shell": (["completion"], 2, "the following arguments are required: shell"),
    "completion: an unknown shell": (["completion", "csh"], 2, "invalid choice: 'csh'"),
}
FORMS = {"lightning": {"source": ".ckpt", "output": ".pt"}, "keras": {"source": ".keras", "output": ".keras"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with wrong files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(SHOW_TRACEBACK, raising=False)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "bad.yaml").write_text("model: [")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "comparison.json").write_text("model: [")
    (tmp_path / "key.yaml").write_text("modell: {name: x}")
    for name in ("folder", "folder.pt", "folder.keras"):
        (tmp_path / name).mkdir()
    for name in ("same.pt", "same.keras"):
        (tmp_path / name).write_text("x")
    return tmp_path


@pytest.mark.parametrize("half", MAINS)
@pytest.mark.parametrize("mistake", BOTH)
def test_a_mistake_has_the_same_exit_code_and_words_in_both_halves(
    folder: Path, capsys: Capture, half: str, mistake: str
) -> None:
    words, code, message = BOTH[mistake]
    assert MAINS[half]([word.format(**FORMS[half]) for word in words]) == code
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1), error
    assert error.startswith((f"{half}-distill", *(word for word in words if word.endswith(".yaml"))))
    assert message.format(**FORMS[half]) in error
    assert not (code == 2 and ": error:" in error)


LIGHTNING: dict[str, tuple[list[str], int, str]] = {
    "fit: nothing": (["fit"], 2, "the following arguments are required: --model"),
    "fit: a missing value": (["fit", "--config"], 2, "expected"),
    "fit: a missing file": (["fit", "--config", "no.yaml"], 1, "cannot read no.yaml: No such file or directory"),
    "fit: a folder": (["fit", "-c", "folder"], 1, "cannot read folder: Is a directory"),
    "fit: bad YAML": (["fit", "--config=bad.yaml"], 2, "bad.yaml: Expected a YAML file, but got"),
    "fit: a wrong key": (["fit", "--config", "key.yaml"], 2, "key.yaml: modell: Expected a section of the file"),
    "fit: an unknown option": (["fit", "--no_such", "1"], 2, "no_such"),
    "cache: no action": (["cache"], 2, "the following arguments are required: action"),
    "cache build: a missing file": (["cache", "build", "no.yaml"], 1, "no.yaml: No such file or directory"),
    "cache build: bad YAML": (["cache", "build", "bad.yaml"], 2, "bad.yaml: Expected a YAML file, but got"),
    "cache build: a wrong key": (["cache", "build", "key.yaml"], 2, "key.yaml: Expected `modell` to be a known key"),
    "cache info: a missing folder": (["cache", "info", "nowhere"], 1, "nowhere"),
    "cache verify: a folder of other things": (["cache", "verify", "folder"], 1, "folder"),
    "export: a graph without a network": (["export", "x.ckpt", "x.onnx"], 2, "Expected --input-shape, and --model or"),
    "export: a wrong shape": (
        ["export", "x.ckpt", "x.pt2", "--model", "torch.nn.ReLU", "--input-shape", "3,N"],
        2,
        "Expected --input-shape to be numbers",
    ),
    "export: two networks": (["export", "a", "b.pt", "--model", "x", "--config", "y"], 2, "not allowed with argument"),
}


@pytest.mark.parametrize("mistake", LIGHTNING)
def test_a_mistake_in_the_lightning_half_is_one_line_with_its_exit_code(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-distill"])
    words, code, message = LIGHTNING[mistake]
    assert MAINS["lightning"](words) == code
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1), error
    assert error.startswith("lightning-distill")
    assert message in error


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("half", MAINS)
def test_a_folder_that_may_not_be_written_is_one_line(folder: Path, capsys: Capture, half: str) -> None:
    (folder / "locked").mkdir(mode=0o500)
    assert MAINS[half](["demo", "--quick", "--output", "locked/demo"]) == 1
    assert "cannot write locked/demo: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("half", MAINS)
def test_the_environment_can_ask_for_the_traceback(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    monkeypatch.setenv(SHOW_TRACEBACK, "1")
    assert MAINS[half](["validate-config", "no.yaml"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith(f"{half}-distill validate-config: cannot read no.yaml")


@pytest.mark.parametrize("half", MAINS)
@pytest.mark.parametrize("command", [["demo"], ["validate-config"], ["export"], ["completion"], []])
def test_the_help_has_an_example_that_names_the_program(capsys: Capture, half: str, command: list[str]) -> None:
    assert MAINS[half]([*command, "--help"]) == 0
    example = capsys.readouterr().out.split("example:\n")[1]
    assert f"{half}-distill {' '.join(command)}".strip() in example
