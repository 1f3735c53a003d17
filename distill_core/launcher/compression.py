"""The second version of the older API: configuration objects, and a manager with the hooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from distill_core.launcher.conf import Configuration
from distill_core.launcher.hooks import Hooks
from distill_core.launcher.words import Words


class LossConfig:
    """Base of the configurations of criteria.

    Attributes:
        kind: The class of the criterion.
        criterion: The criterion with the settings.
        config: The settings in the form of the YAML file.
    """

    kind: ClassVar[type[Any]]

    def _make(self, **settings: Any) -> None:
        # an empty list meant the default in the older API
        settings = {name: value for name, value in settings.items() if value is not None and value != []}
        self.criterion: Any = self.kind(**settings)
        self.config: dict[str, dict[str, Any]] = {self.kind.__name__: settings}


class KnowledgeConfig(LossConfig):
    """Base of ``KnowledgeDistillationLossConfig``, whose arguments are those of the criterion."""

    def __init__(
        self,
        temperature: float = 1.0,
        loss_types: Sequence[str] = ("CE", "CE"),
        loss_weights: Sequence[float] = (0.5, 0.5),
        **settings: Any,
    ) -> None:
        self._make(temperature=temperature, loss_types=loss_types, loss_weights=loss_weights, **settings)


class IntermediateLayersConfig(LossConfig):
    """Base of ``IntermediateLayersKnowledgeDistillationLossConfig``, whose arguments are those of the criterion."""

    def __init__(
        self,
        layer_mappings: Sequence[Any],
        loss_types: Sequence[str] | None = None,
        loss_weights: Sequence[float] | None = None,
        add_origin_loss: bool = False,
        **settings: Any,
    ) -> None:
        self._make(
            layer_mappings=layer_mappings,
            loss_types=loss_types,
            loss_weights=loss_weights,
            add_origin_loss=add_origin_loss,
            **settings,
        )


class SelfKnowledgeConfig(IntermediateLayersConfig):
    """Base of ``SelfKnowledgeDistillationLossConfig``, whose arguments are those of the criterion."""

    def __init__(
        self,
        layer_mappings: Sequence[Any],
        temperature: float = 1.0,
        loss_types: Sequence[str] | None = None,
        loss_weights: Sequence[float] | None = None,
        add_origin_loss: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(layer_mappings, loss_types, loss_weights, add_origin_loss, temperature=temperature, **settings)


class DistillationConfig:
    """Base of both halves' ``DistillationConfig``.

    Attributes:
        checks: The module ``checks`` of a half.
        usual: The class of the default criterion's configuration.
        configuration: The class of a half's configuration.
    """

    checks: ClassVar[Words]
    usual: ClassVar[type[KnowledgeConfig]]
    configuration: ClassVar[type[Configuration]]

    def __init__(self, teacher_model: Any = None, criterion: Any = None, optimizer: Any = None) -> None:
        if criterion is None:
            criterion = self.usual()
        self.teacher_model = teacher_model
        self.criterion = criterion.criterion if isinstance(criterion, LossConfig) else criterion
        if isinstance(self.criterion, type) or not (callable(self.criterion) or hasattr(self.criterion, "terms")):
            expected = "`criterion` to be one of the LossConfig objects, a criterion or a function"
            raise TypeError(self.checks.message(expected, f"criterion={criterion!r}"))
        # a dict is checked like the YAML file; an optimizer is used unchanged
        train = {"optimizer": optimizer} if isinstance(optimizer, dict) else {}
        self.conf = self.configuration({"distillation": {"train": train}})
        self.optimizer = None if train else optimizer


class Callbacks:
    """The hooks of a manager; they begin the training themselves if ``on_train_begin`` was left out.

    Args:
        launcher: The launcher that does the work.
    """

    def __init__(self, launcher: Hooks) -> None:
        self._launcher = launcher

    def on_train_begin(self, dataloader: Any = None) -> None:
        """As :meth:`Distillation.on_train_begin`."""
        self._launcher.on_train_begin(dataloader)

    def on_epoch_begin(self, epoch: int) -> None:
        """As :meth:`Distillation.on_epoch_begin`."""
        self._ready().on_epoch_begin(epoch)

    def on_step_begin(self, batch_id: int) -> None:
        """As :meth:`Distillation.on_step_begin`."""
        self._ready().on_step_begin(batch_id)

    def on_after_compute_loss(
        self,
        input: Any,  # noqa: A002
        student_output: Any,
        student_loss: Any,
        teacher_output: Any = None,
    ) -> Any:
        """As :meth:`Distillation.on_after_compute_loss`."""
        return self._ready().on_after_compute_loss(input, student_output, student_loss, teacher_output)

    def on_before_optimizer_step(self) -> None:
        """As :meth:`Distillation.on_before_optimizer_step`."""
        self._ready().on_before_optimizer_step()

    def on_after_optimizer_step(self) -> None:
        """No-op: after the optimizer has stepped."""

    def on_step_end(self) -> None:
        """As :meth:`Distillation.on_step_end`."""
        self._ready().on_step_end()

    def on_before_eval(self) -> None:
        """No-op: before an evaluation."""

    def on_after_eval(self) -> None:
        """No-op: after an evaluation."""

    def on_epoch_end(self) -> None:
        """As :meth:`Distillation.on_epoch_end`."""
        self._ready().on_epoch_end()

    def on_train_end(self) -> None:
        """As :meth:`Distillation.on_train_end`."""
        self._launcher.on_train_end()

    def _ready(self) -> Hooks:
        if not self._launcher.running:
            self._launcher.on_train_begin()
        return self._launcher


class CompressionManager:
    """The student and the hooks of a training, made by ``prepare_compression``.

    The student is recorded until ``callbacks.on_train_end()`` or :meth:`close`, so a script may leave out the hooks
    that it does not need.

    Attributes:
        distiller: The launcher, whose attributes may be set: ``eval_func``, ``higher_is_better``, ...
        callbacks: The hooks.
    """

    def __init__(self, distiller: Any, model: Any, conf: DistillationConfig) -> None:
        self.distiller = distiller
        distiller.student_model, distiller.teacher_model = model, conf.teacher_model
        distiller.criterion, distiller.optimizer = conf.criterion, conf.optimizer
        self.callbacks = Callbacks(distiller)
        distiller.on_train_begin()

    @property
    def model(self) -> Any:
        """The student itself."""
        return self.distiller.student_model

    def save(self, root: str | Path) -> Path:
        """Write the student into a folder, which is created if it does not exist.

        Args:
            root: The folder.

        Returns:
            The file.
        """
        folder = Path(root)
        folder.mkdir(parents=True, exist_ok=True)
        return self._write(folder)

    def close(self) -> None:
        """Remove every hook; the student keeps its current weights."""
        self.distiller.close()

    def __enter__(self) -> CompressionManager:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, folder: Path) -> Path:
        """Write the student into a folder."""
        raise NotImplementedError


def only_config(confs: Any, checks: Words) -> Any:
    """The single configuration in the argument of ``prepare_compression``.

    Args:
        confs: A configuration, or a list with one.
        checks: The module ``checks`` of a half.

    Returns:
        The configuration.

    Raises:
        TypeError: If an entry is not a DistillationConfig.
        ValueError: If the list does not hold exactly one.
    """
    several = list(confs) if isinstance(confs, (list, tuple)) else [confs]
    for conf in several:
        if not isinstance(conf, DistillationConfig):
            remedy = "Prune and quantise with libraries for that; examples/prune_and_quantize.py combines them."
            expected = "`confs` to be a DistillationConfig"
            raise TypeError(checks.message(expected, f"a {type(conf).__name__}", remedy))
    if len(several) != 1:
        raise ValueError(checks.message("`confs` to hold one DistillationConfig", f"{len(several)} of them"))
    return several[0]
