"""A report as a browser reads it: elements, headings, names and references, without a browser."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "line", "rect", "circle", "path"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def ancestors(self) -> list[Element]:
        return [] if self.parent is None else [self.parent, *self.parent.ancestors()]

    def content(self) -> str:
        """The text of the element, with single spaces."""
        return " ".join((self.text + " " + " ".join(child.content() for child in self.children)).split())


class Page(HTMLParser):
    """The elements of a page; unbalanced tags are refused."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        parent = self._open[-1] if self._open else None
        element = Element(tag, {name: value or "" for name, value in attrs}, parent)
        self.elements.append(element)
        if parent is not None:
            parent.children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1].text += data

    def all(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]

    def section(self, name: str) -> Element:
        (element,) = [element for element in self.all("section") if element.attributes["id"] == name]
        return element

    def words(self, name: str | None = None) -> str:
        """The visible text of the page or of a section."""
        if name is not None:
            return self.section(name).content().replace("\N{NO-BREAK SPACE}", " ")
        (body,) = self.all("body")
        return body.content().replace("\N{NO-BREAK SPACE}", " ")

    def rows(self, section: str) -> list[list[str]]:
        """The cells of all tables of a section, without drawings."""
        inside = [row for row in self.all("tr") if self.section(section) in row.ancestors()]
        cells = [[cell for cell in row.children if cell.attributes.get("class") != "chart"] for row in inside]
        return [[cell.content().replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in cells]


def contrast(first: str, second: str) -> float:
    """The contrast of two colours like #1b1f24, from 1 to 21 (WCAG 2.2)."""
    brighter, darker = sorted(map(luminance, (first, second)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(factor * part for factor, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def mixed(color: str, other: str, share: float) -> str:
    """A colour with a share of it over another, as CSS mixes them in sRGB."""
    parts = [
        round(share * int(color[place : place + 2], 16) + (1 - share) * int(other[place : place + 2], 16))
        for place in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02x}" for part in parts)


def themes(style: str) -> list[dict[str, str]]:
    """The colours of each theme: light, dark, print."""
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks]
