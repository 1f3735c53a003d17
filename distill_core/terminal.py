"""Text for the terminal: text from a file cannot control it."""

from __future__ import annotations

import unicodedata
from typing import Any, TextIO


def printable(text: Any) -> str:
    r"""Text in which every character that is not visible is written as an escape.

    Control characters (line ends, tabs, ESC with its sequences) are replaced, and so are characters that change the
    direction or the joining of others. A name from a file is therefore printed on one line and cannot hide anything.

    Args:
        text: The text; other objects are turned into text first.

    Returns:
        The text, of printable characters only.

    Example:
        >>> print(printable("a\x1b[2Jb\n\u202ec"))
        a\x1b[2Jb\n\u202ec
    """
    return "".join(character if _visible(character) else _escaped(character) for character in str(text))


def one_line(text: Any) -> str:
    r"""Text on one line: spaces for line ends, escapes for everything else that is not visible.

    Args:
        text: The text, or an exception.

    Returns:
        The line.

    Example:
        >>> print(one_line("first\n  second\x07"))
        first second\x07
    """
    return printable(" ".join(str(text).split()))


def write_line(stream: TextIO, text: Any) -> None:
    """Write text that may come from a file as one line, in any encoding of the stream.

    Args:
        stream: The stream to write to.
        text: The text.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")


def short(value: Any) -> str:
    """A value as at most 80 characters: its ``repr``, or the message of an exception.

    Example:
        >>> short("dtype"), len(short("x" * 1000))
        ("'dtype'", 80)
    """
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _visible(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
