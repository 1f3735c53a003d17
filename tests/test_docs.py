"""README.md and the pages in docs/ are true.

- Every ``python`` block of README.md runs by itself, copied into an empty folder.
- The ``python`` blocks of a page in docs/ run in order and share their names, in an empty folder.
- A block right after ``<!-- no-run: reason -->`` is not run.
- A ``yaml`` block right after ``<!-- file: name.yaml -->`` is written to that folder before anything runs.
- The block right after ``<!-- output: of this program -->`` is what the page prints, up to numbers, which depend on the
  machine; ``python docs/site/printed.py PAGE`` renews it.
- Links, make targets, commands and extras that a page names exist.
"""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from lightning_distill import losses

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOTE = re.compile(r"<!--\s*(no-run|file|output):\s*(.+?)\s*-->\s*\Z")


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the first line of the code, counted from 0
    note: tuple[str, str] | None  # ("no-run", reason), ("file", name) or ("output", ...)

    @property
    def runs(self) -> bool:
        return self.language == "python" and not (self.note and self.note[0] == "no-run")


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    blocks, text = [], page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        note = NOTE.search(text[: fence.start()])
        blocks.append(Block(fence[1], fence[2], text[: fence.start(2)].count("\n"), note and (note[1], note[2])))
    return blocks


def write_files(blocks: list[Block], folder: Path) -> None:
    for block in blocks:
        if block.note and block.note[0] == "file":
            (folder / block.note[1]).write_text(block.code, encoding="utf-8")


def without_numbers(text: str) -> list[str]:
    """The words of each line that is not empty; numbers and the lengths of rules depend on the machine."""
    words = re.sub(r"-{3,}", "---", re.sub(r"[-+]?\d+(?:\.\d+)?", "0", text))
    return [" ".join(line.split()) for line in words.splitlines() if line.strip()]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_readme_is_short_and_has_blocks_for_both_halves() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200
    code = [block.code for block in read_blocks(README) if block.runs]
    assert any("lightning_distill" in text for text in code)
    assert any("keras_distill" in text for text in code)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in read_blocks(README) if b.runs], ids=lambda b: f"line{b.line}")
def test_block_of_the_readme_runs_by_itself(block: Block, tmp_path: Path) -> None:
    (tmp_path / "copied.py").write_text(block.code, encoding="utf-8")
    command = [sys.executable, "copied.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # used by peft
@pytest.mark.parametrize("page", [p for p in PAGES[1:] if any(b.runs for b in read_blocks(p))], ids=names)
def test_blocks_of_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = read_blocks(page)
    write_files(blocks, tmp_path)
    program = ""
    for block in blocks:
        if block.runs:  # on the lines that it has in the page, so that a traceback shows them
            program += "\n" * (block.line - program.count("\n")) + block.code
    (tmp_path / "page.py").write_text(program, encoding="utf-8")
    module = ModuleType("page")  # a real module, so that classes defined in a block can be found and pickled
    monkeypatch.setitem(sys.modules, "page", module)
    exec(compile(program, str(tmp_path / "page.py"), "exec"), module.__dict__)
    printed = without_numbers(capsys.readouterr().out)
    for block in blocks:
        if block.note and block.note[0] == "output":
            shown = without_numbers(block.code)
            assert shown
            assert printed[: len(shown)] == shown


@pytest.mark.parametrize("page", [*PAGES, ROOT / "examples" / "README.md"], ids=names)
def test_links_of_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    for link in links:
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), f"{names(page)}: {link} does not exist"
        assert not anchor or anchor in anchors(target), f"{names(page)}: {link} has no such heading"


@pytest.mark.parametrize("page", PAGES[1:], ids=names)
def test_page_ends_with_links_to_the_next_pages(page: Path) -> None:
    _, heading, ending = page.read_text(encoding="utf-8").rpartition("\n## ")
    assert heading
    assert ending.startswith("Next\n")
    links = re.findall(r"\]\(([\w./]+\.\w+)(?:#[\w-]+)?\)", ending)
    assert links
    assert page.name not in links


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_cells_of_tables_are_short_enough_to_read(page: Path) -> None:
    lines = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    cells = [cell for line in lines if line.startswith("|") for cell in re.split(r"(?<!\\)\|", line)]
    assert [cell for cell in cells if len(cell.strip()) > 155] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "examples" / "README.md", ROOT / "CONTRIBUTING.md"], ids=names)
def test_tables_begin_with_a_head(page: Path) -> None:
    lines = ["", *FENCE.sub("", page.read_text(encoding="utf-8")).splitlines(), ""]
    for above, line, below in zip(lines, lines[1:], lines[2:], strict=False):
        begins = line.startswith("|") and not above.startswith("|")
        assert not begins or re.fullmatch(r"\|(-+\|)+", below), f"the table that begins with {line}"


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in PAGES[1:]} - {"index.md"}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_make_targets_extras_and_files_that_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z-]+):", makefile))
    named = set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", text))
    assert named <= targets, f"targets that the Makefile lacks: {sorted(named - targets)}"
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = {e for group in re.findall(r'pip install "[^"\[]*\[([\w,-]+)\]"', text) for e in group.split(",")}
    assert extras <= set(setup["options.extras_require"])
    for file in re.findall(r"`((?:examples|notebooks|tests|docs|benchmarks)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("quickstart_*.md")), ids=names)
def test_a_quickstart_is_a_program_from_its_installation_to_its_results(page: Path) -> None:
    blocks = read_blocks(page)
    assert blocks[0].language == "bash"
    assert blocks[0].code.startswith("pip install ")
    assert all(block.runs for block in blocks if block.language == "python")
    assert len([block for block in blocks if block.note and block.note[0] == "output"]) == 1
    landing = (ROOT / "docs" / "site" / "landing.md").read_text(encoding="utf-8")
    assert f":link: guide/{page.stem}\n" in landing


def test_every_loss_has_a_row_with_its_paper_and_its_setting() -> None:
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    listed = {name for _, loss, *_ in table for name in re.findall(r"`(\w+)\(", loss)}
    # The base class, and the class of the strings.
    assert set(losses.__all__) - {"DistillationLoss", "FeatureDistance"} == listed
    strings = {name for _, loss, *_ in table for name in re.findall(r"`\"(\w+)\"`", loss)}
    assert {"mse", "l1", "smooth_l1", "cosine", "kl"} <= strings
    assert f"{len(listed)} losses" in README.read_text(encoding="utf-8")
