"""Reading of YAML files that may come from an untrusted source."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any, Final

from distill_core.checks import message
from distill_core.terminal import one_line

# Values that aliases may repeat, over the whole file: no configuration needs more.
_MOST_REPEATED: Final = 10_000
_DEEPEST: Final = 100


def read_yaml(path: str | PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file.

    The file must be UTF-8. Aliases may repeat a limited number of values and must not contain themselves. Tags never
    create Python objects.

    Args:
        path: The file.

    Returns:
        The mapping.

    Raises:
        ValueError: If the file is not such a file; the message is one line that begins with the path.
        OSError: If the file cannot be read.
        ModuleNotFoundError: If PyYAML is not installed.
    """
    import yaml  # imported late: only files need it

    file = Path(path)
    text = _decoded(file.read_bytes(), file)
    try:
        loader = yaml.SafeLoader(text)
        _limit_depth(loader)
        try:
            node = loader.get_single_node()
            if node is not None:
                _Check(yaml).tree(node)
            values = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except _RefusedError as error:
        raise ValueError(f"{file}: {error}") from None
    except yaml.YAMLError as error:
        raise _refused(file, "a YAML file", one_line(error)) from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, ArithmeticError) as error:
        # raised by the constructors of dates and numbers for malformed text
        raise _refused(file, "a YAML file", f"a value that cannot be read ({one_line(error)})") from None
    if not isinstance(values, dict):
        got = "an empty file" if values is None else f"a {type(values).__name__}"
        raise _refused(file, "a mapping of sections", got)
    if wrong := [key for key in values if not isinstance(key, str)]:
        raise _refused(file, "the names of sections to be text", f"{wrong[0]!r}")
    return values


class _RefusedError(Exception):
    """The nodes of a file break a rule; the message says which."""


def _limit_depth(loader: Any) -> None:
    """Make a loader refuse deep nesting while it parses, because its time grows with the square of the depth."""
    compose, depth = loader.compose_node, 0

    def limited(parent: Any, index: Any) -> Any:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise _RefusedError(_too_deep())
        try:
            return compose(parent, index)
        finally:
            depth -= 1

    loader.compose_node = limited


def _too_deep() -> str:
    return f"Expected values to be nested at most {_DEEPEST} deep, but they are nested deeper."


class _Check:
    """Walks the nodes of a YAML file before anything is made of them.

    Args:
        yaml: The package.
    """

    def __init__(self, yaml: Any) -> None:
        self._yaml = yaml
        self._done: dict[int, tuple[int, int]] = {}  # size and depth of each finished node, aliases expanded
        self._open: set[int] = set()
        self._repeated = 0

    def tree(self, node: Any) -> tuple[int, int]:
        """Number of values in a node, and their depth, with aliases expanded.

        Raises:
            _RefusedError: If aliases repeat too many values or contain themselves, values are nested too deeply, or a
                key occurs twice.
        """
        if id(node) in self._open:
            raise _RefusedError(f"Expected aliases of earlier values, but got one that contains itself, {_line(node)}.")
        if id(node) in self._done:  # an alias
            self._repeated += self._done[id(node)][0]
            if self._repeated > _MOST_REPEATED:
                raise _RefusedError(
                    f"Expected aliases to repeat at most {_MOST_REPEATED} values, but they repeat more,"
                    f" {_line(node)}. Write the values out."
                )
            return self._done[id(node)]
        self._open.add(id(node))
        children: list[Any] = []
        if isinstance(node, self._yaml.ScalarNode):
            _check_decimal(node)
        if isinstance(node, self._yaml.MappingNode):
            self._unique(node)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, self._yaml.SequenceNode):
            children = node.value
        parts = [self.tree(child) for child in children]
        size, depth = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
        if depth > _DEEPEST:
            raise _RefusedError(_too_deep())
        self._open.remove(id(node))
        self._done[id(node)] = size, depth
        return size, depth

    def _unique(self, node: Any) -> None:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, self._yaml.ScalarNode):
                continue
            if (key.tag, key.value) in keys:
                raise _RefusedError(f"Expected each key once, but got {key.value!r} twice in a mapping, {_line(key)}.")
            keys.add((key.tag, key.value))


def _check_decimal(node: Any) -> None:
    """Raise if a number is written so that YAML reads another one: 010 as octal 8, and 1:30 as 90."""
    is_number = node.style is None and node.tag.endswith((":int", ":float"))
    if is_number and (":" in node.value or re.match(r"[-+]?0[0-9_]", node.value)):
        raise _RefusedError(
            f"Expected numbers without a leading 0 or a colon, which YAML reads as octal or as minutes, but got"
            f" {node.value}, {_line(node)}. Write another form of the number, or put text in quotes."
        )


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"


def _decoded(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        got = f"the byte 0x{content[error.start]:02x} in line {line}"
        raise _refused(file, "a YAML file in UTF-8", got, "Save it as UTF-8.") from None


def _refused(file: Path, expected: str, got: str, remedy: str = "") -> ValueError:
    return ValueError(f"{file}: {message(expected, got, remedy)}")
