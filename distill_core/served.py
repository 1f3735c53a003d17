"""Log-probabilities that a served model returns for tokens, checked and lined up with these tokens.

An answer is a JSON object for one sequence, in one of three forms:

- ``{"prompt_logprobs": [null, {"<token id>": {"logprob": ...}, ...}, ...]}``, as vLLM returns it, one entry for each
  token of the prompt;
- ``{"logprobs": {"tokens": [...], "top_logprobs": [null, {"<token>": ...}, ...]}}``, as OpenAI-style completions
  return it with ``echo``;
- ``{"tokens": [...], "top_logprobs": [null, {"<token id>": ...}, ...]}``, for files of your own.

Entry i holds the probabilities of token i, given the tokens before it. A logit of position i is a score of token
i + 1, so that entry i becomes row i - 1. The last row comes from the first generated token, where the answer has one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final, NamedTuple

import numpy as np

from distill_core.codecs import Likeliest
from distill_core.columns import Array
from distill_core.manifest import CacheError
from distill_core.terminal import short

TokenIds = Callable[[str], int | None]
Ask = Callable[[Sequence["Question"]], Sequence[Mapping[str, Any] | None]]

_SLACK: Final = 1e-3  # of log-probabilities that a server rounds
_PREFIX: Final = "token_id:"


@dataclass(frozen=True)
class Question:
    """A sequence whose log-probabilities are asked for.

    Attributes:
        index: Number of the sample.
        key: The sample's key; its number where it has none.
        tokens: Its tokens, without padding.
    """

    index: int
    key: str | int
    tokens: list[int]


class Answers:
    """Asks for sequences, checks the answers, and asks again for those that are missing or wrong.

    Args:
        ask: Called with questions; returns an answer for each, in their order or with an ``"index"``: that of the
            question, or its place in the call, as servers number them. ``None`` stands for an answer that is missing.
            An :class:`OSError`, such as a time-out, is a missing answer to all.
        top_k: How many of the likeliest tokens are kept.
        vocabulary: Number of the student's classes.
        token_id: The id of a token that an answer names by its text; None refuses such answers.
        retries: How often a question is asked again.
        wait: Seconds before the first repetition; each further one waits twice as long.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        top_k: int,
        vocabulary: int,
        token_id: TokenIds | None = None,
        retries: int = 3,
        wait: float = 1.0,
    ) -> None:
        self.ask, self.top_k, self.vocabulary, self.token_id = ask, top_k, vocabulary, token_id
        self.retries, self.wait = retries, wait

    def __call__(self, questions: Sequence[Question]) -> list[Likeliest]:
        """The likeliest tokens at each position of each sequence.

        Args:
            questions: The sequences.

        Returns:
            A row for each token of each sequence.

        Raises:
            CacheError: If an answer is missing or wrong after the last repetition; the message names the samples.
        """
        rows: dict[int, Likeliest] = {}
        problems: dict[int, str] = {}
        for attempt in range(self.retries + 1):
            waiting = [question for question in questions if question.index not in rows]
            if not waiting:
                break
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            problems = self._ask(waiting, rows)
        if problems:
            index, problem = next(iter(problems.items()))
            others = f" ({len(problems)} samples of {len(questions)} have no answer)" if len(problems) > 1 else ""
            raise CacheError(
                f"Expected the answer for sample {index} to be complete after {self.retries + 1} tries, but {problem}"
                f"{others}. Samples that were stored stay: call it again to ask for the rest."
            )
        return [rows[question.index] for question in questions]

    def _ask(self, questions: Sequence[Question], rows: dict[int, Likeliest]) -> dict[int, str]:
        """Ask once; add the rows of good answers, and return what is wrong with the others by sample."""
        try:
            answers = _in_order(_listed(self.ask(questions)), questions)
        except OSError as problem:
            return {question.index: f"asking failed: {problem}" for question in questions}
        problems = {}
        for question, answer in zip(questions, answers, strict=True):
            read = self._read(answer, question)
            if isinstance(read, str):
                problems[question.index] = read
            else:
                rows[question.index] = read
        return problems

    def _read(self, answer: Mapping[str, Any] | None, question: Question) -> Likeliest | str:
        """The rows of an answer, or what is wrong with it."""
        try:
            return rows_of_answer(answer, question.tokens, self.top_k, self.vocabulary, self.token_id)
        except ValueError as problem:
            return str(problem)


def _listed(answers: Any) -> list[Mapping[str, Any] | None]:
    """The answers that a function has returned, after a check that they are a list."""
    if not isinstance(answers, (list, tuple)) or any(
        not isinstance(answer, Mapping) and answer is not None for answer in answers
    ):
        raise CacheError(
            "Expected `ask` to return a list with an answer for each question, a dict or None, but got"
            f" {short(answers)}."
        )
    return list(answers)


def _in_order(
    answers: Sequence[Mapping[str, Any] | None], questions: Sequence[Question]
) -> list[Mapping[str, Any] | None]:
    """The answers in the order of the questions; ``None`` where one is missing, or nobody knows which one is."""
    count = len(questions)
    present = {answer["index"]: answer for answer in answers if answer is not None and "index" in answer}
    if not present:
        return list(answers) if len(answers) == count else [None] * count
    numberings = (range(count), [question.index for question in questions])
    placed = [[present.get(number) for number in numbers] for numbers in numberings if present.keys() <= {*numbers}]
    return placed[0] if placed and placed[0] == placed[-1] else [None] * count


def rows_of_answer(
    answer: Mapping[str, Any] | None,
    tokens: Sequence[int],
    top_k: int,
    vocabulary: int,
    token_id: TokenIds | None = None,
) -> Likeliest:
    """The likeliest tokens at each position of a sequence, from a served model's answer.

    Args:
        answer: The answer, in one of the forms of this module.
        tokens: The sequence's tokens, of which there are T.
        top_k: How many of the likeliest tokens are kept.
        vocabulary: Number of the student's classes.
        token_id: The id of a token that is named by its text.

    Returns:
        T rows. Without a generated token the last row is unknown: NaN.

    Raises:
        ValueError: With what is wrong with the answer, in words.

    Example:
        >>> answer = {"tokens": [4, 2], "top_logprobs": [None, {"2": -0.1, "5": -3.0}]}
        >>> rows_of_answer(answer, [4, 2], top_k=2, vocabulary=6).classes
        array([[2, 5],
               [0, 1]])
    """
    form = _Form.of(answer)
    if form.tokens is not None:
        _check_tokens([form.id(name, token_id) for name in form.tokens], tokens)
    if len(form.entries) != len(tokens):
        raise ValueError(
            f"it has {len(form.entries)} positions for {len(tokens)} tokens: truncated, or of another sample"
        )
    if form.entries[0]:
        raise ValueError(
            "its first entry is not None: entry i holds the log-probabilities of token i, and the first token has none"
        )
    classes, logs = np.empty((2, len(tokens), top_k))
    classes[-1], logs[-1] = np.arange(top_k), math.nan
    for position, entry in enumerate([*form.entries[1:], form.last]):
        is_last = position == len(tokens) - 1
        if is_last and entry is None:
            break
        if not isinstance(entry, Mapping):
            raise ValueError(f"it has no log-probabilities for the token after position {position}")
        values = {form.id(name, token_id): _number(value, position) for name, value in entry.items()}
        if form.holds_own and not is_last and int(tokens[position + 1]) not in values:
            raise ValueError(
                f"it lacks the sample's own token {tokens[position + 1]} after position {position}: it is the answer to"
                " other tokens"
            )
        classes[position], logs[position] = _likeliest(values, position, top_k, vocabulary)
    if form.tokens is None and not form.holds_own:
        raise ValueError("it has no 'tokens', by which it is compared with the sample")
    return Likeliest(classes.astype("int64"), logs.astype("float32"), vocabulary)


class _Form(NamedTuple):
    """The parts of an answer.

    Attributes:
        entries: The log-probabilities of each token, the first of which has none.
        tokens: The names of the tokens, if the answer has them.
        last: The log-probabilities of the token after the last one, if the answer has them.
        holds_own: Whether each entry holds the sequence's own token, likely or not.
        by_text: Whether tokens are named by their texts, unless they begin with ``"token_id:"``.
    """

    entries: list[Any]
    tokens: list[Any] | None = None
    last: Any = None
    holds_own: bool = False
    by_text: bool = False

    @classmethod
    def of(cls, answer: Any) -> _Form:
        """The parts of an answer in any of the forms."""
        if answer is None:
            raise ValueError("it is missing")
        if not isinstance(answer, Mapping):
            raise ValueError(f"it is a {type(answer).__name__} and not an object")
        after = answer.get("logprobs")
        if isinstance(answer.get("prompt_logprobs"), list):
            generated = after.get("top_logprobs") if isinstance(after, Mapping) else None
            last = generated[0] if generated else None
            return cls(answer["prompt_logprobs"], last=last, holds_own=True)
        listed = after if isinstance(after, Mapping) else answer
        if isinstance(listed.get("content"), list):
            raise ValueError(
                "it has the probabilities of generated tokens alone: ask for those of the sample's own tokens, with"
                " prompt_logprobs or with echo"
            )
        entries, tokens = listed.get("top_logprobs"), listed.get("tokens")
        if not isinstance(entries, list):
            raise ValueError(f"it has neither prompt_logprobs nor top_logprobs, only {', '.join(map(str, answer))}")
        tokens = tokens if tokens is None or isinstance(tokens, list) else np.asarray(tokens).tolist()
        if tokens is not None and (not isinstance(tokens, list) or len(tokens) != len(entries)):
            raise ValueError(f"it has {len(entries)} entries of log-probabilities and another number of tokens")
        return cls(entries, tokens, by_text=listed is after)

    def id(self, name: Any, token_id: TokenIds | None) -> int:
        """The id of a token that the answer names."""
        text = str(name)
        by_text = self.by_text and not text.startswith(_PREFIX)
        if by_text and token_id is None:
            raise ValueError(f"it names the token {text!r} by its text: ask for token ids, or pass token_id=")
        if by_text and token_id is not None:
            number = token_id(text)
            if number is None:
                raise ValueError(f"it names the token {text!r}, which the tokenizer does not have: ask for token ids")
            return int(number)
        text = text.removeprefix(_PREFIX)
        if not text.isascii() or not text.isdigit():
            raise ValueError(f"it names the token {text!r}, which is not a token id")
        return int(text)


def _check_tokens(named: Sequence[int], tokens: Sequence[int]) -> None:
    for position, (answered, asked) in enumerate(zip(named, tokens, strict=False)):
        if answered != asked:
            raise ValueError(
                f"it has token {answered} at position {position}, where the sample has token {asked}: it is of another"
                " sample, tokenizer or template"
            )


def _likeliest(values: Mapping[int, float], position: int, top_k: int, vocabulary: int) -> tuple[Array, Array]:
    """The k likeliest tokens of an entry and their log-probabilities."""
    if max(values, default=-1) >= vocabulary:
        raise ValueError(f"it names token {max(values)} after position {position}, and the vocabulary has {vocabulary}")
    if len(values) < top_k:
        raise ValueError(f"it has {len(values)} log-probabilities after position {position}, and top_k={top_k}")
    total = math.fsum(math.exp(value) for value in values.values())
    if total > 1 + _SLACK:
        raise ValueError(
            f"its probabilities after position {position} add up to {total:.4g}: ask for log-probabilities at a"
            " temperature of 1, before any filter of the sampler"
        )
    kept = sorted(values.items(), key=lambda pair: (-pair[1], pair[0]))[:top_k]
    return np.array([token for token, _ in kept]), np.array([value for _, value in kept])


def _number(value: Any, position: int) -> float:
    number = value.get("logprob") if isinstance(value, Mapping) else value
    if isinstance(number, bool) or not isinstance(number, Real) or not float("-inf") < float(number) <= _SLACK:
        raise ValueError(f"it has the log-probability {number!r} after position {position}")
    return float(number)
