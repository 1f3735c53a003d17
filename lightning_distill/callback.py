"""The callback: when the distiller is called in a Lightning run, what is logged, what is saved."""

from __future__ import annotations

import copy
import inspect
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill import checks
from lightning_distill.adapters import OptimizerCallable, bare
from lightning_distill.cache import TeacherCache
from lightning_distill.cache.teacher import CachedTeacher
from lightning_distill.cache.training import CachedLoaders
from lightning_distill.distiller import Distiller, as_terms
from lightning_distill.metrics import TeacherAgreement
from lightning_distill.module_distiller import ModuleDistiller
from lightning_distill.outputs import select
from lightning_distill.patch import Patch
from lightning_distill.schedules import Schedule, first_value
from lightning_distill.taps import Call
from lightning_distill.teacher import as_dtype, as_teacher
from lightning_distill.terms import DistillationTerm


class DistillCallback(Callback):
    r"""Distillation added to any Trainer, with a new total in place of the loss that ``training_step`` returns.

    .. math:: \text{total} = w_{task} \, L_{task} + \sum_i w_i \, D_i(A_i(F^{student}_i), F^{teacher}_i)

    The LightningModule is left alone: nothing is registered on it or added to its optimizer, so its checkpoints are
    those of a run without the callback. With automatic optimization there is nothing else to do; with manual
    optimization add :meth:`loss` to the loss inside ``training_step``.

    Logged on log steps: ``<name>/task_loss``, ``<name>/distillation_loss``, ``<name>/<term>_loss`` (each term without
    its weight) and what schedules set, such as ``<name>/<term>_weight``; after a validation epoch
    ``<name>/val_teacher_agreement``, the share of examples on which both networks' top classes agree. A
    ``ModelCheckpoint`` with such a key in its ``filename`` needs ``auto_insert_metric_name=False``, since the slash
    would make a folder.

    Args:
        teacher: The network to match, called with what the student is called with; several, over which the terms are
            averaged; a :class:`TeacherCache` of its outputs; or ``None`` where no term needs one. A network is frozen
            while the Trainer runs, then given back as it was.
        terms: The terms; ``None`` is ``[LogitsDistillation()]``.
        student: Dotted path of the submodule that is the student. ``None`` is the module itself where its forward is
            called in the step, else the one child that is called and has the tapped layers.
        task_weight: Factor of the module's own loss, 0 or greater, or a schedule. At 0 the loss is left out altogether:
            under DDP parameters that only it uses then need ``find_unused_parameters``.
        labels: Where a batch keeps its labels: a key, an index, or a function of the batch. ``None`` is ``batch[1]``,
            or the entry ``"labels"``, ``"label"``, ``"target"`` or ``"y"``. Read only for losses that need labels.
        teacher_dtype: The teacher's precision, such as ``"bfloat16"``, whatever the trainer's.
        adapter_optimizer: Makes the adapters' optimizer from their parameters; ``None`` mirrors the student's.
        validate: Whether the agreement with the teacher is measured in validation.
        log: Whether the losses are logged.
        name: Prefix of the logged keys and key of the saved state, distinct for each callback of a Trainer.

    Raises:
        ValueError: If a setting is not as above.
        TypeError: If the teacher is no module, or a term is no :class:`DistillationTerm`.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning.pytorch import Trainer
        >>> quiet = dict(
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        ... )
        >>> callback = DistillCallback(nn.Linear(32, 2))
        >>> trainer = Trainer(callbacks=callback, max_steps=1, accelerator="cpu", log_every_n_steps=1, **quiet)
        >>> trainer.fit(BoringModel())
        >>> sorted(key for key in trainer.callback_metrics if key.startswith("distill/"))
        ['distill/distillation_loss', 'distill/logits_loss', 'distill/task_loss']

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
    """

    def __init__(
        self,
        teacher: nn.Module | TeacherCache | Sequence[nn.Module] | None,
        terms: DistillationTerm | Sequence[DistillationTerm] | None = None,
        *,
        student: str | None = None,
        task_weight: float | Schedule = 1.0,
        labels: str | int | Callable[[Any], Tensor] | None = None,
        teacher_dtype: torch.dtype | str | None = None,
        adapter_optimizer: OptimizerCallable | None = None,
        validate: bool = True,
        log: bool = True,
        name: str = "distill",
    ) -> None:
        self.schedules: dict[str, Schedule] = {}
        self.task_weight = first_value("task_weight", task_weight, checks.non_negative, self.schedules)
        if not name:
            raise ValueError(f"Expected `name` to be a word, but got name={name!r}. It prefixes the logged keys.")
        self.teacher, self.terms = as_teacher(teacher), as_terms(terms)
        self.student, self.labels = student, labels
        self.teacher_dtype, self.adapter_optimizer = as_dtype(teacher_dtype), adapter_optimizer
        self.validate, self.name = validate, name
        self._logs = log  # the Trainer puts the module's `log` on every callback
        self._state_key = self._generate_state_key(name=name)
        self.distiller: ModuleDistiller | None = None
        self._state: dict[str, Any] = {}  # what was loaded, or what an earlier process or object has learned
        self._mailbox = _mailbox()
        self._patches: list[Patch] = []
        self._agreement: dict[int, TeacherAgreement] = {}
        self._batch: Any = None
        self._explicit = self._takes_iterator = False

    # What users call and override ------------------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """The weighted distillation loss of the student's calls so far in this ``training_step``, a scalar.

        For manual optimization: add it to the loss that is differentiated. The task weight is then the user's affair.

        Raises:
            MisconfigurationException: If no training step is running.
            ValueError: If the student has not been called, a layer did not run, a shape does not fit.
        """
        if self.distiller is None or not self._patches:
            raise MisconfigurationException(
                "Expected `loss` to be called inside `training_step`, but no training is under way. Call trainer.fit."
            )
        self._explicit = True
        return self.distiller.loss(self._batch)

    def teacher_forward(self, call: Call) -> Any:
        """The teacher's output for a call of the student; override it to show the teacher another input.

        Args:
            call: The student's call, with ``call.args`` and ``call.kwargs``.

        Returns:
            The output, or with several teachers the list of their outputs.
        """
        return self.teacher(*call.args, **call.kwargs)

    def logits(self, output: Any) -> Tensor:
        """The logits in a model's output; override it for unusual outputs.

        Args:
            output: What the student or the teacher returned.

        Returns:
            The tensor itself, its ``logits``, or its first element.
        """
        return select(output, None, "the model's output")

    def adapter_state(self) -> dict[str, Any]:
        """The adapters by term and their optimizer's state, as checkpoints hold them; empty where there are none."""
        if self._mailbox.exists():  # a spawned process has trained them
            self._state = torch.load(self._mailbox, weights_only=True)
            self._mailbox.unlink()
        return self._state if self.distiller is None else self.distiller.state_dict()

    @property
    def state_key(self) -> str:
        """Key of the saved state in a checkpoint."""
        return self._state_key  # made once: Lightning asks for it before every hook

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the start of fit or validate: check, freeze the teacher, wrap the module's steps."""
        if stage not in ("fit", "validate"):
            return
        self._release()
        self._check_names(trainer)
        distiller = self._distiller_for(pl_module)
        strategies = [kind.__name__ for kind in type(trainer.strategy).__mro__]
        distiller.adapters.allowed = "DeepSpeedStrategy" not in strategies
        if not (_overrides(pl_module, "configure_model") or _overrides(pl_module, "setup")):
            distiller.check()  # else the layers may not exist yet: the first step checks
        # not by the precision plugin, which replaces layers under some settings and could not be undone
        dtype = _TRUE_PRECISIONS.get(str(trainer.precision_plugin.precision))
        distiller.frozen.freeze(trainer.strategy.root_device, dtype)
        if stage == "fit":
            distiller.begin()
            self._takes_iterator = "dataloader_iter" in inspect.signature(pl_module.training_step).parameters
            self._patches += [
                Patch(pl_module, "training_step", self._training_step),
                Patch(pl_module, "on_before_optimizer_step", self._before_optimizer_step),
            ]
            if isinstance(self.teacher, CachedTeacher):
                distiller.loaders = CachedLoaders(trainer, self.teacher.cache)
        cached = isinstance(self.teacher, CachedTeacher)  # it has not seen the validation data
        if self.validate and not cached and _overrides(pl_module, "validation_step"):
            self._patches.append(Patch(pl_module, "validation_step", self._validation_step))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the start of a validation epoch: count agreements from zero."""
        self._agreement = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of a validation epoch: log the agreement with the teacher, over all processes."""
        for index, metric in self._agreement.items():
            suffix = f"/dataloader_idx_{index}" if len(self._agreement) > 1 else ""
            key = f"{self.name}/val_teacher_agreement{suffix}"
            # the metric has counted over all processes already; their equal values have themselves as mean
            pl_module.log(key, metric.compute(), sync_dist=True, batch_size=1, add_dataloader_idx=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """With each checkpoint: add the adapters, if there are any."""
        if state := self.adapter_state():
            checkpoint.setdefault("callbacks", {})[self.state_key] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """With each restored checkpoint: take its adapters, or fresh ones where it has none."""
        self._state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if self.distiller is not None:
            self.distiller.load_state_dict(self._state)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the end: leave no patch, no hook, and the teacher as it was."""
        self._release()
        if hasattr(trainer.strategy.launcher, "_start_method") and trainer.is_global_zero and self.adapter_state():
            # this process ends here; the callback lives on in its parent
            torch.save(self.adapter_state(), self._mailbox)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After an exception: the same."""
        self._release()

    # The steps -------------------------------------------------------------------------------------------------------

    def _training_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        distiller, pl_module = self._running()
        distiller.advance_with_trainer()
        distiller.task_weight, distiller.parts = self.task_weight, {}
        self._batch = None if self._takes_iterator else args[0] if args else kwargs.get("batch")
        self._explicit = False
        try:
            with distiller.record():
                output = step(*args, **kwargs)
            # asked after the step, which may have set a weight
            if not self._explicit and not (distiller.idle and self.task_weight == 1):
                output = self._add_distillation(output, distiller, pl_module.automatic_optimization)
        finally:
            distiller.release()
            self._batch = None
        if self._logs and distiller.parts and pl_module.trainer._logger_connector.should_update_logs:
            logged: dict[str, Any] = {**distiller.parts, **distiller.scheduler.values}
            parts = {f"{self.name}/{key}": value for key, value in logged.items()}
            pl_module.log_dict(parts, on_step=True, on_epoch=False, batch_size=distiller.batch_size)
        return output

    def _add_distillation(self, output: Any, distiller: Distiller, automatic: bool) -> Any:
        """What a training step returned, with the total in place of its loss."""
        if not automatic:
            if distiller.idle:
                return output
            raise MisconfigurationException(
                "Expected `callback.loss()` to be added to the loss inside `training_step`, since optimization is"
                " manual, but it was not called. Call it after the student."
            )
        if output is None:  # Lightning skips such a batch
            return None
        if isinstance(output, Mapping):
            return {**output, "loss": distiller.total(output["loss"], self._batch)}
        return distiller.total(output, self._batch)

    def _before_optimizer_step(self, hook: Callable[..., Any], optimizer: Optimizer) -> Any:
        # wrapped on the module, not taken as the callback's own hook: the learning rate finder puts callbacks aside
        distiller, pl_module = self._running()
        follower = distiller.adapters.follower
        if follower is not None and bare(optimizer) is follower.leader:
            trainer = pl_module.trainer
            follower.prepare(getattr(trainer.precision_plugin, "scaler", None))
            if trainer.gradient_clip_val:  # by themselves: the student's gradients are clipped as in a plain run
                algorithm = GradClipAlgorithmType(trainer.gradient_clip_algorithm or "norm")
                trainer.precision_plugin.clip_gradients(follower.optimizer, trainer.gradient_clip_val, algorithm)
        return hook(optimizer)

    def _validation_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        distiller, pl_module = self._running()
        if pl_module.trainer.sanity_checking:
            return step(*args, **kwargs)
        with distiller.record(needs_grad=False, features=False):
            output = step(*args, **kwargs)
        loader = args[2] if len(args) > 2 else kwargs.get("dataloader_idx", 0)
        try:
            for student_logits, teacher_logits in distiller.agree():
                if loader not in self._agreement:
                    self._agreement[loader] = TeacherAgreement(class_dim=distiller.class_dim).to(student_logits.device)
                self._agreement[loader].update(student_logits, teacher_logits)
        except ValueError as error:  # outputs that are no logits can well be distilled by their features
            rank_zero_warn(f"The agreement with the teacher is not measured: {error} Pass validate=False.")
        return output

    # Inside ----------------------------------------------------------------------------------------------------------

    def _running(self) -> tuple[ModuleDistiller, LightningModule]:
        if self.distiller is None:
            raise MisconfigurationException("Expected a step to run under a Trainer, but none is under way.")
        return self.distiller, self.distiller.student

    def _distiller_for(self, pl_module: LightningModule) -> ModuleDistiller:
        """The distiller of an earlier run of this module, with its adapters, or a new one."""
        if self.distiller is None or self.distiller.student is not pl_module:
            state = self.adapter_state() if self.distiller is None else {}
            self.distiller = ModuleDistiller(self, pl_module)
            self.distiller.load_state_dict(state)
        return self.distiller

    def _check_names(self, trainer: Trainer) -> None:
        callbacks = [one for one in getattr(trainer, "callbacks", []) if isinstance(one, DistillCallback)]
        if sum(one.name == self.name for one in callbacks) > 1:
            raise MisconfigurationException(
                f"Expected `name` to be distinct for each DistillCallback of a Trainer, but got name={self.name!r}"
                f" {len(callbacks)} times. Pass name=... to all but one."
            )

    def _release(self) -> None:
        for patch in self._patches:
            patch.undo()
        self._patches = []
        self._agreement = {}
        if self.distiller is not None:
            self.distiller.close()
            if self.distiller.loaders is not None:
                self.distiller.loaders.close()
            self.distiller.loaders = None

    def __getstate__(self) -> dict[str, Any]:
        idle: dict[str, Any] = {"distiller": None, "_patches": [], "_agreement": {}, "_batch": None}
        kept = {key: value for key, value in self.__dict__.items() if key not in ("log", "log_dict")}  # the module's
        return {**kept, **idle, "_state": self.adapter_state()}

    def __deepcopy__(self, memo: dict[int, Any]) -> DistillCallback:
        # of a module that holds the callback EMA and SWA make copies; the frozen teacher must not be among them
        other = type(self).__new__(type(self))
        other.__dict__.update(
            self.__getstate__(), terms=copy.deepcopy(self.terms, memo), _state={}, _mailbox=_mailbox()
        )
        return other


def _mailbox() -> Path:
    return Path(tempfile.gettempdir()) / f"lightning_distill-{uuid.uuid4().hex}.pt"


def _overrides(pl_module: LightningModule, name: str) -> bool:
    return next(kind for kind in type(pl_module).__mro__ if name in vars(kind)).__name__ not in _BASES


_TRUE_PRECISIONS = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
# where `lightning` and the older `pytorch_lightning` define the empty hooks
_BASES = ("LightningModule", "ModelHooks", "DataHooks")
