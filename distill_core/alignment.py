"""Spans of text that the tokens of two tokenizers share. No framework is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill_core.token_bytes import TokenBytes

Numbers = NDArray[np.int64]
NO_SPAN = -1
_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that do not begin a character


class Aligned(NamedTuple):
    """A batch of the student's tokens, the teacher's tokens of the same texts, and the spans that both share.

    A span is the smallest group of tokens of both sides that begins and ends at the same byte. Every token has the
    number of its span within its row, from 0, or -1 outside of spans.

    Attributes:
        input_ids: The teacher's tokens, padded on the right, shape ``(B, U)``.
        attention_mask: 1 for the teacher's tokens, 0 for padding, shape ``(B, U)``.
        student_spans: The span of each token of the student, shape ``(B, T)``.
        teacher_spans: The span of each token of the teacher, shape ``(B, U)``.
    """

    input_ids: Numbers
    attention_mask: Numbers
    student_spans: Numbers
    teacher_spans: Numbers


class _Run(NamedTuple):
    """Neighbouring tokens of the student that have bytes.

    Attributes:
        start: Position of the first token.
        ends: The byte of ``text`` at which each token ends.
        text: The text that the teacher reads.
        partial: Number of tokens at the beginning that begin within a character that is not in the text.
    """

    start: int
    ends: Numbers
    text: str
    partial: int


class _Special(NamedTuple):
    """A special token of the student.

    Attributes:
        place: Its position.
        counterpart: The teacher's token in its place.
    """

    place: int
    counterpart: int


class TokenAligner:
    """Finds the teacher's tokens and the shared spans for the student's tokens.

    The text is read off the student's tokens, so it is exactly the text that the student reads, truncated or not. The
    teacher's tokenizer encodes it between any two special tokens. Special tokens have no bytes: those with a
    counterpart are a span of their own, the others are left out of the teacher's input. A token that nothing comes
    before is not predicted, so it and its span are left out.

    Where the teacher's tokens spell another text, because its tokenizer does not know a character or changes it, the
    spans end there, up to the next special token. So do they at a byte of the student's that is not UTF-8.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.
        special_tokens: Names of the student's special tokens, and of their counterparts of the teacher, beside those of
            equal names and those that begin and end a text.
        max_length: The largest number of tokens that the teacher reads; ``None`` is that of its tokenizer, if known.

    Raises:
        ValueError: If a special token does not exist.
    """

    def __init__(
        self,
        student: TokenBytes,
        teacher: TokenBytes,
        special_tokens: Mapping[str, str] | None = None,
        max_length: int | None = None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.max_length = teacher.max_length if max_length is None else max_length
        names = {name: number for number, name in teacher.special.items()}
        self._counterparts = {number: names[name] for number, name in student.special.items() if name in names}
        roles = {role: (student.roles[role], teacher.roles[role]) for role in student.roles if role in teacher.roles}
        self._counterparts |= dict(roles.values())
        self._of_first = dict([roles["bos"]]) if "bos" in roles else {}  # the same token may also end a text
        for own, other in (special_tokens or {}).items():
            for tokenizer, name in ((student, own), (teacher, other)):
                if name not in tokenizer.vocabulary:
                    side = "student" if tokenizer is student else "teacher"
                    raise ValueError(
                        f"Expected `special_tokens` to name tokens of both tokenizers, but got {name!r}, which the"
                        f" {side}'s does not have. Pass {{<the student's>: <the teacher's>}}."
                    )
            self._counterparts[student.vocabulary[own]] = teacher.vocabulary[other]
            self._of_first.pop(student.vocabulary[own], None)

    def align(self, input_ids: Numbers, attention_mask: NDArray[Any] | None = None) -> Aligned:
        """Align a batch.

        Args:
            input_ids: The student's tokens, shape ``(B, T)``.
            attention_mask: Not 0 where a token is not padding, shape ``(B, T)``; ``None`` where nothing is padding.
        """
        sizes = self.student.sizes_of(input_ids)
        kept = np.ones(input_ids.shape, dtype=bool) if attention_mask is None else np.asarray(attention_mask) != 0
        rows = [list(self._parts(*row)) for row in zip(input_ids, sizes, kept, strict=True)]
        encoded = iter(self.teacher.encode([part.text for row in rows for part in row if isinstance(part, _Run)]))
        student_spans = np.full(input_ids.shape, NO_SPAN, dtype=np.int64)
        teachers = [
            self._row(spans, np.flatnonzero(row_kept)[:1], parts, encoded)
            for spans, row_kept, parts in zip(student_spans, kept, rows, strict=True)
        ]
        shape = len(teachers), max([1, *(len(numbers) for numbers, _ in teachers)])
        numbers, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        teacher_spans = np.full(shape, NO_SPAN, dtype=np.int64)
        for row, (tokens, spans) in enumerate(teachers):
            numbers[row, : len(tokens)], teacher_spans[row, : len(tokens)] = tokens, spans
            mask[row, : max(len(tokens), 1)] = 1  # attention to nothing at all would be NaN
        return Aligned(numbers, mask, student_spans, teacher_spans)

    def _parts(self, numbers: Numbers, sizes: Numbers, kept: NDArray[np.bool_]) -> Iterator[_Run | _Special]:
        """The runs of tokens with bytes, and the special tokens with counterparts, in a row of the student."""
        borders = np.flatnonzero(np.diff(kept & (sizes > 0), prepend=False, append=False))
        stops = {int(start): int(stop) for start, stop in borders.reshape(-1, 2)}
        for place in sorted([*stops, *np.flatnonzero(kept & (sizes == 0)).tolist()]):
            if place in stops:
                run = slice(place, stops[place])
                yield self._run(place, numbers[run], sizes[run])
                continue
            number = int(numbers[place])
            counterpart = self._counterparts.get(number)
            if not kept[:place].any():
                counterpart = self._of_first.get(number, counterpart)
            if counterpart is not None:
                yield _Special(place, counterpart)

    def _run(self, start: int, numbers: Numbers, sizes: Numbers) -> _Run:
        data = self.student.spell(numbers.tolist())
        skipped = int(self.student.adds_space and data.startswith(b" "))
        rest = data[skipped:].lstrip(_CONTINUATION)  # of a character whose beginning is in another row
        ends = np.cumsum(sizes) - (len(data) - len(rest))
        partial = int((ends - sizes < 0).sum()) if len(rest) < len(data) - skipped else 0
        try:
            text = rest.decode()
        except UnicodeDecodeError as error:
            text = rest[: error.start].decode()
        return _Run(start, ends, text, partial)

    def _row(
        self, student_spans: Numbers, first: Numbers, parts: Sequence[_Run | _Special], encoded: Iterator[list[int]]
    ) -> tuple[Numbers, Numbers]:
        """Fill the spans of a row of the student; the teacher's tokens and spans."""
        tokens, spans = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        count = 0
        for part in parts:
            if isinstance(part, _Run):
                numbers = np.array(next(encoded), dtype=np.int64)
                own, other = self._shared(part, numbers)
                student_spans[part.start : part.start + len(own)] = np.where(own < 0, NO_SPAN, own + count)
                other = np.where(other < 0, NO_SPAN, other + count)
                count += int(own.max(initial=NO_SPAN)) + 1
            else:
                numbers, other = np.array([part.counterpart]), np.array([count])
                student_spans[part.place], count = count, count + 1
            tokens.append(numbers)
            spans.append(other)
        numbers, teacher_spans = np.concatenate(tokens), np.concatenate(spans)
        before = self.teacher.prefix
        if before and numbers[: len(before)].tolist() != before:
            numbers = np.concatenate([before, numbers])
            teacher_spans = np.concatenate([np.full(len(before), NO_SPAN), teacher_spans])
        # not predicted, as nothing comes before it, or not read by the teacher
        left_out = {*student_spans[first].tolist(), *teacher_spans[:1].tolist()}
        if self.max_length is not None:
            left_out |= set(teacher_spans[self.max_length :].tolist())
            numbers, teacher_spans = numbers[: self.max_length], teacher_spans[: self.max_length]
        for each in (student_spans, teacher_spans):
            each[np.isin(each, list(left_out))] = NO_SPAN
        return numbers, teacher_spans

    def _shared(self, run: _Run, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """The spans of a run of the student's tokens and of the teacher's tokens of its text, from 0."""
        text, spelled = run.text.encode(), self.teacher.spell(numbers.tolist())
        skipped = int(self.teacher.adds_space and _equal_bytes(text, spelled[1:]) > _equal_bytes(text, spelled))
        sizes = self.teacher.sizes_of(numbers)
        student, teacher = run.ends, np.cumsum(sizes) - skipped
        ends = student[np.searchsorted(teacher, student, "right") > np.searchsorted(teacher, student)]
        ends = ends[(ends > 0) & (ends <= _equal_bytes(text, spelled[skipped:]))]
        own, other = (_spans(ends, each) for each in (student, teacher))
        if run.partial:
            other[np.isin(other, own[: run.partial])] = NO_SPAN
            own[np.isin(own, own[: run.partial])] = NO_SPAN
        other[sizes == 0] = NO_SPAN
        return own, other


def _spans(shared: Numbers, ends: Numbers) -> Numbers:
    """The number of the first shared end that is not before the end of each token."""
    places = np.searchsorted(shared, ends)
    return np.where(places < len(shared), places, NO_SPAN).astype(np.int64)


def _equal_bytes(left: bytes, right: bytes) -> int:
    """How many bytes are equal, from the first."""
    if left == right:
        return len(left)
    number = min(len(left), len(right))
    differ = np.frombuffer(left[:number], np.uint8) != np.frombuffer(right[:number], np.uint8)
    return int(differ.argmax()) if differ.any() else number
