"""The positions of token sequences that count: labels, masks, the causal shift, packed documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_distill import backends, checks

MaskPlace: TypeAlias = str | Callable[[Any], Any]
_PADDING = ("padding_mask", "attention_mask")
_TOKENS = ("token_ids", "input_ids")
_FEWEST = 4  # fewer labels may be equal to the tokens by chance


class Positions(NamedTuple):
    """The positions of the logits that count.

    Attributes:
        counts: True where a position counts, shape ``(B, T)``.
        labels: The label that each position predicts, int32, shape ``(B, T)``, or None without labels.
        weights: The weight of each position, float32, shape ``(B, T)`` or ``(B, 1)``, or None without weights.
    """

    counts: Any
    labels: Any
    weights: Any


class TokenPositions:
    """Finds the positions that count, in the inputs, labels and weights of a batch.

    A position counts if the token that it predicts does: its label is not ``ignore_index``, its own weight is not 0,
    it is not padding, and ``mask`` marks it. With ``shift`` the token that position t predicts is number t + 1. A
    position that is padding itself never counts, and neither does the last token of a packed document, which cannot
    predict the first of the next: the documents are told apart by ``position_ids`` that begin again at 0, by
    ``seq_idx``, by a padding mask with a number for each document, or by an attention mask of pairs of tokens, ``(B, T,
    T)`` or ``(B, 1, T, T)``, in which a token does not see the one before it.

    Args:
        shift: Whether position t predicts token t + 1.
        ignore_index: The label of tokens that do not count.
        mask: A key of the inputs, or a function of them, for a mask of the tokens that count.
    """

    def __init__(self, *, shift: bool, ignore_index: int, mask: MaskPlace | None = None) -> None:
        self.shift, self.ignore_index, self.mask = shift, ignore_index, mask

    def of(
        self, logits: Any, inputs: Any, labels: Any = None, sample_weight: Any = None, masks: Sequence[Any] = ()
    ) -> Positions:
        """The positions of a batch that count.

        Args:
            logits: The student's logits, shape ``(B, T, V)``.
            inputs: The inputs of the batch.
            labels: The labels of the batch; those of another shape than ``(B, T)`` belong to whole sequences.
            sample_weight: Weight of each sequence, shape ``(B,)``, or of each token, shape ``(B, T)``.
            masks: Keras' own masks of the logits; entries may be None.

        Raises:
            ValueError: If neither labels nor a mask say which tokens count, or one of them has another length.
        """
        shape = tuple(logits.shape)[:2]
        labels = self._labels(labels, len(logits.shape), shape)
        mask = None if self.mask is None else _rows("mask", self._marked(inputs), shape)
        padding = [_as_numbers(rows) for rows in (*masks, *_padding_of(inputs)) if _fits(rows, shape)]
        weights, of_tokens = _weights(sample_weight, shape)

        tokens = [ops.cast(rows, "bool") for rows in (mask, *padding) if rows is not None]
        if labels is not None:
            tokens.append(ops.not_equal(labels, self.ignore_index))
        if of_tokens:
            tokens.append(ops.not_equal(weights, 0))
        if not tokens:
            expected = "labels, a padding mask or `mask=` to say which tokens count"
            remedy = (
                "Pass token labels of shape (batch, tokens), put `padding_mask` into a dict of inputs, use"
                " Embedding(mask_zero=True), or pass mask=<a key of the inputs, or a function of them>; to count all:"
                " mask=lambda x: keras.ops.ones_like(x)."
            )
            raise ValueError(checks.message(expected, "a batch without them", remedy))
        counts = _all(tokens)
        if self.shift:
            counts = _moved(counts, False)
            labels = None if labels is None else _moved(labels, self.ignore_index)
            weights = _moved(weights, 0) if of_tokens else weights
            borders = [ops.logical_not(border) for border in _borders(inputs, padding, shape)]
            counts = _all([counts, *borders, *(ops.not_equal(rows, 0) for rows in padding)])
        return Positions(counts, labels, weights)

    def check_alignment(self, inputs: Any, labels: Any, causal: bool = False) -> bool:
        """Check that labels are where ``shift`` expects them, as far as the values of one batch show it.

        Args:
            inputs: The inputs of a batch.
            labels: Its labels.
            causal: Whether the student is known to predict the next token.

        Returns:
            Whether the values could be compared.

        Raises:
            ValueError: If the labels are shifted already, or not yet.
        """
        tokens, targets = (backends.values_of(tensor) for tensor in (token_numbers(inputs), labels))
        if tokens is None or targets is None:
            return False
        if targets.shape == (*tokens.shape, 1):
            targets = targets[..., 0]
        if targets.shape != tokens.shape or tokens.ndim != 2:
            return True
        counts = targets != self.ignore_index
        in_place = _equal(targets, tokens, counts)
        following = _equal(targets[:, :-1], tokens[:, 1:], counts[:, :-1])
        if self.shift and following and not in_place:
            expected = "labels that are the student's own tokens with shift=True"
            received = "labels that are shifted already: the label at position t is token t + 1"
            raise ValueError(checks.message(expected, received, "Pass shift=False."))
        if not self.shift and causal and in_place and not following:
            expected = "labels that are shifted already with shift=False"
            received = "the student's own tokens, but a causal model predicts the token that follows"
            raise ValueError(checks.message(expected, received, "Pass shift=True."))
        if not self.shift and following and not in_place:
            self._check_ends(inputs, counts)
        return True

    def _check_ends(self, inputs: Any, counts: Any) -> None:
        """Raise if labels that are shifted already let a document predict the next one of its row."""
        padding = [_as_numbers(rows) for rows in _padding_of(inputs) if _fits(rows, counts.shape)]
        text = [ops.not_equal(_moved(rows, 0), 0) for rows in padding]  # padding may be equal to the label before it
        for border in _borders(inputs, padding, counts.shape):
            ends = backends.values_of(_all([border, *text]))
            if (counts & ends)[:, :-1].any():  # the token after the last one is not in the row
                expected = "labels that are shifted already to leave out the last token of each packed document"
                remedy = f"Set these labels to {self.ignore_index}, or pass the tokens as labels, with shift=True."
                received = "the first token of the next document there"
                raise ValueError(checks.message(expected, received, remedy))

    def _labels(self, labels: Any, rank: int, shape: tuple[int | None, ...]) -> Any:
        """The labels of the tokens as int32, or None if the labels belong to something else."""
        if labels is None:
            return None
        labels = ops.convert_to_tensor(labels)
        if len(labels.shape) == rank and labels.shape[-1] == 1:
            labels = ops.squeeze(labels, axis=-1)
        return ops.cast(_rows("labels", labels, shape), "int32") if len(labels.shape) == 2 else None

    def _marked(self, inputs: Any) -> Any:
        if callable(self.mask):
            return ops.convert_to_tensor(self.mask(inputs))
        if not isinstance(inputs, Mapping) or self.mask not in inputs:
            received = f"mask={self.mask!r} and {_described(inputs)}"
            remedy = "Pass a key of the inputs, or a function of them."
            raise ValueError(checks.message("`mask` to say where the inputs keep the mask", received, remedy))
        return ops.convert_to_tensor(inputs[self.mask])


def token_numbers(inputs: Any) -> Any:
    """The token numbers that a model reads, shape ``(B, T)``, or None if the inputs do not name them.

    Args:
        inputs: The inputs of a batch.
    """
    if isinstance(inputs, Mapping):
        if "mask_positions" in inputs:  # the logits stand at these positions alone
            return None
        names = [f"{prefix}{name}" for prefix in _prefixes(inputs) for name in _TOKENS]
        return next((inputs[name] for name in names if name in inputs), None)
    whole = hasattr(inputs, "dtype") and "int" in str(inputs.dtype)
    return inputs if whole else None


def _prefixes(inputs: Mapping[str, Any]) -> list[str]:
    """The prefix of the inputs that belong to the logits: the decoder's, if the model has an encoder too."""
    return ["decoder_"] if any(str(name).startswith("decoder_") for name in inputs) else [""]


def _padding_of(inputs: Any) -> list[Any]:
    """The entries of the inputs that are 0 at padding."""
    if not isinstance(inputs, Mapping) or "mask_positions" in inputs:
        return []
    names = [f"{prefix}{name}" for prefix in _prefixes(inputs) for name in _PADDING]
    return [inputs[name] for name in names if inputs.get(name) is not None]


def _borders(inputs: Any, padding: Sequence[Any], shape: tuple[int | None, ...]) -> Iterator[Any]:
    """True where the next token begins another document, shape ``(B, T)``."""
    entries = inputs if isinstance(inputs, Mapping) else {}
    places, documents = entries.get("position_ids"), entries.get("seq_idx")
    for pairs in map(_pairs_of, _padding_of(inputs)):
        if pairs is not None and not checks.shapes_differ(tuple(pairs.shape[1:]), (shape[1], shape[1])):
            seen = _as_numbers(ops.cast(pairs, "bool"))
            itself, before = ops.einsum("btt->bt", seen), ops.einsum("btt->bt", seen[:, 1:, :-1])
            # where a token does not see the one before it
            yield ops.greater(_moved(itself, 0), ops.pad(before, [[0, 0], [0, 1]]))
    if places is not None and len(places.shape) == 3:  # of time, height and width, for each token
        places = ops.max(places, axis=0)
    if _fits(places, shape):
        places, tokens = _as_numbers(places), token_numbers(inputs)
        border = ops.equal(_moved(places, 1), 0)
        if not padding and _fits(tokens, shape):
            border = _all([border, ops.logical_not(_moved(_padding_at_0(places, tokens), False))])
        yield border
    if _fits(documents, shape):
        numbers = _as_numbers(documents)
        yield ops.not_equal(numbers, _moved(numbers, 0))
    for rows in padding:
        following = _moved(rows, 0)
        yield _all([ops.not_equal(rows, following), ops.not_equal(rows, 0), ops.not_equal(following, 0)])


def _padding_at_0(places: Any, tokens: Any) -> Any:
    """True at the end of a row that repeats a token at place 0: padding, where no mask tells it from documents."""
    repeated = _as_numbers(_all([ops.equal(places, 0), ops.equal(tokens, tokens[:, -1:])]))
    ends = ops.flip(ops.cumprod(ops.flip(repeated, axis=1), axis=1), axis=1)
    return _all([ops.greater(ends, 0), ops.greater(ops.sum(ends, axis=1, keepdims=True), 1)])


def _pairs_of(mask: Any) -> Any:
    """A mask of pairs of tokens, shape ``(B, T, T)``, or None if the mask is one of tokens."""
    if len(mask.shape) == 4:
        return ops.convert_to_tensor(mask)[:, 0]
    return mask if len(mask.shape) == 3 else None


def _weights(sample_weight: Any, shape: tuple[int | None, ...]) -> tuple[Any, bool]:
    """The weights with two dimensions, and whether they are weights of single tokens."""
    if sample_weight is None:
        return None, False
    weights = ops.cast(sample_weight, "float32")
    if len(weights.shape) > 2 and weights.shape[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    if len(weights.shape) == 1:
        weights = ops.expand_dims(weights, axis=-1)
    if len(weights.shape) == 2 and not checks.shapes_differ(tuple(weights.shape), (shape[0], 1)):
        return weights, weights.shape[1] is None
    return _rows("sample_weight", weights, shape), True


def _rows(name: str, rows: Any, shape: tuple[int | None, ...]) -> Any:
    """The tensor, with one value for each token.

    Raises:
        ValueError: If it has another shape.
    """
    if checks.shapes_differ(tuple(rows.shape), shape):
        expected = f"`{name}` to have one value for each position of the student's logits, shape {shape}"
        remedy = "Cut or pad them to the length of the logits."
        raise ValueError(checks.message(expected, f"shape {tuple(rows.shape)}", remedy))
    return rows


def _fits(rows: Any, shape: tuple[int | None, ...]) -> bool:
    return rows is not None and not checks.shapes_differ(tuple(rows.shape), shape)


def _as_numbers(rows: Any) -> Any:
    return ops.cast(rows, "int32")


def _all(conditions: Sequence[Any]) -> Any:
    result = conditions[0]
    for condition in conditions[1:]:
        result = ops.logical_and(result, condition)
    return result


def _moved(rows: Any, last: Any) -> Any:
    """The rows one position to the left, so that position t holds the value from t + 1."""
    return ops.concatenate([rows[:, 1:], ops.full_like(rows[:, :1], last)], axis=1)


def _equal(labels: Any, tokens: Any, counts: Any) -> bool:
    enough = int(counts.sum()) >= _FEWEST
    return enough and bool(np.equal(labels, tokens)[counts].all())


def _described(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        return f"inputs with the keys {sorted(inputs)}"
    return f"inputs that are a {type(inputs).__name__}" if not keras.tree.is_nested(inputs) else "inputs without names"
