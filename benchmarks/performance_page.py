"""docs/performance.md, written from the records of the benchmarks: ``python -m benchmarks.performance_page``."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.performance import records, tables

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
TEMPLATE = Path(__file__).parent / "performance" / "page.jinja"


def page(folder: Path = records.RECORDS) -> str:
    """The page.

    Args:
        folder: The folder of the records, a file ``<benchmark>.json`` for each. Sections without a record say how to
            make it.
    """
    known = records.read_records(folder)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    functions = {name: function for module in (records, tables) for name, function in vars(module).items()}
    text = environment.get_template(TEMPLATE.name).render({**functions, "records": known})
    return "\n\n".join(map(wrapped, re.split(r"\n{2,}", text.strip()))) + "\n"


def wrapped(paragraph: str) -> str:
    """A paragraph of Markdown in lines of equal width; tables, lists, headings and code as they are."""
    if paragraph.startswith(("|", "-", "#", "<!--", "```")):
        return paragraph
    words = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), " ".join(paragraph.split()))  # code stays whole
    return textwrap.fill(words, 130, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def write(folder: Path = records.RECORDS) -> None:
    """Write the page from the records in a folder."""
    PAGE.write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    write()
