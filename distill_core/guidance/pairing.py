"""From two networks and a few batches to pairs of their layers, whatever the framework."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from distill_core.checks import Checks
from distill_core.guidance.assignment import MAPS, Layer, best_pairs, choosable, grouped, pairs_by_depth, scores
from distill_core.guidance.layer_pairs import LayerPair
from distill_core.guidance.similarity import FEWEST, Array, MinibatchCKA, check_size

EVERYTHING = slice(None)
BACKWARDS = slice(FEWEST - 1, None, -1)  # a few examples in the opposite order
_TOLERANCE = (
    0.02  # of fingerprints, relative to the length of a feature: half precision passes, dropout of 1 % does not
)


@dataclass
class Features:
    """Numbers that describe the features of one forward pass; the features themselves are not kept.

    Attributes:
        size: Number of examples n.
        layers: The layers by label, in the order in which they ran.
        grams: The Gram matrix of each, shape ``(n, n)``, if they were asked for.
        prints: A fingerprint of each example's feature, shape ``(n,)``, a number of the order of 1, if asked for.
    """

    size: int
    layers: dict[str, Layer] = field(default_factory=dict)
    grams: dict[str, Array] = field(default_factory=dict)
    prints: dict[str, Array] = field(default_factory=dict)


class Network(Protocol):
    """A network whose layers can be described.

    Attributes:
        who: ``"student"`` or ``"teacher"``.
        named: Whether the user has named the layers.
    """

    who: str
    named: bool

    def features(self, batch: Any, *, rows: slice = EVERYTHING, grams: bool = True, prints: bool = False) -> Features:
        """Run the network on a batch.

        Args:
            batch: The batch.
            rows: The examples to take, and in which order.
            grams: Whether to compute Gram matrices.
            prints: Whether to compute fingerprints.
        """


Sides = tuple[Network, Network]
Origins = Callable[[Sequence[Layer], Sequence[Layer]], Mapping[str, str]]


@dataclass
class Pairing:
    """The result of :func:`find_pairs`.

    Attributes:
        pairs: The pairs.
        student: All layers of the student that were compared.
        teacher: All layers of the teacher.
        similarity: Shape ``(S, T)``, or None for pairs by depth.
        note: How they were found.
    """

    pairs: list[LayerPair]
    student: list[Layer]
    teacher: list[Layer]
    similarity: Array | None
    note: str


def find_pairs(
    student: Network,
    teacher: Network,
    batches: Iterable[Any],
    by: str,
    count: int | None,
    max_batches: int | None,
    originals: Origins,
    checks: Checks,
) -> Pairing:
    """Pairs of layers of two networks.

    Args:
        student: The student.
        teacher: The teacher.
        batches: Batches of inputs.
        by: One of ``MAPS``.
        count: Number of pairs, or None.
        max_batches: The most batches that are read, or None for all.
        originals: From the layers of both to the label of the teacher's layer with equal weights, by the student's.
        checks: Checks with the half's form of messages.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If an argument cannot be used, or a network has no layers to compare.
    """
    checks.one_of("by", by, MAPS)
    for name, number in (("count", count), ("max_batches", max_batches)):
        if number is not None:
            checks.integer(name, number)
            checks.at_least(name, number, 1)
    limited = itertools.islice(batches, max_batches if by == "cka" else 1)
    first = next(limited, None)
    if first is None:
        remedy = "Pass a loader, or a list of batches."
        raise ValueError(checks.message("`batches` to hold at least one batch", "none", remedy))
    if by != "cka":
        return _by_depth((student, teacher), first, by, count, originals, checks)
    return _by_similarity((student, teacher), first, limited, count, checks)


def _by_depth(sides: Sides, batch: Any, by: str, count: int | None, originals: Origins, checks: Checks) -> Pairing:
    layers = [[*side.features(batch, grams=False).layers.values()] for side in sides]
    for side, each in zip(sides, layers, strict=True):
        _check_some(side, each, checks)
    if all(any(layer.block for layer in each) for each in layers):
        layers = [
            [layer for layer in each if layer.block or side.named] for side, each in zip(sides, layers, strict=True)
        ]
    student, teacher = layers
    if by == "original":
        origins = originals(student, teacher)
        by_label = {layer.label: layer for layer in teacher}
        chosen = [(layer, by_label[origins[layer.label]]) for layer in student if layer.label in origins]
        if not chosen:
            expected = "the student to have layers with the weights of layers of the teacher for by='original'"
            raise ValueError(checks.message(expected, "none", "Call it before the training, or pass by='uniform'."))
        chosen = chosen[-count:] if count is not None else chosen
    else:
        _check_count(count, min(len(student), len(teacher)), checks)
        numbers = pairs_by_depth(by, len(student), len(teacher), count)
        chosen = [(student[row], teacher[column]) for row, column in numbers]
    note = f"{by!r} map of {len(student)} x {len(teacher)} layers, without similarities"
    return Pairing([LayerPair(*pair) for pair in chosen], student, teacher, None, note)


def _by_similarity(sides: Sides, first: Any, others: Iterator[Any], count: int | None, checks: Checks) -> Pairing:
    described = [side.features(first, prints=True) for side in sides]
    layers = []
    for side, features in zip(sides, described, strict=True):
        layers.append(_trusted(side, first, features, checks))
    cka = MinibatchCKA([*layers[0]], [*layers[1]])
    dropped: list[set[str]] = [set(), set()]
    while True:
        student, teacher = described
        if student.size != teacher.size:
            expected = "student and teacher to get the same examples"
            raise ValueError(
                checks.message(expected, f"{student.size} and {teacher.size}", "Correct `teacher_inputs`.")
            )
        for features, known, missing in zip(described, layers, dropped, strict=True):
            missing |= known.keys() - features.grams.keys()  # it does not run in every batch
        cka.add(_stacked(student, layers[0]), _stacked(teacher, layers[1]))
        batch = next(others, None)
        if batch is None:
            break
        described = [side.features(batch) for side in sides]
    keep = [
        [index for index, label in enumerate(known) if varies[index] and label not in missing]
        for known, missing, varies in zip(layers, dropped, map(cka.varies, ("student", "teacher")), strict=True)
    ]
    students, teachers = (
        [[*known.values()][index] for index in kept] for known, kept in zip(layers, keep, strict=True)
    )
    for side, each in zip(sides, (students, teachers), strict=True):
        _check_some(side, each, checks)
    similarity = cka.matrix()[np.ix_(*keep)]
    rows = [*range(len(students))] if sides[0].named else choosable(students, vectors=False)
    spread = any(students[row].positions for row in rows)
    columns = [*range(len(teachers))] if sides[1].named else choosable(teachers, vectors=not spread)
    _check_count(count, min(len(rows), len(columns)), checks)
    groups = grouped(students, rows, len(rows) if count is None and sides[0].named else count)[-len(columns) :]
    numbers = best_pairs(scores(similarity, students, teachers), groups, columns)
    pairs = [LayerPair(students[row], teachers[column], float(similarity[row, column])) for row, column in numbers]
    data = f"{cka.examples} examples in {cka.batches} batch{'es' if cka.batches > 1 else ''}"
    note = f"linear CKA of {len(students)} x {len(teachers)} layers, {data}"
    return Pairing(pairs, students, teachers, similarity, note)


def _stacked(features: Features, layers: Mapping[str, Layer]) -> Array:
    empty = np.zeros((features.size, features.size))
    return np.stack([features.grams.get(label, empty) for label in layers])


def _check_some(side: Network, layers: Sized, checks: Checks) -> None:
    if not layers:
        expected = f"the {side.who} to have layers that return a row for each example, not the same row for all"
        raise ValueError(checks.message(expected, "none", "Pass the network itself, not compiled to a script."))


def _check_count(count: int | None, most: int, checks: Checks) -> None:
    if count is not None and count > most:
        expected = f"`count` to be at most {most}, the layers to choose from"
        raise ValueError(checks.message(expected, f"count={count}", "Name more layers, or pass a smaller number."))


def _trusted(network: Network, batch: Any, features: Features, checks: Checks) -> dict[str, Layer]:
    """The layers whose features belong to the examples, one row each.

    A few examples run once more in the opposite order, which must give the same features. If not, the whole batch runs
    again, which tells layers without a row for each example from random ones.

    Warns:
        UserWarning: If a layer is random in eval mode.
    """
    check_size(features.size)
    _check_some(network, features.layers, checks)
    turned = network.features(batch, rows=BACKWARDS, grams=False, prints=True).prints
    empty = np.array([])
    suspects = [
        label for label, rows in features.prints.items() if not _equal(rows[BACKWARDS], turned.get(label, empty))
    ]
    if not suspects:
        return features.layers
    again = network.features(batch, grams=False, prints=True).prints
    random = [label for label in suspects if not _equal(features.prints[label], again.get(label, empty))]
    if random:
        warnings.warn(
            f"The {network.who} is random in eval mode: {random[0]!r} returned other values for the same inputs, like"
            f" {len(random) - 1} other layers. Their similarities are too low. Turn off its dropout or sampling.",
            stacklevel=5,
        )
    layers = {label: layer for label, layer in features.layers.items() if label in random or label not in suspects}
    _check_some(network, layers, checks)
    return layers


def _equal(first: Array, second: Array) -> bool:
    # NaN is equal to NaN: numbers that are not finite are reported with their layer later
    return first.shape == second.shape and np.allclose(first, second, rtol=0, atol=_TOLERANCE, equal_nan=True)
