"""The change from one network's normalised images to another's: its settings, without a framework."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from distill_core.checks import Checks, message
from distill_core.store import CacheError

Own = TypeVar("Own", bound="Normalization")  # typing.Self is new in Python 3.11
Statistics = tuple[Sequence[float], Sequence[float]]


class Normalization:
    """Base of both halves' ``Normalize``, which documents the settings and errors."""

    checks: ClassVar[Checks] = Checks(message)

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, size: int | Sequence[int] | None = None) -> None:
        self.mean, self.std = self._statistics("mean", "std", mean, std)
        self.size = None if size is None else self._sized(size)

    @classmethod
    def between(
        cls: type[Own], student: Statistics, teacher: Statistics, size: int | Sequence[int] | None = None
    ) -> Own:
        """The change from images that are normalised for the student to images that are normalised for the teacher.

        Args:
            student: Mean and standard deviation of the student's images, each with a number for every channel;
                ``((0, 0, 0), (1, 1, 1))`` for images from 0 to 1.
            teacher: The teacher's.
            size: Height and width of the teacher's images: a number for both, a pair, or None for the student's size.

        Raises:
            TypeError: If one of them is not a pair of lists of numbers.
            ValueError: If the lengths differ, or a standard deviation is not greater than 0.

        Example:
            >>> Normalization.between(student=([0.5], [0.5]), teacher=([0.25], [0.25]))
            Normalization(mean=(-0.5,), std=(0.5,))
        """
        (mean, std), (teacher_mean, teacher_std) = (
            cls._pair(name, pair) for name, pair in (("student", student), ("teacher", teacher))
        )
        if len(mean) != len(teacher_mean):
            received = f"{len(mean)} and {len(teacher_mean)}"
            raise ValueError(cls._message("`student` and `teacher` to have the same number of channels", received))
        # (x * std + mean - teacher_mean) / teacher_std, as one mean and one standard deviation
        means = [(other - own) / scale for own, scale, other in zip(mean, std, teacher_mean, strict=True)]
        return cls(means, [other / own for own, other in zip(std, teacher_std, strict=True)], size=size)

    @property
    def identity(self) -> str:
        """The settings in words, by which a cache recognizes its teacher's inputs."""
        size = "" if self.size is None else f", size={self.size}"
        return f"Normalize(mean={self.mean}, std={self.std}{size})"

    def __repr__(self) -> str:
        return type(self).__name__ + self.identity.removeprefix("Normalize")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Normalization) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __call__(self, inputs: Any) -> Any:
        """The teacher's inputs for the student's.

        Args:
            inputs: Images, or the arguments of a network: a tuple whose first entry they are, or a dict with them under
                ``"pixel_values"`` or as its only images. Other entries stay.

        Returns:
            The same structure with other images.

        Raises:
            TypeError: If the images are not a floating point tensor.
            ValueError: If no images are among them, or the number of channels differs.
        """
        if isinstance(inputs, Mapping):
            name = self._name_in(inputs)
            return {**inputs, name: self._checked(inputs[name])}
        if isinstance(inputs, (tuple, list)):
            if not inputs:
                raise ValueError(self._message("images in the student's inputs", "none"))
            return type(inputs)([self._checked(inputs[0]), *inputs[1:]])
        return self._checked(inputs)

    def _name_in(self, inputs: Mapping[Any, Any]) -> Any:
        images = [name for name, entry in inputs.items() if len(getattr(entry, "shape", ())) == 4]
        if "pixel_values" in inputs:
            return "pixel_values"
        if len(images) != 1:
            expected = "the student's inputs to have images under 'pixel_values', or one entry with four dimensions"
            remedy = "Pass a function that calls it with the right entry."
            raise ValueError(self._message(expected, f"the entries {list(inputs)}", remedy))
        return images[0]

    def _checked(self, images: Any) -> Any:
        if not hasattr(images, "shape") or not hasattr(images, "dtype"):
            raise TypeError(self._message("images as a tensor", f"a {type(images).__name__}"))
        axis, channels = self._channel_axis(), len(self.mean)
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[axis] not in (channels, None):
            expected = f"images of {channels} channels in dimension {axis % 4}, with four dimensions"
            raise ValueError(self._message(expected, f"shape {shape}"))
        return self._changed(images)

    def _channel_axis(self) -> int:
        """The dimension of the channels."""
        raise NotImplementedError

    def _changed(self, images: Any) -> Any:
        """The images, resized and normalised."""
        raise NotImplementedError

    @classmethod
    def _message(cls, expected: str, received: str, remedy: str = "") -> str:
        words: str = cls.checks.message(expected, received, remedy)
        return words

    @classmethod
    def _pair(cls, name: str, pair: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            expected = f"`{name}` to be a pair of mean and standard deviation"
            remedy = "Pass ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), with the numbers of your network."
            raise TypeError(cls._message(expected, f"{name}={pair!r}", remedy))
        return cls._statistics(f"{name}[0]", f"{name}[1]", *pair)

    @classmethod
    def _statistics(cls, name: str, spread: str, mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
        for argument, values in ((name, mean), (spread, std)):
            if not isinstance(values, (tuple, list)) or not values:
                expected = f"`{argument}` to be a list or tuple with a number for each channel"
                raise TypeError(cls._message(expected, f"{argument}={values!r}"))
            for index, value in enumerate(values):
                check = cls.checks.number if values is mean and argument == name else cls.checks.positive
                check(f"{argument}[{index}]", value)
        if len(mean) != len(std):
            expected = f"`{name}` and `{spread}` to have the same number of channels"
            raise ValueError(cls._message(expected, f"{len(mean)} and {len(std)}"))
        return tuple(map(float, mean)), tuple(map(float, std))

    @classmethod
    def _sized(cls, size: Any) -> tuple[int, int]:
        sizes = list(size) if isinstance(size, (tuple, list)) else [size, size]
        for value in sizes:
            cls.checks.integer("size", value)
            cls.checks.positive("size", value)
        if len(sizes) != 2:
            raise ValueError(cls._message("`size` to be a number or a pair of height and width", f"size={size!r}"))
        return int(sizes[0]), int(sizes[1])


def identity_of(teacher_inputs: Any) -> str:
    """A name by which a cache recognizes the function that made its teacher's inputs.

    Args:
        teacher_inputs: A key or an index, an object with an ``identity``, or a function of a module.

    Returns:
        The name; of a function also a digest of its source.

    Raises:
        CacheError: If it has no name that stays the same in another process.

    Example:
        >>> identity_of("teacher")
        "'teacher'"
    """
    if isinstance(teacher_inputs, (str, int)):
        return repr(teacher_inputs)
    identity = getattr(teacher_inputs, "identity", None)
    if isinstance(identity, str):
        return identity
    if inspect.isfunction(teacher_inputs) and "<" not in teacher_inputs.__qualname__:  # neither lambda nor local
        try:
            source = inspect.getsource(teacher_inputs)
        except (OSError, TypeError):
            source = ""
        if source:
            digest = hashlib.sha256(source.encode()).hexdigest()[:32]
            return f"{teacher_inputs.__module__}.{teacher_inputs.__qualname__} {digest}"
    raise CacheError(
        "Expected `teacher_inputs` to have a name that a cache can keep, so that it is never continued with other"
        f" inputs, but got {teacher_inputs!r}. Pass Normalize.between(...), a function that is defined in a module, or"
        " an object with a string `identity`."
    )
