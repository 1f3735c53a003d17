"""Every notebook runs offline from top to bottom, and shows in its file the outputs that an execution gives.

Run `make notebooks-write` after a change of a notebook or of what it shows: it stores the outputs in the files.
"""

from __future__ import annotations

import ast
import base64
import math
import re
import socket
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from notebook_outputs import NOTEBOOKS, ROOT, execute, printed, tidied

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
# Details of a computer or a moment: paths, addresses in memory, durations, Lightning's banner.
MACHINE = {
    "a path": re.compile(r"(?:^|[\s'\"(=])(?:~|[A-Za-z]:\\|/\w+/)", re.MULTILINE),
    "an address": re.compile(r"0x[0-9a-f]{6,}"),
    "a duration": re.compile(r"\d ?(?:s|ms|seconds?|minutes?|it/s)\b|\d:\d\d:\d\d"),
    "the host's name": re.compile(rf"\b{re.escape(socket.gethostname())}\b"),
    "a banner or a warning": re.compile(r"GPU available|TPU available|Tip:|litlogger|Warning|WARNING|Seed set"),
}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def stored(path: Path) -> NotebookNode:
    """The notebook as its file has it."""
    return nbformat.read(path, as_version=4)


def differences(expected: str, actual: str) -> list[str]:
    """The lines that differ in their words, or in a number by more than another processor's rounding may cause."""
    expected_lines, actual_lines = expected.splitlines(), actual.splitlines()
    different = [f"{len(expected_lines)} lines are stored, {len(actual_lines)} were printed"]
    if len(expected_lines) == len(actual_lines):
        different.clear()
    for old, new in zip(expected_lines, actual_lines, strict=False):
        same_words = NUMBER.sub("#", old).split() == NUMBER.sub("#", new).split()
        numbers = zip(NUMBER.findall(old), NUMBER.findall(new), strict=False)
        if not same_words or not all(math.isclose(float(a), float(b), rel_tol=0.05, abs_tol=0.05) for a, b in numbers):
            different.append(f"stored: {old!r}, printed: {new!r}")
    return different


def test_the_notebooks_exist() -> None:
    names = ["keras_quickstart", "language_model", "lightning_quickstart", "teacher_cache"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.slow
@each_notebook
def test_notebook_gives_the_stored_outputs_and_leaves_no_files(path: Path, tmp_path: Path) -> None:
    executed = execute(path, tmp_path)
    for before, after in zip(code_cells(stored(path)), code_cells(executed), strict=True):
        assert differences(printed(before), printed(after)) == [], after.source
        assert [o.output_type for o in before.outputs] == [o.output_type for o in after.outputs], after.source
    assert list((tmp_path / "reader").iterdir()) == []
    assert list((tmp_path / "temporary").iterdir()) == []


@each_notebook
def test_stored_outputs_are_those_of_one_execution(path: Path) -> None:
    cells = code_cells(stored(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {"ExecuteTime", "execution"} & {key for cell in cells for key in cell.metadata} == set()
    assert set(stored(path).metadata.language_info) == {"name"}


@each_notebook
def test_stored_outputs_have_pictures_and_no_warnings(path: Path) -> None:
    outputs = [output for cell in code_cells(stored(path)) for output in cell.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    assert all(base64.b64decode(picture).startswith(b"\x89PNG\r\n\x1a\n") for picture in pictures)


@each_notebook
def test_stored_outputs_tell_nothing_about_a_computer(path: Path) -> None:
    details = [
        f"{kind}: {line}"
        for cell in code_cells(stored(path))
        for line in printed(cell).splitlines()
        for kind, pattern in MACHINE.items()
        if pattern.search(line)
    ]
    assert details == []


@each_notebook
def test_notebook_is_smaller_than_400_kb(path: Path) -> None:
    assert path.stat().st_size < 400_000


@each_notebook
def test_the_first_code_cell_installs_nothing_until_the_reader_asks_for_it(path: Path) -> None:
    source = code_cells(stored(path))[0].source
    assert re.fullmatch(r'# %pip install "\.\.\[[\w,]+\]"', source)
    assert ast.parse(source).body == []


@each_notebook
def test_links_to_other_notebooks_work(path: Path) -> None:
    text = "".join(cell.source for cell in stored(path).cells if cell.cell_type == "markdown")
    linked = re.findall(r"\]\((\w+\.ipynb)\)", text)
    assert linked
    assert [name for name in linked if not (ROOT / "notebooks" / name).is_file()] == []


@pytest.mark.parametrize(
    ("new", "same"),
    [
        ("accuracy 0.960", True),
        ("accuracy 0.931", True),
        ("accuracy 0.80", False),
        ("agreement 0.953", False),
        ("accuracy 0.953\nmore", False),
    ],
)
def test_numbers_may_differ_by_rounding_and_words_may_not(new: str, same: bool) -> None:
    assert (differences("accuracy 0.953\n", new) == []) == same


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("saved in /home/somebody/student.pt", "a path"),
        (r"C:\Users\somebody", "a path"),
        ("<Handle at 0x7fed8bbe7a50>", "an address"),
        ("done in 3.2 s", "a duration"),
        ("12.5it/s", "a duration"),
        ("GPU available: False, used: False", "a banner or a warning"),
    ],
)
def test_details_of_a_computer_are_recognised(line: str, kind: str) -> None:
    assert MACHINE[kind].search(line)


def test_tensorflows_greeting_is_removed_and_a_warning_is_not() -> None:
    text = "WARNING: All log messages before absl::InitializeLog() is called\nI0000 00:00:1 cudart_stub.cc\n"
    outputs = [nbformat.v4.new_output("stream", name="stderr", text=text + more) for more in ("", "UserWarning: x\n")]
    assert [output.text for output in tidied(outputs)] == ["UserWarning: x\n"]
