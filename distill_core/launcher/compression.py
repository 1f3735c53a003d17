"""The names of the older API's second version: configurations as objects, and a manager with the hooks."""

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

    def _hold(self, **settings: Any) -> None:
        # an empty list meant the default in the older API
        given = {name: value for name, value in settings.items() if value is not None and value != []}
        self.criterion: Any = self.kind(**given)
        self.config: dict[str, dict[str, Any]] = {self.kind.__name__: given}


class KnowledgeConfig(LossConfig):
    """Base of ``KnowledgeDistillationLossConfig``, whose arguments are those of the criterion."""

    def __init__(
        self,
        temperature: float = 1.0,
        loss_types: Sequence[str] = ("CE", "CE"),
        loss_weights: Sequence[float] = (0.5, 0.5),
        **settings: Any,
    ) -> None:
        self._hold(temperature=temperature, loss_types=loss_types, loss_weights=loss_weights, **settings)


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
        self._hold(
            layer_mappings=layer_mappings,
            loss_types=loss_types,
            loss_weights=loss_weights,
            add_origin_loss=add_origin_loss,
            **settings,
        )


class SelfKnowledgeConfig(LossConfig):
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
        self._hold(
            layer_mappings=layer_mappings,
            temperature=temperature,
            loss_types=loss_types,
            loss_weights=loss_weights,
            add_origin_loss=add_origin_loss,
            **settings,
        )


class DistillationConfig:
    """Base of both halves' ``DistillationConfig``.

    Attributes:
        checks: The module of a half that puts its errors into words.
        usual: The configuration of the criterion where none is passed.
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
        # a dict is checked as the YAML file is, an optimizer is used as it is
        train = {"optimizer": optimizer} if isinstance(optimizer, dict) else {}
        self.conf = self.configuration({"distillation": {"train": train}})
        self.optimizer = None if train else optimizer


class Callbacks:
    """The hooks of a manager; a training begins with the first of them, called or not.

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
        """After the optimizer has stepped; nothing needs to be done."""

    def on_step_end(self) -> None:
        """As :meth:`Distillation.on_step_end`."""
        self._ready().on_step_end()

    def on_before_eval(self) -> None:
        """Before an evaluation; nothing needs to be done."""

    def on_after_eval(self) -> None:
        """After an evaluation; nothing needs to be done."""

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

    The student is recorded from the beginning until ``callbacks.on_train_end()`` or :meth:`close`, so that a script
    may leave out the hooks it does not need.

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
        """Write the student into a folder, which is made if it does not exist.

        Args:
            root: The folder.

        Returns:
            The file.
        """
        folder = Path(root)
        folder.mkdir(parents=True, exist_ok=True)
        return self._write(folder)

    def close(self) -> None:
        """Remove every hook; the student keeps its present weights."""
        self.distiller.close()

    def __enter__(self) -> CompressionManager:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, folder: Path) -> Path:
        """Write the student into a folder."""
        raise NotImplementedError


def only_config(confs: Any, checks: Words) -> Any:
    """The one configuration of distillation.

    Args:
        confs: A configuration, or a list with one.
        checks: The module of a half that puts its errors into words.

    Returns:
        The configuration.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If there are several, or none.
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
