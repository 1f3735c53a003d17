"""The command line: help, version, bad usage, missing extras."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distill_core.cli.keras import main
from keras_distill import __version__

Capture = pytest.CaptureFixture[str]


def test_help_lists_the_demo(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    assert "demo" in capsys.readouterr().out


def test_help_of_the_demo_names_its_options_and_their_defaults(capsys: Capture) -> None:
    assert main(["demo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--output DIR", "demo_output/keras", "--seeds N", "(5)", "--quick"))


def test_version_is_that_of_the_package(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"keras-distill {__version__}\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "command"),
        (["train"], "'train'"),
        (["demo", "--fast"], "--fast"),
        (["demo", "--seeds", "0"], "but got '0'"),
        (["demo", "--seeds", "two"], "but got 'two'"),
    ],
)
def test_bad_usage_exits_2_with_one_line_that_names_it(capsys: Capture, words: list[str], named: str) -> None:
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("keras-distill")
    assert error.count("\n") == 1
    assert named in error
    assert "--help`" in error


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_a_missing_package_is_one_line_with_the_command(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # how Python marks a module that cannot be imported
    assert main(["demo", "--quick"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"The demo needs {package}, which is not installed. Install it with: pip install" in error


def test_an_output_folder_that_cannot_be_made_is_one_line_before_any_training(capsys: Capture, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert main(["demo", "--quick", "--output", str(taken)]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert str(taken) in error
