"""Text of the student under a Trainer: which batch a step is at, and the batches that it will come to."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_distill import compat
from lightning_distill.on_policy import OnPolicyBatches, OnPolicyDistillation
from lightning_distill.recording.student import StudentFinder


class TrainerTexts:
    """The text that the student writes in a fit.

    Args:
        settings: The settings.
        trainer: The Trainer.
        student: Finds the student.
        terms: The owner's terms.
        labels: Where the owner says that a batch keeps its labels.

    Raises:
        MisconfigurationException: If the student cannot write under the strategy, or the step gets no batch.
    """

    def __init__(
        self, settings: OnPolicyDistillation, trainer: Trainer, student: StudentFinder, terms: Any, labels: Any
    ) -> None:
        step = trainer.lightning_module.training_step
        strategies = [name for name in ("DeepSpeedStrategy", "FSDPStrategy") if compat.has_strategy(trainer, name)]
        if strategies or "dataloader_iter" in inspect.signature(step).parameters:
            raise MisconfigurationException(
                "Expected on_policy with a `training_step` that gets a batch, on one device, or with DDP or"
                f" ModelParallelStrategy, but got {(*strategies, 'a step with `dataloader_iter`')[0]}. Pass"
                " on_policy=None, or change it."
            )
        process = getattr(trainer.strategy, "distributed_sampler_kwargs", {}).get("rank", 0)  # the one of the data
        self._batches = OnPolicyBatches(settings, student, terms, labels, process)
        self._trainer = trainer
        self.check = self._batches.check

    @property
    def changed(self) -> bool:
        """Whether a batch had another prompt in its step than when it was loaded."""
        return self._batches.changed

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
        """The arguments of a training step, and whether the batch in them is text of the student.

        Args:
            args: The positional arguments of the step.
            kwargs: Its keyword arguments.
        """
        batch, own_text = self._batches.at(self._position(0), args[0] if args else kwargs["batch"])
        return ((batch, *args[1:]), kwargs, own_text) if args else (args, {**kwargs, "batch": batch}, own_text)

    def ahead(self, batch: Any, steps: int) -> Any:
        """A batch of the loader as a coming step of the same optimizer step will get it.

        The student's weights are the same in all micro-batches of an optimizer step, and so is the text.

        Args:
            batch: The batch.
            steps: Number of steps until then.
        """
        if steps == 1:
            self._batches.forget()
        moved = move_data_to_device(batch, self._trainer.strategy.root_device)
        return self._batches.ahead(self._position(steps), moved)

    def _position(self, steps: int) -> tuple[int, int]:
        return self._trainer.current_epoch, self._trainer.fit_loop.batch_idx + steps
