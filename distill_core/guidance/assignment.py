"""The choice of pairs of layers: one layer of the teacher for some layers of the student, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HALVING = 0.2  # of the height and width: costs as much as this difference of similarities
DEPTH = 0.01  # cost of a pair of the first layer and the last one
FEW = 4  # pairs for networks of one resolution
MAPS = ("cka", "uniform", "last", "original")


@dataclass(frozen=True)
class Layer:
    """A layer of a network whose output has a row for each example.

    Attributes:
        name: Its path.
        shape: Shape of its output for one example.
        positions: Sizes of the map or number of tokens; empty for a vector.
        call: Which call of the layer, if it is called several times.
        output: Which part of its output, if that holds several tensors.
        layout: Meaning of the axes, if it must be said.
        block: Whether it is one of a stack of alike blocks.
    """

    name: str
    shape: tuple[int, ...]
    positions: tuple[int, ...] = ()
    call: int | None = None
    output: int | str | None = None
    layout: str | None = None
    block: bool = False

    @property
    def label(self) -> str:
        """The name, with the call and the part of the output."""
        call = "" if self.call is None else f"#{self.call}"
        return f"{self.name}{call}" + ("" if self.output is None else f"[{self.output!r}]")

    @property
    def size(self) -> str:
        """The shape in words."""
        return " x ".join(map(str, self.shape))


def choosable(layers: Sequence[Layer], *, vectors: bool) -> list[int]:
    """The layers that pairs are chosen from.

    These are the blocks and the layers after the last block, or all layers of a network without blocks.

    Args:
        layers: The layers in the order in which they run.
        vectors: Whether to keep layers without positions where others have them.

    Returns:
        Their indices.

    Example:
        >>> layers = [Layer("stem", (8, 4, 4), (4, 4)), Layer("block", (8, 2, 2), (2, 2), block=True), Layer("p", (8,))]
        >>> choosable(layers, vectors=False), choosable(layers, vectors=True)
        ([1], [1, 2])
    """
    blocks = [index for index, layer in enumerate(layers) if layer.block]
    last = max(blocks, default=-1)
    kept = [index for index, layer in enumerate(layers) if layer.block or index > last]
    spread = [index for index in kept if layers[index].positions]
    return spread if spread and not vectors else kept


def grouped(layers: Sequence[Layer], chosen: Sequence[int], count: int | None) -> list[list[int]]:
    """Groups of a student's layers, each of which gets one pair.

    Layers in a row with equally many positions are a stage, and each stage is a group. If all layers are one stage,
    there are at most four groups. For a larger ``count`` the longest group is halved until they are enough; for a
    smaller one the last groups remain.

    Args:
        layers: The student's layers.
        chosen: Indices of those that may be paired.
        count: Number of groups, at most that of the layers.

    Returns:
        The indices of each group.

    Example:
        >>> layers = [Layer(name, (8, side, side), (side, side)) for name, side in zip("abcd", (8, 4, 4, 2))]
        >>> grouped(layers, range(4), None), grouped(layers, range(4), 4), grouped(layers, range(4), 2)
        ([[0], [1, 2], [3]], [[0], [1], [2], [3]], [[1, 2], [3]])
    """
    groups: list[list[int]] = []
    for index in chosen:
        if groups and math.prod(layers[groups[-1][-1]].positions) == math.prod(layers[index].positions):
            groups[-1].append(index)
        else:
            groups.append([index])
    if count is None:
        count = len(groups) if len(groups) > 1 else min(FEW, len(chosen))
    while len(groups) < count:
        longest = max(range(len(groups)), key=lambda place: len(groups[place]))
        group = groups[longest]
        groups[longest : longest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups[len(groups) - count :]


def scores(similarity: NDArray[np.float64], student: Sequence[Layer], teacher: Sequence[Layer]) -> NDArray[np.float64]:
    """Similarities, less the costs of other resolutions and other depths.

    Args:
        similarity: Shape ``(S, T)``.
        student: The student's layers.
        teacher: The teacher's layers.

    Returns:
        Shape ``(S, T)``.

    Example:
        >>> fine, coarse = Layer("fine", (8, 4, 4), (4, 4)), Layer("coarse", (8, 2, 2), (2, 2))
        >>> scores(np.array([[0.9, 0.95]]), [fine], [fine, coarse]).round(3)
        array([[0.895, 0.75 ]])
    """
    depths = np.arange(1, len(student) + 1)[:, None] / len(student), np.arange(1, len(teacher) + 1) / len(teacher)
    halvings = np.array([[_halvings(a.positions, b.positions) for b in teacher] for a in student])
    result: NDArray[np.float64] = similarity - HALVING * halvings - DEPTH * np.abs(depths[0] - depths[1])
    return result


def _halvings(student: tuple[int, ...], teacher: tuple[int, ...]) -> float:
    """How often the sides of one map must be halved for those of the other."""
    if not student and not teacher:
        return 0.0
    ratio = math.log2(max(1, math.prod(student)) / max(1, math.prod(teacher)))
    return abs(ratio) / max(len(student), len(teacher))


def best_pairs(
    values: NDArray[np.float64], groups: Sequence[Sequence[int]], columns: Sequence[int]
) -> list[tuple[int, int]]:
    """The pairs with the largest sum: one for each group, with layers of the teacher that follow each other.

    Args:
        values: Scores, shape ``(S, T)``.
        groups: Rows of each group, in order.
        columns: The columns that may be paired, in order, at least as many as groups.

    Returns:
        A row and a column for each group; rows and columns increase.

    Example:
        >>> best_pairs(np.array([[0.9, 0.8, 0.1], [0.9, 0.3, 0.2]]), [[0], [1]], [0, 1, 2])
        [(0, 0), (1, 1)]
    """
    table = values[:, list(columns)]
    rows = np.array(
        [[max(group, key=lambda row: table[row, place]) for place in range(len(columns))] for group in groups]
    )
    total, steps = np.zeros(len(columns)), list[NDArray[np.intp]]()
    for number, group_rows in enumerate(rows):
        best = table[group_rows, np.arange(len(columns))]
        before = np.full(len(columns), -1, dtype=np.intp)
        if number:
            for place in range(1, len(columns)):  # the best place to the left
                left = before[place - 1]
                before[place] = place - 1 if left < 0 or total[place - 1] > total[left] else left
            best = np.where(before < 0, -np.inf, best + total[before])
        total = best
        steps.append(before)
    place = int(total.argmax())
    pairs = []
    for group_rows, before in zip(reversed(rows), reversed(steps), strict=True):
        pairs.append((int(group_rows[place]), int(columns[place])))
        place = int(before[place])
    return pairs[::-1]


def pairs_by_depth(how: str, student: int, teacher: int, count: int | None = None) -> list[tuple[int, int]]:
    """Pairs of layers by their depths alone.

    ``"uniform"`` pairs layer ceil(m L / k) of both networks, for m = 1 to k; ``"last"`` the last k layers of both.

    Args:
        how: ``"uniform"`` or ``"last"``.
        student: Number of layers of the student.
        teacher: Number of layers of the teacher.
        count: Number of pairs k; ``None`` is the smaller of the two numbers.

    Returns:
        Indices from 0.

    Example:
        >>> pairs_by_depth("uniform", 4, 12), pairs_by_depth("last", 4, 12, 2)
        ([(0, 2), (1, 5), (2, 8), (3, 11)], [(2, 10), (3, 11)])

    References:
        Jiao et al. (2020), arXiv:1909.10351, section 4.2, and Wang et al. (2023), arXiv:2310.08797.
    """
    count = min(student, teacher) if count is None else count
    if how == "last":
        return [(student - back, teacher - back) for back in range(count, 0, -1)]
    return [(-(-number * student // count) - 1, -(-number * teacher // count) - 1) for number in range(1, count + 1)]
