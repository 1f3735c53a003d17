"""Checks of user arguments; each error names the expectation, the value received and a remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def about_teacher(number: int, count: int) -> Iterator[None]:
    """Say in an error which of several teachers it is about.

    Args:
        number: The teacher's number, from 0.
        count: Number of teachers; errors about a single one stay as they are.

    Raises:
        ValueError: If the body raises one.
    """
    try:
        yield
    except ValueError as error:
        if count < 2 or type(error) is not ValueError:
            raise
        text = str(error).removesuffix(".")
        raise ValueError(f"{text}. This is about teacher {number} of {count}, counted from 0.") from error


def message(expected: str, got: str, remedy: str = "") -> str:
    """The text of an error.

    Args:
        expected: The expectation, which begins with the argument's name.
        got: The value that was passed.
        remedy: A sentence that says what to do, or an empty string.

    Returns:
        The whole message.

    Example:
        >>> message("`p` to be at least 1", "p=0.5", "Take 2.")
        'Expected `p` to be at least 1, but got p=0.5. Take 2.'
    """
    return f"Expected {expected}, but got {got}. {remedy}".rstrip()


class Checks:
    """Checks of settings.

    Args:
        message: Function that makes an error's text from the expectation, the value passed, and an optional remedy.
        shown: Maximum number of names that an error lists.
    """

    def __init__(self, message: Callable[..., str] = message, *, shown: int = 5) -> None:
        self.message, self._shown = message, shown

    def number(self, name: str, value: Any) -> None:
        """Check that a setting is a finite int or float, NumPy's among them; a bool is neither.

        Args:
            name: Name of the argument, for the message.
            value: The user's value.

        Raises:
            TypeError: If the value is not an int or a float.
            ValueError: If the value is NaN or infinite.

        Example:
            >>> Checks().number("weight", True)
            Traceback (most recent call last):
            TypeError: Expected `weight` to be an int or a float, but got weight=True.
        """
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(self.message(f"`{name}` to be an int or a float", f"{name}={value!r}"))
        # Not math.isfinite: torch.compile turns a temperature that changes into a symbol, which it can only compare.
        if not -math.inf < value < math.inf:  # type: ignore[operator]
            raise ValueError(self.message(f"`{name}` to be finite", f"{name}={value!r}"))

    def integer(self, name: str, value: Any) -> None:
        """Check that a setting is an int, NumPy's among them; a bool is not.

        Args:
            name: Name of the argument, for the message.
            value: The user's value.

        Raises:
            TypeError: If the value is not an int.

        Example:
            >>> Checks().integer("ignore_index", 2.0)
            Traceback (most recent call last):
            TypeError: Expected `ignore_index` to be an int, but got ignore_index=2.0.
        """
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(self.message(f"`{name}` to be an int", f"{name}={value!r}"))

    def positive(self, name: str, value: Any) -> None:
        """Check that a setting is a finite number greater than 0.

        Args:
            name: Name of the argument, for the message.
            value: The user's value.

        Raises:
            TypeError: If the value is not an int or a float.
            ValueError: If the value is not finite or not greater than 0.

        Example:
            >>> Checks().positive("temperature", 0.0)
            Traceback (most recent call last):
            ValueError: Expected `temperature` to be greater than 0, but got temperature=0.0.
        """
        self.number(name, value)
        if value <= 0:
            raise ValueError(self.message(f"`{name}` to be greater than 0", f"{name}={value!r}"))

    def positives(self, name: str, value: Any) -> None:
        """Check that a setting is a list or tuple of finite numbers greater than 0, and not empty.

        Args:
            name: Name of the argument, for the message.
            value: The user's value.

        Raises:
            TypeError: If the value is not a list or a tuple, or an entry is not an int or a float.
            ValueError: If the value is empty, or an entry is not finite or not greater than 0.

        Example:
            >>> Checks().positives("temperatures", (2.0, 0.0))
            Traceback (most recent call last):
            ValueError: Expected `temperatures[1]` to be greater than 0, but got temperatures[1]=0.0.
        """
        if not isinstance(value, (list, tuple)):
            raise TypeError(self.message(f"`{name}` to be a list or tuple of numbers", f"{name}={value!r}"))
        if not value:
            raise ValueError(self.message(f"`{name}` to hold at least one number", f"{name}={value!r}"))
        for index, entry in enumerate(value):
            self.positive(f"{name}[{index}]", entry)

    def non_negative(self, name: str, value: Any) -> None:
        """Check that a setting is a finite number of at least 0.

        Args:
            name: Name of the argument, for the message.
            value: The user's value.

        Raises:
            TypeError: If the value is not an int or a float.
            ValueError: If the value is not finite or less than 0.

        Example:
            >>> Checks().non_negative("weight", -2)
            Traceback (most recent call last):
            ValueError: Expected `weight` to be at least 0, but got weight=-2.
        """
        self.at_least(name, value, 0)

    def at_least(self, name: str, value: Any, minimum: float) -> None:
        """Check that a setting is a finite number of at least a minimum.

        Args:
            name: Name of the argument, for the message.
            value: The user's value.
            minimum: Smallest value allowed.

        Raises:
            TypeError: If the value is not an int or a float.
            ValueError: If the value is not finite or too small.

        Example:
            >>> Checks().at_least("p", 0.5, 1)
            Traceback (most recent call last):
            ValueError: Expected `p` to be at least 1, but got p=0.5.
        """
        self.number(name, value)
        if value < minimum:
            raise ValueError(self.message(f"`{name}` to be at least {minimum}", f"{name}={value!r}"))

    def between(self, name: str, value: Any, minimum: float, maximum: float) -> None:
        """Check that a setting is a number from a minimum to a maximum, both included.

        Args:
            name: Name of the argument, for the message.
            value: The user's value.
            minimum: Smallest value allowed.
            maximum: Largest value allowed.

        Raises:
            TypeError: If the value is not an int or a float.
            ValueError: If the value is not finite or out of the range.

        Example:
            >>> Checks().between("beta", 1.5, 0, 1)
            Traceback (most recent call last):
            ValueError: Expected `beta` to be from 0 to 1, but got beta=1.5.
        """
        self.number(name, value)
        if not minimum <= value <= maximum:
            raise ValueError(self.message(f"`{name}` to be from {minimum} to {maximum}", f"{name}={value!r}"))

    def fraction(self, name: str, value: Any) -> None:
        """Check that a setting is at least 0 and less than 1.

        Args:
            name: Name of the argument, for the message.
            value: The user's value.

        Raises:
            TypeError: If the value is not an int or a float.
            ValueError: If the value is not finite, less than 0, or 1 or more.

        Example:
            >>> Checks().fraction("skew", 1.0)
            Traceback (most recent call last):
            ValueError: Expected `skew` to be at least 0 and less than 1, but got skew=1.0.
        """
        self.number(name, value)
        if not 0 <= value < 1:
            raise ValueError(self.message(f"`{name}` to be at least 0 and less than 1", f"{name}={value!r}"))

    def boolean(self, name: str, value: Any) -> None:
        """Check that a switch is True or False.

        Args:
            name: Name of the argument, for the message.
            value: The user's value.

        Raises:
            TypeError: If the value is not a bool.

        Example:
            >>> Checks().boolean("standardize", 1)
            Traceback (most recent call last):
            TypeError: Expected `standardize` to be True or False, but got standardize=1.
        """
        if not isinstance(value, bool):
            raise TypeError(self.message(f"`{name}` to be True or False", f"{name}={value!r}"))

    def one_of(self, name: str, value: Any, choices: Iterable[str]) -> None:
        """Check that a setting is one of a few words.

        Args:
            name: Name of the argument, for the message.
            value: The user's value.
            choices: The words allowed.

        Raises:
            TypeError: If the value is not a string.
            ValueError: If the value is not one of the words.

        Example:
            >>> Checks().one_of("kind", "cosin", ["mse", "cosine"])
            Traceback (most recent call last):
            ValueError: Expected `kind` to be one of 'mse', 'cosine', but got kind='cosin'. Closest: 'cosine'.
        """
        allowed = list(choices)
        if isinstance(value, str) and value in allowed:
            return
        expected = f"`{name}` to be one of {', '.join(map(repr, allowed))}"
        if not isinstance(value, str):
            raise TypeError(self.message(expected, f"{name}={value!r}"))
        near = difflib.get_close_matches(value, allowed, n=3)
        raise ValueError(self.message(expected, f"{name}={value!r}", self.closest(value, allowed) if near else ""))

    def closest(self, name: str, candidates: Iterable[str]) -> str:
        """Sentence that lists the candidates closest to an unknown name.

        Args:
            name: The user's value.
            candidates: The names that exist.

        Returns:
            The close matches, best first; the first few candidates if none is close; an empty string if ``candidates``
            is empty.

        Example:
            >>> Checks().closest("layer5", ["stem", "layer3", "layer4", "head"])
            "Closest: 'layer4', 'layer3'."
            >>> Checks().closest("encoder", ["stem", "head"])
            "Known: 'stem', 'head'."
        """
        known = [candidate for candidate in candidates if candidate]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        if near:
            return f"Closest: {', '.join(map(repr, near))}."
        if not known:
            return ""
        more = f" and {len(known) - self._shown} more" if len(known) > self._shown else ""
        return f"Known: {', '.join(map(repr, known[: self._shown]))}{more}."
