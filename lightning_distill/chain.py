"""A chain of teacher assistants: each network teaches the next smaller one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from lightning_distill.hparams import Terms
from lightning_distill.module import DistillModule
from lightning_distill.teachers import load_teacher
from lightning_distill.terms import LogitsDistillation, ReusedClassifierDistillation, as_terms


def assistant_chain(
    networks: Sequence[nn.Module],
    terms: Terms = None,
    *,
    trainer: Callable[[], Trainer],
    folder: str | PathLike[str],
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: Any = None,
    **settings: Any,
) -> nn.Module:
    """Distil a teacher into an assistant, the assistant into a smaller one, and so on to the student.

    Each stage is a fit of a :class:`DistillModule`, with a Trainer of its own. Stage k keeps its student in
    ``<folder>/stage_<k>/student.ckpt``, a Lightning checkpoint that :func:`load_teacher` reads with
    ``prefix="student."``, and until it is finished its last epoch in ``last.ckpt``. The same call after a stop loads
    the finished stages and goes on with the one that was running; for equal results seed in ``trainer``.

    Args:
        networks: The trained teacher, the assistants and the student, from large to small, two or more.
        terms: The terms of each stage, as in :class:`DistillModule`.
        trainer: Makes the Trainer of a stage, such as ``lambda: Trainer(max_epochs=10)``; called once for each.
        folder: Where the stages are kept; several processes must all see it, and the first one writes.
        train_dataloaders: As in ``Trainer.fit``.
        val_dataloaders: As in ``Trainer.fit``.
        datamodule: As in ``Trainer.fit``.
        **settings: Further arguments of :class:`DistillModule`, such as ``optimizer`` and ``task_weight``.

    Returns:
        The student, the last network, trained and in eval mode.

    Raises:
        ValueError: If there are fewer than two networks, one of them stands twice, ``trainer`` makes the same Trainer
            twice, a kept stage is of other networks, a process does not see the folder, or a term leaves a student's
            own classifier untrained.
        TypeError: If ``trainer`` is not a function, or a network not a module.
        RuntimeError: If a fit ends before it is finished, such as by an interrupt.

    Example:
        >>> import tempfile, torch
        >>> data = torch.utils.data.TensorDataset(torch.ones(4, 4), torch.tensor([0, 1, 1, 0]))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=2)
        >>> settings = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     student = assistant_chain(
        ...         [nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)],
        ...         trainer=lambda: Trainer(max_epochs=1, enable_model_summary=False, **settings),
        ...         folder=folder,
        ...         train_dataloaders=loader,
        ...         val_dataloaders=loader,
        ...     )
        ...     sorted(str(path.relative_to(folder)) for path in Path(folder).glob("*/*"))
        ['stage_1/student.ckpt', 'stage_2/student.ckpt']

    References:
        Mirzadeh et al. (2020). Improved Knowledge Distillation via Teacher Assistant. arXiv:1902.03393.
    """
    _check(networks, trainer)
    _check_terms(terms)
    made: list[Trainer] = []
    for number, (teacher, student) in enumerate(pairwise(networks), start=1):
        stage = Path(folder) / f"stage_{number}"
        finished, running = stage / "student.ckpt", stage / "last.ckpt"
        if finished.exists():
            load_teacher(finished, student, prefix="student.")
            continue
        own = trainer()
        if any(own is other for other in made):
            raise ValueError("Expected `trainer` to make a new Trainer for each stage, but got the same one again.")
        made.append(own)
        own.callbacks.append(_KeepsLastEpoch(running))  # type: ignore[attr-defined]
        module = DistillModule(student, teacher, terms, **settings)
        ckpt_path = str(running) if running.exists() else None
        own.fit(module, train_dataloaders, val_dataloaders, datamodule, ckpt_path=ckpt_path)
        if not own.state.finished:
            raise RuntimeError(
                f"Expected the fit of stage {number} to finish, but it was interrupted. The same call goes on with it."
            )
        own.save_checkpoint(finished, weights_only=True)
        if own.is_global_zero:
            running.unlink(missing_ok=True)
        own.strategy.barrier()
        if own.world_size > 1:  # each process has statistics of its own batches, and a resumed chain those of the first
            _check_seen(finished)
            load_teacher(finished, student, prefix="student.")
    return networks[-1].eval()


def _check_seen(finished: Path) -> None:
    if not finished.exists():
        raise ValueError(
            f"Expected `folder` to be one that all processes see, but this one does not find {finished}. Pass a folder"
            " that the machines share."
        )


class _KeepsLastEpoch(Checkpoint):
    """Saves every epoch in one file. Lightning calls its kind after all other callbacks."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of an epoch: save it."""
        trainer.save_checkpoint(self._path)


def _check(networks: Sequence[nn.Module], trainer: Any) -> None:
    if len(networks) < 2:
        raise ValueError(f"Expected `networks` to be a teacher and at least one student, but got {len(networks)}.")
    for index, network in enumerate(networks):
        if not isinstance(network, nn.Module):
            raise TypeError(f"Expected `networks[{index}]` to be a module, but got {type(network).__name__}.")
        if any(network is other for other in networks[:index]):
            raise ValueError(
                f"Expected `networks` to be distinct, but networks[{index}] stands in the list twice. Pass a copy, with"
                " weights of its own."
            )
    if isinstance(trainer, Trainer) or not callable(trainer):
        raise TypeError(
            f"Expected `trainer` to be a function that makes a Trainer, one for each stage, but got a"
            f" {type(trainer).__name__}. Pass lambda: Trainer(max_epochs=10)."
        )


def _check_terms(terms: Terms) -> None:
    for term in as_terms(terms, LogitsDistillation):
        if isinstance(term, ReusedClassifierDistillation):
            raise ValueError(
                f"Expected terms that train the whole student, who teaches the next one, but {term.name!r} leaves its"
                " classifier untrained. Use a DistillModule for each stage, and teach with `deployable`."
            )
