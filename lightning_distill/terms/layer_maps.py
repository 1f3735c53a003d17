"""Pairs of layers of two networks with different depths, and the layers in a network's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_distill import checks
from lightning_distill.recording.outputs import entries_of

Layers = str | Mapping[int, int] | Sequence[tuple[int, int]]
Pairs = list[tuple[int, int]]
_EAGER = (
    " Load the model with attn_implementation='eager': the attention kernels 'sdpa' and 'flash_attention_2' make no"
    " attention maps."
)


def checked_layers(layers: Any) -> str | Pairs:
    """A layer map as ``"uniform"``, ``"last"`` or a list of pairs.

    Raises:
        ValueError: If it is something else, or empty.
    """
    if isinstance(layers, str):
        checks.one_of("layers", layers, ("uniform", "last"))
        return layers
    pairs = [*layers.items()] if isinstance(layers, Mapping) else layers
    if isinstance(pairs, Sequence) and pairs and all(_is_pair(pair) for pair in pairs):
        return [(int(student), int(teacher)) for student, teacher in pairs]
    raise ValueError(
        "Expected `layers` to be 'uniform', 'last', or pairs of layer numbers, the student's first, but got"
        f" layers={layers!r}. Pass {{1: 3, 2: 6}} or [(1, 3), (2, 6)]."
    )


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2 and all(type(number) is int for number in pair)


def layer_pairs(layers: str | Pairs, student: int, teacher: int, first: int = 1) -> Pairs:
    """The numbers of the layers to compare, the student's first.

    Layers are numbered from 1; 0 is the embeddings' output. ``"uniform"`` compares layer m of L_s with layer
    ceil(m L_t / L_s) of L_t.

    Args:
        layers: ``"uniform"``, ``"last"``, or pairs, in which negative numbers count from the last layer.
        student: Number of layers of the student.
        teacher: Number of layers of the teacher.
        first: The smallest number, 0 or 1.

    Raises:
        ValueError: If a layer does not exist, or the student has more layers than the teacher with ``"uniform"``.

    Example:
        >>> layer_pairs("uniform", 4, 12), layer_pairs("uniform", 4, 6), layer_pairs([(-1, -2)], 4, 12)
        ([(1, 3), (2, 6), (3, 9), (4, 12)], [(1, 2), (2, 3), (3, 5), (4, 6)], [(4, 11)])

    References:
        Jiao et al. 2020 (TinyBERT), section 4.2, arXiv:1909.10351: the uniform map.
    """
    if layers == "last":
        return [(student, teacher)]
    if isinstance(layers, str):
        if student > teacher:
            raise ValueError(
                f"Expected the student to have at most as many layers as the teacher for layers='uniform', but got"
                f" {student} and {teacher}. Pass pairs, such as layers=[({student}, {teacher})]."
            )
        return [(number, -(-number * teacher // student)) for number in range(1, student + 1)]
    return [
        (_number(pair[0], student, first, "student"), _number(pair[1], teacher, first, "teacher")) for pair in layers
    ]


def _number(number: int, count: int, first: int, who: str) -> int:
    counted = number + count + 1 if number < 0 else number
    if not first <= counted <= count:
        raise ValueError(
            f"Expected `layers` to have numbers of the {who}'s layers from {first} to {count}, but got {number}."
        )
    return counted


@dataclass(frozen=True)
class LayerOutput:
    """Picks the feature of one layer in the outputs of a network that returns those of all its layers.

    Args:
        who: ``"student"`` or ``"teacher"``, for messages.
        entry: Entry of the outputs, such as ``"hidden_states"``.
        index: Which of its tensors; negative numbers count from the end.
    """

    who: str
    entry: str
    index: int

    def __call__(self, output: Any) -> Tensor:
        """The feature.

        Raises:
            ValueError: If it is missing; the message says how to get it.
        """
        feature = self.all(output)[self.index]
        if not isinstance(feature, Tensor):
            raise ValueError(
                f"Expected {self.entry!r} of the {self.who}'s output to hold a tensor for each layer, but number"
                f" {self.index} is {feature!r}. Pair other layers: layers=[(<student's>, <teacher's>), ...]."
            )
        return feature

    def all(self, output: Any) -> Sequence[Any]:
        """The features of all layers.

        Raises:
            ValueError: If the output does not have them.
        """
        features = entries_of(output).get(self.entry)
        if isinstance(features, (tuple, list)) and features and any(feature is not None for feature in features):
            return features
        names = [name for name, value in entries_of(output).items() if value is not None]
        got = ", ".join(map(repr, names)) if names else type(output).__name__
        if features is not None and "attentions" in self.entry:
            got, remedy = f"{self.entry}={features!r}", _EAGER
        else:
            remedy = (
                f" If a network inside the {self.who} returns them, distil that: student=<its path>, teacher=<the"
                " network>. Otherwise tap layers by their names with FeatureDistillation."
            )
        raise ValueError(
            f"Expected the {self.who} to return {self.entry!r}, a tuple with a tensor for each layer, but got {got}."
            + remedy
        )
