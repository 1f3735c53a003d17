"""The settings of training on the student's own text."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_distill import checks
from lightning_distill.losses import DistillationLoss, ReverseKLLoss
from lightning_distill.schedules import Schedule, Setting
from lightning_distill.terms import SequenceDistillation

_OWN = (
    *("input_ids", "inputs", "attention_mask", "max_new_tokens", "max_length", "do_sample", "temperature"),
    *("pad_token_id", "eos_token_id", "num_return_sequences", "return_dict_in_generate", "synced_gpus"),
)


def _share(name: str, value: Any) -> None:
    checks.between(name, value, 0, 1)


class OnPolicyDistillation:
    """Trains on text that the student writes: some batches keep their prompts, and the student continues them.

    For each batch a number is drawn. With probability ``fraction`` the student continues the prompts of the batch, in
    eval mode and without gradients; ``training_step`` then gets the new ``input_ids``, ``attention_mask`` and
    ``labels``, and both models score them. Student and teacher so meet where the student goes wrong when it writes by
    itself. In such a batch the task loss is left out, since its labels are not a reference but the student's words. In
    the new batch each sequence is the prompt, then the continuation up to its end token, then padding on the right; the
    labels of prompt and padding are -100.

    The prompt is the tokens before the first label that counts. Give ``prompt`` where labels do not tell it. A model
    with an encoder and a decoder continues from the whole of ``input_ids``.

    Decisions and tokens are drawn from ``seed`` and the number of the batch alone, so that a resumed training draws the
    same; the state of torch's generators, the mode of each module and the cache of autocast are as before afterwards.
    All processes decide alike. The text of each is its own.

    Args:
        fraction: Share of the batches that the student continues, from 0 to 1; a number or a schedule.
        max_new_tokens: Number of tokens of a continuation, at most.
        temperature: Softening of the probabilities that tokens are drawn from; 0 takes the likeliest token.
        prompt: The mask of the prompts, shape ``(B, T)`` or ``(T,)``: True at the first tokens of each sequence. Pass
            its key or index in the batch, or a function of the batch that returns it. ``None`` reads the labels.
        generate: Continues the prompts in place of the student's own method ``generate``. It is called as
            ``generate(student, input_ids=..., attention_mask=..., max_new_tokens=..., temperature=...)`` with prompts
            ``(B, P)`` that are padded on the left, and returns them followed by the new tokens, ``(B, P + N)``.
        build: Makes the new batch, if a batch is not a dict with ``input_ids``. It is called as
            ``build(batch, input_ids, attention_mask, labels)`` with tensors ``(B, T)``.
        eos_token_id: The token, or tokens, that end a text. ``None`` takes those of the student's configuration, if it
            has one.
        pad_token_id: The token for padding. ``None`` takes the one of the student's configuration, else the end token,
            else 0.
        generation: Further keyword arguments of ``generate``, such as ``{"top_p": 0.9}``.
        seed: The seed of decisions and tokens.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a number is out of its range, or ``max_new_tokens`` is missing.

    Example:
        >>> on_policy = OnPolicyDistillation(0.25, max_new_tokens=16)
        >>> [on_policy.draws((0, batch)) for batch in range(6)]
        [False, True, True, True, False, False]

    References:
        Agarwal et al. (2023). On-Policy Distillation of Language Models (GKD), algorithm 1, where ``fraction`` is
        lambda. arXiv:2306.13649. A draw is for each batch, as there.
    """

    fraction = Setting(_share)
    schedules: dict[str, Schedule]

    def __init__(
        self,
        fraction: float | Schedule = 0.5,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        prompt: str | int | Callable[[Any], Tensor] | None = None,
        generate: Callable[..., Tensor] | None = None,
        build: Callable[[Any, Tensor, Tensor, Tensor], Any] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generation: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if max_new_tokens is None:
            raise ValueError(
                "Expected `max_new_tokens` to be given, but got max_new_tokens=None. Pass the number of tokens that the"
                " student adds to a prompt, such as 64."
            )
        self.fraction = fraction
        checks.integer("max_new_tokens", max_new_tokens)
        checks.positive("max_new_tokens", max_new_tokens)
        checks.non_negative("temperature", temperature)
        checks.integer("seed", seed)
        for name, function in (("generate", generate), ("build", build)):
            if function is not None and not callable(function):
                raise TypeError(f"Expected `{name}` to be a function, but got {name}={function!r}.")
        if generation is not None and not isinstance(generation, Mapping):
            raise TypeError(
                f"Expected `generation` to be a dict of arguments of `generate`, but got generation={generation!r}."
            )
        for name in (name for name in _OWN if name in (generation or {})):
            raise ValueError(
                f"Expected `generation` to leave out {name!r}, which OnPolicyDistillation sets, but got"
                f" generation={generation!r}. Pass it as an argument of OnPolicyDistillation if it has one."
            )
        ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        padding = [] if pad_token_id is None else [pad_token_id]
        for name, token in (
            *(("eos_token_id", end) for end in ends or []),
            *(("pad_token_id", pad) for pad in padding),
        ):
            checks.integer(name, token)
            checks.non_negative(name, token)
        self.max_new_tokens, self.temperature, self.seed = int(max_new_tokens), float(temperature), int(seed)
        self.prompt, self.generate, self.build = prompt, generate, build
        self.eos_token_ids, self.pad_token_id = None if ends is None else list(ends), pad_token_id
        self.generation = dict(generation or {})

    def draws(self, position: Sequence[int]) -> bool:
        """Whether the student continues a batch.

        Args:
            position: The number of the batch in the training, such as epoch and index.
        """
        return bool(self._random(position, "decision").random() < self.fraction)

    def seed_of(self, position: Sequence[int], process: int = 0) -> int:
        """The seed of the tokens of a batch, for torch's generators.

        Args:
            position: The number of the batch.
            process: Number of the process, which has other prompts than the others.
        """
        return self._random(position, f"tokens {process}").getrandbits(63)

    def _random(self, position: Sequence[int], purpose: str) -> random.Random:
        return random.Random(f"{self.seed} {list(position)} {purpose}")  # the same on every machine

    def __repr__(self) -> str:
        fraction = self.schedules.get("fraction", self.fraction)
        return (
            f"{type(self).__name__}({fraction}, max_new_tokens={self.max_new_tokens}, temperature={self.temperature},"
            f" seed={self.seed})"
        )


def reverse_term(loss: DistillationLoss | None) -> SequenceDistillation:
    """The default term for text of the student: the reverse divergence of its tokens."""
    return SequenceDistillation(ReverseKLLoss() if loss is None else loss)
