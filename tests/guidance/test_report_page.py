"""The page that a report consists of: structure, access without sight or mouse, size, nothing from outside."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from report_page import Page, contrast, mixed, themes
from results_folder import ALONE, EQUAL, write_folder, write_layers

from distill_core.guidance.report import write_report

SECTIONS = ["differences", "curves", "results", "calibration", "classes", "confusion", "examples", "layers"]
SECTIONS += ["costs", "next", "measured"]
REFERENCES = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
HOSTILE = "<script>alert('x')</script>&\"' onload=\x1b[2J\u202e"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = write_folder(tmp_path_factory.mktemp("results"), (ALONE, EQUAL, "soft targets", "noise"))
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_file_is_written_into_the_folder_or_where_the_user_wants(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "results", examples=50)
    assert write_report(str(folder)) == folder / "report.html"
    assert write_report(folder, tmp_path / "other.html") == tmp_path / "other.html"
    assert (tmp_path / "other.html").is_file()


def test_headings_are_in_order_and_every_section_has_one(page: Page) -> None:
    levels = [int(element.tag[1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1 == levels[0]
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    titles = {element.attributes.get("id"): element.content() for element in page.all("h2")}
    for section in page.all("section"):
        assert titles[section.attributes["aria-labelledby"]]


def test_the_verdict_comes_first_and_the_sections_follow(page: Page) -> None:
    assert [section.attributes["id"] for section in page.all("section")] == ["verdict", *SECTIONS]


def test_links_lead_to_elements_of_the_page(page: Page) -> None:
    names = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(names) == len(set(names))
    targets = [element.attributes["href"] for element in page.all("a")]
    assert targets[0] == "#main"
    assert {target.removeprefix("#") for target in targets} <= set(names)


def test_figures_and_pictures_have_names(page: Page) -> None:
    """A drawing in a row or a legend is hidden from screen readers: its numbers or its name stand beside it."""
    assert page.all("img")
    assert all(element.attributes["alt"] for element in page.all("img"))
    named = [element for element in page.all("svg") if element.attributes.get("role") == "img"]
    assert len(named) >= 8
    assert all(element.attributes["aria-label"] for element in named)
    for element in page.all("svg"):
        if element not in named:
            assert element.attributes["aria-hidden"] == "true"
            assert {"tr", "li"} & {ancestor.tag for ancestor in element.ancestors()}


def test_every_figure_has_a_table_in_its_section(page: Page) -> None:
    for figure in page.all("figure"):
        (section,) = [element for element in figure.ancestors() if element.tag == "section"]
        assert any(section in table.ancestors() for table in page.all("table"))


def test_tables_have_captions_and_their_headers_a_scope(page: Page) -> None:
    tables = page.all("table")
    assert all([child.tag for child in table.children] == ["caption", "thead", "tbody"] for table in tables)
    assert all(table.children[0].content() for table in tables)
    scopes = [element.attributes.get("scope") for element in page.all("th")]
    assert set(scopes) == {"col", "row"}
    for row in page.all("tr"):
        kinds = [cell.tag for cell in row.children]
        assert kinds in (["th"] * len(kinds), ["th", *["td"] * (len(kinds) - 1)])


def test_rows_have_as_many_cells_as_their_header(page: Page) -> None:
    for table in page.all("table"):
        rows = [row for row in page.all("tr") if table in row.ancestors()]
        assert len({len(row.children) for row in rows}) == 1


def test_wide_tables_can_be_scrolled_with_the_keyboard(page: Page) -> None:
    for table in page.all("table"):
        region = table.ancestors()[0].attributes
        assert (region["role"], region["tabindex"]) == ("region", "0")
        assert " ".join(region["aria-label"].split()) == table.children[0].content()


def test_the_page_has_a_language_a_title_and_a_width(page: Page) -> None:
    assert page.all("html")[0].attributes["lang"] == "en"
    assert page.all("title")[0].content()
    viewport = [element.attributes for element in page.all("meta") if element.attributes.get("name") == "viewport"]
    assert viewport[0]["content"] == "width=device-width, initial-scale=1"


def test_nothing_is_loaded_and_no_script_runs(page: Page) -> None:
    assert page.all("script", "link", "iframe", "object", "form") == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.source)
    references = [value for e in page.elements for name, value in e.attributes.items() if name in REFERENCES]
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in references)
    assert not [name for element in page.elements for name in element.attributes if name.startswith("on")]
    policy = [element.attributes["content"] for element in page.all("meta") if "http-equiv" in element.attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_text_has_enough_contrast_in_every_theme(page: Page) -> None:
    (style,) = page.all("style")
    light, dark, printed = themes(style.text)
    for theme in (light, dark, printed):
        for text in ("ink", "muted", "own"):
            for ground in ("page", "surface"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        assert contrast(theme["ink"], mixed(theme["own"], theme["page"], 0.45)) >= 4.5  # the strongest tint of a cell
        for shape in ("own", "base", "teacher", "better", "worse"):
            assert contrast(theme[shape], theme["page"]) >= 3, shape


def test_the_style_has_both_themes_print_and_a_visible_focus(page: Page) -> None:
    (style,) = page.all("style")
    for words in ("prefers-color-scheme: dark", "@media print", ":focus-visible", "max-width: 40rem"):
        assert words in style.text


def test_names_from_files_cannot_become_markup(tmp_path: Path) -> None:
    facts = {HOSTILE: HOSTILE}
    changes = {"command": HOSTILE, "commit": HOSTILE, "settings": facts, "machine": facts, "versions": facts}
    names = [f"{HOSTILE} {index}" for index in range(5)]
    folder = write_folder(tmp_path, (ALONE, HOSTILE), examples=60, names=names, **changes)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.all("script") == []
    assert not [name for element in page.elements for name in element.attributes if name.startswith("on")]
    assert "<script>alert('x')</script>" in page.words("differences")
    assert "\x1b" not in page.source
    assert "\u202e" not in page.source


def test_a_large_comparison_stays_under_two_megabytes(tmp_path: Path) -> None:
    methods = (ALONE, EQUAL, *(f"a method with a long name, number {index}" for index in range(18)))
    folder = write_folder(tmp_path, methods, 10, examples=200, samples=200, side=128, classes=100, epochs=300)
    write_layers(folder, 50, 50)
    path = write_report(folder)
    assert path.stat().st_size < 2e6
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.all("img")) >= 10
    assert len(page.all("figure")) == 20 + 3 + 1
