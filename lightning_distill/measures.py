"""Means of the step values over an epoch, and the agreement with the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_distill.metrics import TeacherAgreement

Reduce = Callable[[Tensor], Tensor]
_PENDING = 256  # sums are taken this rarely, since every operation on single numbers shows in a short step


class Means:
    """Means of named scalars over the batches of an epoch, weighted by the number of examples.

    Args:
        names: The names, equal in all processes.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._pending: list[tuple[Mapping[str, Tensor], int, Mapping[str, Tensor]]] = []
        self._sums: Tensor | None = None  # a row of weighted sums and a row of weights

    def add(self, values: Mapping[str, Tensor], size: int, sizes: Mapping[str, Tensor] | None = None) -> None:
        """Add the values of a batch.

        Args:
            values: Detached scalars by name; names may be missing.
            size: Number of examples.
            sizes: By name, another number that a value is the mean of, such as tokens.
        """
        self._pending.append((values, size, sizes or {}))
        if len(self._pending) >= _PENDING:
            self._flush()

    def _flush(self) -> None:
        for index, name in enumerate(self._names):
            present = [(values[name], sizes.get(name, size)) for values, size, sizes in self._pending if name in values]
            if not present:
                continue
            values = torch.stack([value.float().reshape(()) for value, _ in present])  # a loss may have shape (1,)
            sizes = _stacked([size for _, size in present], values.device)
            if self._sums is None:
                self._sums = torch.zeros(2, len(self._names), device=values.device)
            self._sums[0, index] += (values * sizes).sum()
            self._sums[1, index] += sizes.sum()
        self._pending = []

    def compute(self, device: torch.device, reduce: Reduce) -> dict[str, Tensor]:
        """The means since the last reset; only names that had a value in some process.

        Args:
            device: Device of the result.
            reduce: The sum of a tensor over all processes.
        """
        self._flush()
        sums = torch.zeros(2, len(self._names), device=device) if self._sums is None else self._sums
        totals, weights = reduce(sums.clone())
        return {
            name: totals[index] / weights[index]
            for index, (name, weight) in enumerate(zip(self._names, weights.tolist(), strict=True))
            if weight > 0
        }

    def reset(self) -> None:
        """Start over."""
        self._pending, self._sums = [], None


def _stacked(sizes: list[int | Tensor], device: torch.device) -> Tensor:
    """Numbers of Python or scalars on the device as one float32 tensor there; the host does not wait for the device."""
    if all(isinstance(size, Tensor) for size in sizes):
        return torch.stack([size.to(torch.float32) for size in sizes])  # type: ignore[union-attr]
    return torch.tensor(sizes, dtype=torch.float32).to(device, non_blocking=True)


class LoaderMeasures:
    """The measurements of validation on one loader.

    Args:
        names: Names of the losses.
    """

    def __init__(self, names: list[str]) -> None:
        self.losses = Means(names)
        self.agreement: TeacherAgreement | None = None

    def agree(self, student: Tensor, teacher: Tensor, mask: Tensor | None, class_dim: int | None) -> None:
        """Count a batch.

        Args:
            student: The student's logits.
            teacher: The teacher's logits.
            mask: The positions that count; ``None`` is all of them.
            class_dim: Dimension that counts the classes; ``None`` leaves it to the shape.
        """
        if self.agreement is None:
            self.agreement = TeacherAgreement(class_dim=class_dim).to(student.device)
        self.agreement.update(student, teacher, mask=mask)

    def agreement_counts(self, device: torch.device) -> Tensor:
        """How many rows agreed and how many were seen in this process, two whole numbers."""
        if self.agreement is None:
            return torch.zeros(2, dtype=torch.int64, device=device)
        return torch.stack([self.agreement.total, self.agreement.count]).to(device)


class Validation:
    """The measurements of a validation epoch: the terms' losses and the agreement with the teacher, by loader.

    Args:
        step: The step, which measures a batch.
        settings: The object with the task weight.
        names: Names of the losses.
    """

    def __init__(self, step: Any, settings: Any, names: list[str]) -> None:
        self._step, self._settings, self._names = step, settings, names
        self._loaders: dict[int, LoaderMeasures] = {}

    def reset(self) -> None:
        """Count from zero."""
        self._loaders = {}

    def add(self, batch: Any, loader: int, output: Any) -> None:
        """Measure a batch, from the student's calls that were recorded.

        Args:
            batch: The batch.
            loader: Index of its loader.
            output: The result of the validation step.

        Raises:
            ValueError: If the outputs cannot be compared.
        """
        step = self._step
        losses, pairs = step.measure(batch)
        if not losses and not pairs:
            return
        measures = self._loaders.setdefault(loader, LoaderMeasures(self._names))
        values = {f"{name}_loss": value.detach() for name, value in losses.items()}
        task_loss = output.get("loss") if isinstance(output, Mapping) else output
        if len(losses) == len(step.terms) and isinstance(task_loss, Tensor) and task_loss.ndim == 0:
            values["task_loss"] = task_loss.detach()
        measures.losses.add(values, step.batch_size, {f"{name}_loss": size for name, size in step.counted.items()})
        scored = next((term for term in step.terms if term.compares_class_scores), None)
        for student, teacher, mask in pairs:
            measures.agree(student, teacher, mask, getattr(scored, "class_dim", None))

    def _with_totals(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means with the weighted sums of the terms, which are means over examples or over tokens."""
        terms = self._step.terms
        if not terms or any(f"{term.name}_loss" not in means for term in terms):
            return means
        distillation = sum((term.weight * means[f"{term.name}_loss"] for term in terms), torch.zeros(()))
        totals = {"distillation_loss": distillation}
        if "task_loss" in means:
            totals["loss"] = self._settings.task_weight * means["task_loss"] + distillation
        everything = {**means, **totals}
        return {name: everything[name] for name in self._names if name in everything}

    def results(self, loaders: int, device: torch.device, reduce: Reduce) -> dict[str, Tensor]:
        """The measurements over all processes, by their names in the logs.

        Args:
            loaders: Number of validation loaders; all processes take part in the sums of each.
            device: Device of the results.
            reduce: The sum of a tensor over all processes.
        """
        results: dict[str, Tensor] = {}
        for index in range(loaders):
            suffix = f"/dataloader_idx_{index}" if loaders > 1 else ""
            measures = self._loaders.get(index) or LoaderMeasures(self._names)
            for name, value in self._with_totals(measures.losses.compute(device, reduce)).items():
                results[f"val_{name}{suffix}"] = value
            agreeing, rows = reduce(measures.agreement_counts(device))
            if rows > 0:
                results[f"val_teacher_agreement{suffix}"] = agreeing.float() / rows.float()
        self.reset()
        return results
