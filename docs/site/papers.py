"""The index of papers: from the table of all losses, and from papers.yaml, which has the titles and other papers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).resolve().parent
TABLE = HERE.parent / "losses.md"


class Row(NamedTuple):
    """A row of the table of all losses.

    Args:
        paper: Authors, year and number.
        loss: The class with its settings, as Markdown.
        recommended: The settings of the paper.
    """

    paper: str
    loss: str
    recommended: str

    @property
    def year(self) -> int:
        """The year of the paper."""
        return year(self.paper)

    @property
    def title(self) -> str:
        """The title of the paper; papers.yaml must have it."""
        return str(listed()["titles"][self.paper])


def year(paper: str) -> int:
    """The year of a paper.

    Raises:
        ValueError: If its text has none.
    """
    match = re.search(r"\b(?:19|20)\d\d\b", paper)
    if match is None:
        raise ValueError(f"Expected the year of {paper!r}.")
    return int(match[0])


@cache
def listed() -> dict[str, Any]:
    """The titles of the papers, and those on the way of training."""
    content: dict[str, Any] = yaml.safe_load((HERE / "papers.yaml").read_text(encoding="utf-8"))
    return content


@cache
def rows() -> tuple[Row, ...]:
    """The table of all losses, in its order."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| [^|]*\b(?:19|20)\d\d\b", line)
    ]
    return tuple(Row(paper, loss, recommended) for paper, loss, _, recommended in cells)


def papers_of(loss: str, strings: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a loss.

    Args:
        loss: Name of the class.
        strings: Names by which a term knows it, such as ``"mse"``.
    """
    names = (rf"`{loss}\(", *(f'`"{string}"`' for string in strings))
    return [row for row in rows() if any(re.match(name, row.loss) for name in names)]


def reference(paper: str) -> str:
    """A paper with a link to its text."""
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def papers(linked: Callable[[str], str]) -> str:
    """The page.

    Args:
        linked: Makes the first name of a loss in a text a link to its page.
    """
    entries = []
    for row in rows():
        settings = "" if row.recommended == "-" else f" Recommended: {row.recommended}."
        entries.append((row.year, f"- **{row.title}**, {reference(row.paper)}: {linked(row.loss)}.{settings}"))
    for other in listed()["training"]:
        page = "index.md" if other["page"].startswith("losses.md") else f"../guide/{other['page']}"
        page += "" if page != "index.md" else other["page"].removeprefix("losses.md")
        text = f"- **{other['title']}**, {reference(other['paper'])}: {other['use']}. [How to use it]({page})."
        entries.append((year(other["paper"]), text))
    lines = [
        "# Papers\n",
        "Each paper with the class that computes its loss, or the setting that trains like it, and the recommended"
        " numbers: those of the paper, of the authors' code (A), or of RepDistiller (R). The page of a loss has a whole"
        " program, and lists where the loss differs from its paper.\n",
    ]
    for number in sorted({year for year, _ in entries}):
        lines += [f"## {number}\n", *(text for entry_year, text in entries if entry_year == number), ""]
    return "\n".join(lines)
