"""Every block of README.md does what it says.

- A ``python`` block is run. The blocks of one section (up to the next ``##`` heading) are run in order and share their
  names; every section starts afresh, in an empty folder.
- A block right after ``<!-- no-run: reason -->`` is not run.
- A ``yaml`` block right after ``<!-- file: name.yaml -->`` is written to that folder before anything runs.
- A ``make`` target named in a ``bash`` block exists.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from lightning_distill import losses

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOTE = re.compile(r"<!--\s*(no-run|file):\s*(.+?)\s*-->\s*\Z")


class Block(NamedTuple):
    section: str
    language: str
    code: str
    line: int  # of the first line of the code, counted from 0
    note: tuple[str, str] | None  # ("no-run", reason) or ("file", name)


def read_blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, in order."""
    blocks = []
    for fence in FENCE.finditer(text):
        before = FENCE.sub("", text[: fence.start()])  # a comment in code is no heading
        headings = re.findall(r"^##? (.+)$", before, re.MULTILINE)
        note = NOTE.search(text[: fence.start()])
        line = text[: fence.start(2)].count("\n")
        blocks.append(Block(headings[-1] if headings else "top", fence[1], fence[2], line, note and (note[1], note[2])))
    return blocks


BLOCKS = read_blocks(README.read_text(encoding="utf-8")) if README.is_file() else []
RUNNABLE = [b for b in BLOCKS if b.language == "python" and not (b.note and b.note[0] == "no-run")]


def test_readme_has_python_blocks_that_are_run() -> None:
    assert RUNNABLE


@pytest.mark.slow
@pytest.mark.parametrize("section", dict.fromkeys(block.section for block in RUNNABLE))
def test_python_blocks_of_section_run(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        if block.language == "yaml" and block.note and block.note[0] == "file":
            Path(block.note[1]).write_text(block.code, encoding="utf-8")
    module = ModuleType("readme")  # a real module, so that classes defined in a block can be found and pickled
    monkeypatch.setitem(sys.modules, "readme", module)
    for block in RUNNABLE:
        if block.section == section:
            padding = "\n" * block.line  # a traceback then shows the line of the README
            exec(compile(padding + block.code, str(README), "exec"), module.__dict__)


def test_make_targets_in_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {t for b in BLOCKS if b.language == "bash" for t in re.findall(r"^make ([a-z]+)", b.code, re.MULTILINE)}
    assert named <= targets, f"README.md names make targets that do not exist: {sorted(named - targets)}"


def test_every_loss_has_a_row_with_its_paper_and_its_setting() -> None:
    table = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for _, loss, *_ in table for name in re.findall(r"`(\w+)\(", loss)}
    single = {"DistillationLoss", "FeatureDistance"}  # the base class, and what the strings stand for
    assert set(losses.__all__) - single <= named
    strings = {name for _, loss, *_ in table for name in re.findall(r"`\"(\w+)\"`", loss)}
    assert {"mse", "l1", "smooth_l1", "cosine", "kl"} <= strings
