"""The command `report` of both command lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from results_folder import write_folder

import distill_core.cli.keras
import distill_core.cli.lightning

MAINS = {"lightning": distill_core.cli.lightning.main, "keras": distill_core.cli.keras.main}
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_folder(tmp_path / "results", examples=30)


@pytest.mark.parametrize("half", MAINS)
def test_the_command_writes_the_file_and_names_it(folder: Path, capsys: Capture, half: str) -> None:
    assert MAINS[half](["report", "results"]) == 0
    size = (folder / "report.html").stat().st_size
    assert capsys.readouterr().out == f"results/report.html: {size:,} bytes\n"


@pytest.mark.parametrize("half", MAINS)
def test_the_file_may_have_another_name(folder: Path, half: str) -> None:
    assert MAINS[half](["report", "results", "--output", "other.html"]) == 0
    assert Path("other.html").is_file()
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("half", MAINS)
def test_a_file_that_cannot_be_written_is_named(folder: Path, capsys: Capture, half: str) -> None:
    assert MAINS[half](["report", "results", "--output", "no/other.html"]) == 1
    assert capsys.readouterr().err == f"{half}-distill report: cannot write no/other.html: No such file or directory\n"


@pytest.mark.parametrize("half", MAINS)
def test_a_folder_in_the_place_of_the_file_is_named(folder: Path, capsys: Capture, half: str) -> None:
    (folder / "report.html").mkdir()
    assert MAINS[half](["report", "results"]) == 1
    assert capsys.readouterr().err == f"{half}-distill report: cannot write results/report.html: Is a directory\n"


@pytest.mark.parametrize("half", MAINS)
def test_without_jinja2_the_command_says_how_to_install_it(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert MAINS[half](["report", "results"]) == 1
    assert "The report needs jinja2, which is not installed. Install it with: pip install" in capsys.readouterr().err
