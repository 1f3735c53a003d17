"""The LightningModule around two causal language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.adapters import OptimizerCallable
from lightning_distill.functional.inputs import IGNORE_INDEX
from lightning_distill.hparams import Terms
from lightning_distill.losses import ReverseKLLoss
from lightning_distill.module import DistillModule, LRSchedulerCallable
from lightning_distill.on_policy import OnPolicyDistillation
from lightning_distill.recording import find_labels, select
from lightning_distill.recording.tokens import TokenPositions
from lightning_distill.terms import FusedLinearDistillation
from lightning_distill.terms.losses import widened


def token_labels(batch: Any) -> Tensor:
    """The labels of a batch of a causal model: its own, else its tokens without padding, shape ``(B, T)``.

    Example:
        >>> token_labels({"input_ids": torch.tensor([[5, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([[   5,    3, -100]])
    """
    if isinstance(batch, Mapping) and batch.get("labels") is None and batch.get("input_ids") is not None:
        tokens: Tensor = batch["input_ids"]
        mask = batch.get("attention_mask")
        return tokens if mask is None else tokens.masked_fill(mask == 0, IGNORE_INDEX)
    return find_labels(batch, "labels")


# those of the terms: no padding, and no borders of packed documents
_POSITIONS = TokenPositions(shift=True, ignore_index=IGNORE_INDEX, labels=token_labels)


class CausalLMDistillModule(DistillModule):
    """A :class:`DistillModule` for two causal language models that share a tokenizer.

    A batch is a dict of the student's keyword arguments, such as ``input_ids`` and ``attention_mask``, and may hold
    ``labels`` of the same shape, where -100 marks tokens that do not count; without labels all tokens count that the
    attention mask marks. Position t predicts token t + 1: labels are not shifted.

    By default neither model makes logits in training, see :class:`FusedLinearDistillation`. Logs the callback's values,
    such as ``distill/tokens_loss`` and ``distill/tokens_task_loss``, and in validation ``val_loss``, the mean cross
    entropy over all tokens in nats, and ``val_perplexity``. With a tokenizer and prompts, a continuation of each prompt
    goes to the loggers that take text after each validation epoch.

    Args:
        student: The model to train; a model of Hugging Face, or a module called with the batch's entries that returns
            the logits or a mapping with ``"logits"``.
        teacher: The model to match.
        terms: The terms; ``None`` is a FusedLinearDistillation with ``task_weight``, and with a ReverseKLLoss if
            ``on_policy`` is given. Terms that read logits are
            allowed: then the models make them, and the module adds the cross entropy with the labels.
        student_head: Path of the student's head, for the default term.
        teacher_head: Path of the teacher's head, for the default term.
        task_weight: Factor of the cross entropy with the labels, 0 or greater. A FusedLinearDistillation among
            ``terms`` has its own.
        optimizer: As in :class:`DistillModule`.
        lr_scheduler: As in :class:`DistillModule`.
        tokenizer: Encodes the prompts and decodes the continuations, with the methods ``encode`` and ``decode`` of a
            Hugging Face tokenizer.
        prompts: Texts to continue after validation.
        max_new_tokens: Number of tokens of a continuation.
        labels: Where a batch keeps its labels; ``None`` is its ``labels``, else its tokens that are not padding.
        on_policy: As in :class:`DistillModule`.
        **settings: Further arguments of :class:`DistillModule`, such as ``teacher_dtype`` and ``prog_bar``.

    Attributes:
        samples: The last continuations, by prompt.

    Raises:
        ValueError: If there are prompts without a tokenizer, or a setting is not as above.
        TypeError: If the teacher is not a module.

    Example:
        >>> class Tiny(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.embedding, self.lm_head = nn.Embedding(11, width), nn.Linear(width, 11)
        ...
        ...     def forward(self, input_ids):
        ...         return self.lm_head(self.embedding(input_ids))
        >>> module = CausalLMDistillModule(Tiny(4), Tiny(8))
        >>> module.distill.terms[0].task_weight
        1.0
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: Terms = None,
        *,
        student_head: str = "lm_head",
        teacher_head: str = "lm_head",
        task_weight: float = 1.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        tokenizer: Any = None,
        prompts: Sequence[str] = (),
        max_new_tokens: int = 32,
        labels: str | int | Callable[[Any], Tensor] | None = None,
        on_policy: OnPolicyDistillation | None = None,
        **settings: Any,
    ) -> None:
        if terms is None:
            loss = None if on_policy is None else ReverseKLLoss()
            terms = FusedLinearDistillation(student_head, teacher_head, loss=loss, task_weight=task_weight)
        if prompts and tokenizer is None:
            raise ValueError("Expected `tokenizer` to encode the prompts, but got tokenizer=None. Pass the tokenizer.")
        checks.integer("max_new_tokens", max_new_tokens)
        checks.positive("max_new_tokens", max_new_tokens)
        super().__init__(
            student,
            teacher,
            terms,
            task_weight=task_weight,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            labels=token_labels if labels is None else labels,
            on_policy=on_policy,
            **settings,  # as they are, so that a YAML file may name them too
        )
        self.tokenizer, self.prompts, self.max_new_tokens = tokenizer, list(prompts), max_new_tokens
        self.samples: dict[str, str] = {}
        self._sums: Tensor | None = None  # cross entropy and number of tokens of a validation epoch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The cross entropy of a batch, or nothing where a term makes it without logits."""
        output = self.student(**self._inputs(batch))
        if any(term.skips_heads and term.active for term in self.distill.terms):
            return None
        loss = _mean(self._cross_entropies(output, batch))
        self.log("train_loss", loss, prog_bar=True, batch_size=len(token_labels(batch)))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The mean cross entropy of a batch; its sum and its number of tokens are added up over the epoch."""
        return self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the cross entropy of a batch and its number of tokens."""
        self._evaluate(batch)

    def _evaluate(self, batch: Any) -> Tensor:
        values = self._cross_entropies(self.student(**self._inputs(batch)), batch)
        sums = torch.stack([values.sum(), values.new_tensor(len(values))]).double()
        self._sums = sums if self._sums is None else self._sums + sums
        return _mean(values)

    def on_validation_epoch_start(self) -> None:
        """At the start of validation: count from zero."""
        self._sums = None

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """At the end of validation: log loss and perplexity over all tokens of all processes, and continuations."""
        self._log_sums("val")
        if self.prompts and not self.trainer.sanity_checking:
            self.samples = {prompt: self.continued(prompt) for prompt in self.prompts}
            self._log_samples()

    def on_test_epoch_end(self) -> None:
        """At the end of a test: log loss and perplexity over all tokens of all processes."""
        self._log_sums("test")

    def _log_sums(self, prefix: str) -> None:
        sums = torch.zeros(2, dtype=torch.float64, device=self.device) if self._sums is None else self._sums
        total, count = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        if count == 0:  # in all processes: a loss of 0 would be the best of all
            return
        loss = (total / count).float()
        self.log_dict({f"{prefix}_loss": loss, f"{prefix}_perplexity": loss.exp()}, prog_bar=True)

    @torch.no_grad()
    def continued(self, prompt: str) -> str:
        """The student's likeliest continuation of a text, with the text itself.

        Args:
            prompt: The text.
        """
        mode = self.student.training
        self.student.eval()
        try:
            tokens = torch.as_tensor(_numbers(self.tokenizer.encode(prompt)), device=self.device)[None]
            for _ in range(self.max_new_tokens):  # without a cache of keys, which only some models have
                logits = self.distill.logits(self.student(input_ids=tokens))
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        finally:
            self.student.train(mode)
        text: str = self.tokenizer.decode(tokens[0].tolist())
        return text

    def _log_samples(self) -> None:
        if not self.trainer.is_global_zero:
            return
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                for index, text in enumerate(self.samples.values()):
                    logger.experiment.add_text(f"sample_{index}", text, self.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_text("samples", columns=["prompt", "continued"], data=[*map(list, self.samples.items())])

    def _inputs(self, batch: Any) -> dict[str, Any]:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"Expected a batch to be a dict of the student's keyword arguments, but got a {type(batch).__name__}."
                " Return dicts from the dataset, such as {'input_ids': ..., 'labels': ...}."
            )
        inputs: dict[str, Any] = self._of_student({name: batch[name] for name in batch if name != "labels"})
        return inputs

    def _cross_entropies(self, output: Any, batch: Any) -> Tensor:
        """The cross entropy of each token that counts, shape ``(N,)``."""
        logits, positions = select(output, None, "the student's output"), _POSITIONS.of_batch(batch)
        labels: Any = positions.labels
        return F.cross_entropy(widened(logits[positions.counts]), labels[positions.counts], reduction="none")


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(len(values), 1)  # 0 with a graph if no token counts


def _numbers(encoded: Any) -> Any:
    return getattr(encoded, "ids", encoded)  # of the tokenizers package, which returns more than the numbers
