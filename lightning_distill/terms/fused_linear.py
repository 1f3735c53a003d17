"""The term that compares token distributions straight from what goes into the two heads, without logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_distill import checks
from lightning_distill.losses import (
    AlphaBetaLoss,
    DistillationLoss,
    GeneralizedJSDLoss,
    ReverseKLLoss,
    SkewKLLoss,
    SoftTargetLoss,
    TotalVariationLoss,
)
from lightning_distill.recording import Call, Tap
from lightning_distill.schedules import Weight
from lightning_distill.terms.losses import Mask
from lightning_distill.terms.tokens import SequenceDistillation


class FusedLinearDistillation(SequenceDistillation):
    """:class:`SequenceDistillation` without logits: for large vocabularies, where they take most of the memory.

    In a training step both heads are skipped. The loss and its gradients are made from the heads' inputs and matrices,
    a few tokens at a time, by :func:`functional.fused_linear_divergence`. In the place of the logits stands a tensor
    that has their shape and raises an error in words if it is used, so call the student without labels::

        def training_step(self, batch, batch_idx):
            self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    The step returns nothing, or a loss of your own that needs no logits. A sequence-to-sequence model then wants
    ``decoder_input_ids``. Soft caps and factors of the logits (Gemma 2, Cohere, Granite) are learned from what the
    models do after their heads; if there are any, the first call of the student is made twice. A bias of the head, tied
    embeddings, a frozen head and a LoRA of PEFT on the head are honoured; other heads are refused in words. Without
    gradients, as in validation and generation, the heads make logits as usual.

    The student's head must be called once in each call of the student, and the teacher must be a network.

    Args:
        student_head: Path of the student's head, an ``nn.Linear`` without a softmax behind it.
        teacher_head: Path of the teacher's head.
        loss: A :class:`SoftTargetLoss`, :class:`ReverseKLLoss`, :class:`GeneralizedJSDLoss`, :class:`SkewKLLoss`,
            :class:`TotalVariationLoss` or :class:`AlphaBetaLoss`; ``None`` is a SoftTargetLoss at temperature 1.
        weight: Factor of the divergence in the total loss, a number or a schedule.
        task_weight: Factor of the cross entropy with the labels, made in the same pass, 0 or greater. It is logged as
            ``<name>_task_loss``, and stays at a weight of 0.
        shift: As in :class:`SequenceDistillation`.
        ignore_index: As in :class:`SequenceDistillation`.
        labels: As in :class:`SequenceDistillation`.
        mask: As in :class:`SequenceDistillation`, without a pair.
        chunk_size: Tokens at a time; ``None`` chooses by the device.
        name: Name in logs and checkpoints.

    Raises:
        TypeError: If ``loss`` is another loss, or a setting has the wrong type.
        ValueError: If a setting is not as above.

    References:
        Hsu et al. (2024). Liger Kernel. arXiv:2410.10989.
    """

    skips_heads = True

    def __init__(
        self,
        student_head: str = "lm_head",
        teacher_head: str = "lm_head",
        *,
        loss: DistillationLoss | None = None,
        weight: Weight = 1.0,
        task_weight: float = 0.0,
        shift: bool = True,
        ignore_index: int = -100,
        labels: Mask | None = None,
        mask: Mask | None = None,
        chunk_size: int | None = None,
        name: str = "tokens",
    ) -> None:
        super().__init__(
            loss, weight=weight, shift=shift, ignore_index=ignore_index, labels=labels, mask=mask, name=name
        )
        checks.non_negative("task_weight", task_weight)
        if chunk_size is not None:
            checks.integer("chunk_size", chunk_size)
            checks.positive("chunk_size", chunk_size)
        self.divergence()
        if self.teacher_tokens is not None:
            raise ValueError("Expected `mask` to be one place, but got a pair. Use SequenceDistillation for it.")
        self.student_head, self.teacher_head = student_head, teacher_head
        self.task_weight, self.chunk_size = task_weight, chunk_size
        # the search for the student and the checks of the layers' names read these
        self.student_taps = (Tap(student_head, where="input"),)
        self.teacher_taps = (Tap(teacher_head, where="input"),)

    @property
    def logged_names(self) -> list[str]:
        """Names of the values that the term logs."""
        return [*super().logged_names, f"{self.name}_task_loss"]

    @property
    def active(self) -> bool:
        """Whether the term has any work: the divergence or the cross entropy."""
        return self.weight != 0 or self.task_weight != 0

    def divergence(self) -> dict[str, Any]:
        """The loss as settings of :func:`functional.fused_linear_divergence`.

        Raises:
            TypeError: If it is another loss.
        """
        loss = self.loss
        if self.curriculum is not None:
            raise TypeError(
                "Expected the temperature to be a number or a schedule in a FusedLinearDistillation, which has no"
                " gradient for it, but got a CurriculumTemperature. Use SequenceDistillation."
            )
        kinds = {SoftTargetLoss: "kl", ReverseKLLoss: "reverse_kl", TotalVariationLoss: "total_variation"}
        if type(loss) in kinds and not getattr(loss, "standardize", False):
            return {"divergence": kinds[type(loss)], "temperature": loss.temperature}
        if type(loss) is GeneralizedJSDLoss:
            return {"divergence": "jsd", "temperature": loss.temperature, "beta": loss.beta}
        if type(loss) is SkewKLLoss:
            return {"divergence": "skew_reverse_kl" if loss.reverse else "skew_kl", "skew": loss.skew}
        if type(loss) is AlphaBetaLoss:
            exponents = {"alpha": loss.alpha, "beta": loss.beta}
            return {"divergence": "alpha_beta", "temperature": loss.temperature, **exponents}
        raise TypeError(
            "Expected `loss` to be a SoftTargetLoss without standardize, ReverseKLLoss, GeneralizedJSDLoss, SkewKLLoss,"
            f" TotalVariationLoss or AlphaBetaLoss, but got {loss!r}. Use SequenceDistillation for other losses."
        )

    def weighted(self, value: Tensor) -> Tensor:
        """The value itself: it holds both weights already."""
        return value

    def check_scores(self, student: Call, teacher: Call) -> None:
        """Raise if the labels are aligned otherwise than ``shift`` says, or the teacher reads other tokens, once."""
        if student.skipped is None:
            return  # `forward` says so
        self.check_tokens(student, teacher, self.tokens.of_call(student, student.skipped.length))

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """In training the weighted sum of divergence and cross entropy, a scalar; else the divergence of the logits.

        Raises:
            ValueError: If the student's head was not called, or the teacher reads another prompt.
        """
        if not student.trains:
            return super().forward(student, teacher, labels)
        if student.skipped is None:
            raise ValueError(
                f"Expected the student to call its head {self.student_head!r} with gradients, but it did not. Name the"
                " head that it calls: FusedLinearDistillation(student_head=...)."
            )
        if self._has_own_prompt(student, teacher):
            raise ValueError(
                "Expected the teacher to read the student's tokens where the heads are skipped, but got teacher inputs"
                " with labels of their own. Use SequenceDistillation, which matches the tokens of two prompts; for the"
                " same tokens leave the labels out of the teacher's inputs."
            )
        losses = student.skipped.losses
        student.logged[f"{self.name}_loss"] = losses.divergence
        if self.task_weight and not student.own_text:
            student.logged[f"{self.name}_task_loss"] = losses.cross_entropy
        value: Tensor = student.skipped.value(student)
        return value
