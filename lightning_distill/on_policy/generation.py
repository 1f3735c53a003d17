"""The student continues prompts: in eval mode, without gradients, and with random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill import compat
from lightning_distill.on_policy.sequences import Continued, Prompts, up_to_end
from lightning_distill.on_policy.settings import OnPolicyDistillation
from lightning_distill.processes import world_size
from lightning_distill.recording.student import StudentFinder
from lightning_distill.teachers.self_teacher import evaluated

_REMEDY = "Pass OnPolicyDistillation(generate=<function>), which continues prompts."
# Settings of Hugging Face's `generate` with which it writes something else than the model's probabilities say, and the
# values with which they do nothing. Left out are those of `top_k` and `top_p`, which it sets where nobody does.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p"), 1.0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty"), 0.0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
    **dict.fromkeys(("min_p", "top_h", "min_new_tokens", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("sequence_bias", "guidance_scale", "watermarking_config", "exponential_decay_length_penalty")),
    **dict.fromkeys(("forced_eos_token_id", "constraints", "force_words_ids", "prompt_lookup_num_tokens", "max_time")),
    **dict.fromkeys(("penalty_alpha", "dola_layers")),
}


class Writer:
    """A network that continues prompts.

    Args:
        settings: The settings.
        student: Finds the student.

    Attributes:
        network: The network.
        pad: The token for padding.

    Raises:
        ValueError: If no network in it can continue prompts, or several can.
    """

    def __init__(self, settings: OnPolicyDistillation, student: StudentFinder) -> None:
        self._settings = settings
        self.network = _writing(student, settings.generate is not None)
        self._config = getattr(self.network, "config", None)
        self._ends = _listed(
            self._configured("eos_token_id") if settings.eos_token_ids is None else settings.eos_token_ids
        )
        pad = self._configured("pad_token_id") if settings.pad_token_id is None else settings.pad_token_id
        self.pad: int = pad if isinstance(pad, int) else [*self._ends, 0][0]

    def _configured(self, name: str) -> Any:
        for place in (getattr(self.network, "generation_config", None), self._config):
            if (value := getattr(place, name, None)) is not None:
                return value
        return None

    @property
    def decodes(self) -> bool:
        """Whether it has an encoder for the prompts and a decoder for the continuations."""
        return bool(getattr(self._config, "is_encoder_decoder", False))

    def continued(self, prompts: Prompts, seed: int) -> Continued:
        """The prompts and their continuations.

        Args:
            prompts: The prompts.
            seed: Seed of the random numbers.

        Raises:
            ValueError: If they would be longer than the network allows, or ``generate`` returns something else.
        """
        length, longest = prompts.tokens.shape[1], getattr(self._config, "max_position_embeddings", None)
        needed = length + self._settings.max_new_tokens
        if isinstance(longest, int) and not self.decodes and needed > longest:
            raise ValueError(
                f"Expected prompt and continuation to have at most {longest} tokens, as many as the student has"
                f" positions, but got {length} and max_new_tokens={self._settings.max_new_tokens}. Pass a smaller"
                " max_new_tokens, or shorten the prompts."
            )
        with evaluated(self.network), _seeded(self.network, seed):
            written = self._generate(prompts)
        tokens = self._new_tokens(written, prompts)
        mask = up_to_end(tokens, self._ends)
        return Continued(prompts, tokens.masked_fill(~mask, self.pad), mask)

    def _generate(self, prompts: Prompts) -> Any:
        settings = self._settings
        arguments: dict[str, Any] = {
            "input_ids": prompts.tokens,
            "attention_mask": prompts.mask.long(),
            "max_new_tokens": settings.max_new_tokens,
        }
        sharded = world_size() > 1 and any(hasattr(parameter, "full_tensor") for parameter in self.network.parameters())
        own = settings.generate is not None or not hasattr(self.network, "generation_config")
        if own and sharded:
            raise ValueError(
                "Expected the student to have the method `generate` of Hugging Face where its parameters are sharded,"
                " but got another one: processes that write texts of other lengths would wait for each other forever."
                " Use DDP, or a student of Hugging Face without OnPolicyDistillation(generate=...)."
            )
        if own:
            arguments |= {"temperature": settings.temperature, **settings.generation}
        else:
            arguments |= self._sampling() | {"synced_gpus": sharded, **settings.generation}
        network: Any = self.network
        return network.generate(**arguments) if settings.generate is None else settings.generate(network, **arguments)

    def _sampling(self) -> dict[str, Any]:
        """Arguments of Hugging Face's method: the student's own probabilities, whatever its configuration narrows."""
        configured: Any = self.network.generation_config
        fixed = {"pad_token_id": self.pad, "eos_token_id": self._ends or None, "return_dict_in_generate": False}
        fixed |= {name: value for name, value in _NEUTRAL.items() if getattr(configured, name, None) is not None}
        if self._settings.temperature == 0:
            return {**fixed, "do_sample": False}
        return {**fixed, "do_sample": True, "temperature": self._settings.temperature, "top_k": 0, "top_p": 1.0}

    def _new_tokens(self, written: Any, prompts: Prompts) -> Tensor:
        """The tokens after the prompts, or after the decoder's start token."""
        length = 1 if self.decodes else prompts.tokens.shape[1]
        limit = length + self._settings.max_new_tokens
        shape = tuple(written.shape) if isinstance(written, Tensor) else type(written).__name__
        rows = len(prompts.tokens)
        good = isinstance(written, Tensor) and written.ndim == 2 and not written.is_floating_point()
        if not good or len(written) != rows or not length < written.shape[1] <= limit:
            raise ValueError(
                f"Expected `generate` to return the prompts followed by 1 to {self._settings.max_new_tokens} new"
                f" tokens, whole numbers of the shape ({rows}, {length + 1} to {limit}), but got {shape}."
            )
        tokens: Tensor = written.to(prompts.tokens)
        if not self.decodes and bool((tokens[:, :length] != prompts.tokens)[prompts.mask].any()):
            raise ValueError(
                "Expected `generate` to return the prompts followed by the new tokens, but the first tokens that it"
                " returned are others. Return torch.cat([input_ids, new_tokens], 1)."
            )
        return tokens[:, length:].clone()  # not a tensor of inference mode


def _writing(student: StudentFinder, any_network: bool) -> nn.Module:
    """The network that writes: the student, or the only one inside a LightningModule that can."""
    root = student.root
    # Fabric's wrapper has the method of the module inside, and would call it through DDP
    while not _can_write(root) or compat.is_of_fabric(root):
        inner = compat.unwrapped(root)
        if inner is None:
            break
        root = inner
    # its `training_step` tells a LightningModule, whose own `generate` may take anything
    whole = student.named or not hasattr(root, "training_step")
    if whole and (any_network or _can_write(root)):
        return root
    trained = [child for child in root.children() if any(parameter.requires_grad for parameter in child.parameters())]
    able = [child for child in trained if any_network or _can_write(child)]
    if len(able) == 1:
        return able[0]
    if able:
        raise ValueError(
            f"Expected to know which network continues the prompts, but {type(root).__name__} has several:"
            f" {', '.join(type(network).__name__ for network in able)}. Pass student=<its path>, or student='' for the"
            " module itself."
        )
    kinds = ", ".join(type(network).__name__ for network in trained or [root])
    raise ValueError(
        f"Expected the student to have a method `generate`, but {kinds} has none: a model that predicts tokens in"
        f" place, or one that is not of Hugging Face. {_REMEDY} A model of Hugging Face is AutoModelForCausalLM or"
        " AutoModelForSeq2SeqLM."
    )


def _can_write(network: nn.Module) -> bool:
    return callable(getattr(network, "generate", None))


def _listed(tokens: Any) -> list[int]:
    return [tokens] if isinstance(tokens, int) else list(tokens or [])


@contextmanager
def _seeded(network: nn.Module, seed: int) -> Iterator[None]:
    """Torch's generators from a seed; afterwards they are as before, on the CPU and the network's devices."""
    devices = {parameter.device.index for parameter in network.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(index or 0 for index in devices)):
        torch.manual_seed(seed)
        yield
