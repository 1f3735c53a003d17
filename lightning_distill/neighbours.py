"""The other callbacks of a Trainer: those that cannot stand beside one another, and those that monitor our values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_distill.teachers import members


def check_together(callbacks: Sequence[Any], name: str) -> None:
    """Raise if the callbacks of a Trainer that distil do not fit each other.

    Args:
        callbacks: All of them.
        name: Name of the one that begins.

    Raises:
        MisconfigurationException: If so.
    """
    alike = sum(other.name == name for other in callbacks)
    if alike > 1:
        raise MisconfigurationException(
            f"Expected `name` to be distinct for each DistillCallback of a Trainer, but got name={name!r}"
            f" {alike} times. Pass name=... to all but one."
        )
    if len(callbacks) > 1 and any(other.on_policy is not None for other in callbacks):
        raise MisconfigurationException(
            f"Expected one DistillCallback where on_policy is given, since each would change the batch of the"
            f" other, but got {len(callbacks)}. Give one callback all the terms."
        )
    cached = [other.name for other in callbacks if any(hasattr(each, "as_source") for each in members(other.teacher))]
    if len(cached) > 1:
        raise MisconfigurationException(
            f"Expected one DistillCallback with a TeacherCache, since a batch carries the answers of one, but got"
            f" {cached}. Give one callback all the terms, or pass the networks of the other caches."
        )


def check_schedulers(trainer: Trainer, name: str) -> None:
    """Raise if the learning rates of several processes could differ because each reads a value of its own batches.

    Args:
        trainer: The Trainer, with its optimizers.
        name: Name of the callback that distils, with which the values after a step are logged.

    Raises:
        MisconfigurationException: If so.
    """
    for config in trainer.lr_scheduler_configs if trainer.world_size > 1 else []:
        monitor = config.monitor or ""
        of_step = monitor.startswith(f"{name}/") and monitor.endswith("loss") and not monitor.startswith(f"{name}/val_")
        if config.reduce_on_plateau and config.interval == "step" and of_step:
            raise MisconfigurationException(
                f"Expected interval='epoch' for a scheduler that monitors {monitor!r}, but got 'step': that value is of"
                " each process's own batch, so that the processes would train with different learning rates. Pass"
                " 'epoch', where it is the mean over all processes, or monitor a value logged with sync_dist=True."
            )


def monitored_names(trainer: Trainer, prefix: str) -> set[str]:
    """The logged names that a callback or a learning rate scheduler of the Trainer monitors, without their prefix.

    They may be read after any step, such as by a ``ModelCheckpoint`` with ``every_n_train_steps``.

    Args:
        trainer: The Trainer.
        prefix: The prefix of the names.
    """
    owners = [*trainer.callbacks, *trainer.lr_scheduler_configs]  # type: ignore[attr-defined]
    monitors = (getattr(owner, "monitor", None) for owner in owners)
    start = f"{prefix}/"
    return {name[len(start) :] for name in monitors if isinstance(name, str) and name.startswith(start)}
