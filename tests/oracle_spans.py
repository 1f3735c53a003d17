"""Reference values of the losses on spans of two tokenizers: loops over one row, from the papers' formulas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

Span = tuple[list[int], list[int]]  # places of the student's and of the teacher's tokens


def shared_spans(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[Span]:
    """Groups of tokens that end at the same byte, both of which spell the same text from its beginning."""
    ends = [list(accumulate(map(len, pieces))) for pieces in (student, teacher)]
    spans: list[Span] = []
    begins = [0, 0]
    for place, end in enumerate(ends[0]):
        if end in ends[1]:
            other = ends[1].index(end)
            spans.append((list(range(begins[0], place + 1)), list(range(begins[1], other + 1))))
            begins = [place + 1, other + 1]
    return spans


def probability(logits: Tensor, tokens: Sequence[int], place: int, temperature: float) -> Tensor:
    """The probability of the token at a place, by the row before it."""
    return torch.softmax(logits[place - 1] / temperature, -1)[tokens[place]]


def universal(student: Tensor, teacher: Tensor) -> Tensor:
    """ULD: the sum over the ranks of the differences of two sorted vectors, the shorter with zeros."""
    ranked = [vector.sort(descending=True).values for vector in (student, teacher)]
    size = max(map(len, ranked))
    first, second = (torch.cat([vector, vector.new_zeros(size - len(vector))]) for vector in ranked)
    return (first - second).abs().sum()


def joint(logits: Tensor, tokens: Sequence[int], places: Sequence[int], temperature: float) -> Tensor:
    """The chain rule: the row that predicts the last token, times the probabilities of the tokens before it."""
    row = torch.softmax(logits[places[-1] - 1] / temperature, -1)
    for place in places[:-1]:
        row = row * probability(logits, tokens, place, temperature)
    return row


def likelihood(logits: Tensor, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
    value = torch.ones((), dtype=logits.dtype)
    for place in places:
        value = value * probability(logits, tokens, place, 1.0)
    return value


def chunk(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """ALM: f(a || b) + f(1 - a || 1 - b), f(a || b) = a log(a / b), of the T-th roots of both likelihoods."""
    s, t = student ** (1 / temperature), teacher ** (1 / temperature)
    return t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()


def span_losses(
    spans: Sequence[Span],
    student: tuple[Tensor, Sequence[int]],
    teacher: tuple[Tensor, Sequence[int]],
    method: str,
    temperature: float,
) -> list[Tensor]:
    """The loss of each span, for the logits ``(T, V)`` and the tokens of both sides."""
    values = []
    for own, other in spans:
        if method == "uld":
            pair = joint(*student, own, temperature), joint(*teacher, other, temperature)
            values.append(universal(*pair))
        else:
            values.append(chunk(likelihood(*student, own), likelihood(*teacher, other), temperature))
    return values
