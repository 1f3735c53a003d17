"""The callback: settings, the methods that users override, logging and saving; a run does the work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_distill import checks, compat
from lightning_distill.adapters import OptimizerCallable
from lightning_distill.hparams import Teacher, Terms, log_hyperparameters, settings_of
from lightning_distill.mailbox import Mailbox
from lightning_distill.neighbours import check_schedulers, check_together
from lightning_distill.on_policy import OnPolicyDistillation, reverse_term
from lightning_distill.recording import Call, select
from lightning_distill.run import Run
from lightning_distill.schedules import Schedule, Setting
from lightning_distill.teachers import EMATeacher, TeacherGroup, as_dtype, as_teacher
from lightning_distill.teachers.inputs import Place
from lightning_distill.teachers.route import Place as Route
from lightning_distill.terms import LogitsDistillation, as_terms
from lightning_distill.terms.mixing import TeacherMix, Weights


class DistillCallback(Callback):
    r"""Distillation for any Trainer: the total below replaces the loss that ``training_step`` returns.

    .. math:: \text{total} = w_{task} \, L_{task} + \sum_i w_i \, D_i(A_i(F^{student}_i), F^{teacher}_i)

    The LightningModule does not change: nothing is registered on it or added to its optimizer, so its checkpoints are
    those of a run without the callback. With automatic optimization this is all; with manual optimization, add
    :meth:`loss` to the loss inside ``training_step``.

    Logged on log steps: ``<name>/loss`` (the total), ``<name>/task_loss``, ``<name>/distillation_loss``,
    ``<name>/<term>_loss`` (each term without its weight) and the numbers that schedules set, such as
    ``<name>/<term>_weight``. At the end of an epoch the same names hold the means over the epoch. After validation
    ``<name>/val_distillation_loss`` and ``<name>/val_<term>_loss``; if ``validation_step`` returns its loss, also
    ``<name>/val_loss`` and ``<name>/val_task_loss``; if a term compares class scores, also
    ``<name>/val_teacher_agreement``, the share of examples for which both networks choose the same class.
    ``ModelCheckpoint`` and ``EarlyStopping`` can monitor all of them, and a value that is monitored is logged in every
    step. A ``ModelCheckpoint`` with such a key in its ``filename`` needs ``auto_insert_metric_name=False``, since the
    slash would make a folder. At the start of a fit the loggers get the settings as hyper-parameters:
    ``<name>/teacher``, ``<name>/task_weight``, ``<name>/<term>/weight``, ``<name>/<term>/loss``,
    ``<name>/<term>/temperature`` and so on.

    Args:
        teacher: The network to match, called with the student's inputs; an :class:`EMATeacher`,
            :class:`CallableTeacher` or :class:`SelfTeacher`; a :class:`TeacherCache` of its outputs; a list of these,
            over which each term is averaged unless the next arguments say otherwise; or ``None`` if no term needs a
            teacher. A network is frozen while the Trainer runs, then restored.
        terms: The terms; ``None`` is ``[LogitsDistillation()]``. A loss on logits is wrapped in a
            ``LogitsDistillation``.
        student: Dotted path of the submodule that is the student. ``None`` is the module itself if the step calls it,
            else the one child that the step calls and that has the tapped layers. A list of paths names networks that
            are called one after the other, as in ``self.head(self.backbone(x))``, and together are the student.
        task_weight: Factor of the module's own loss, 0 or greater, or a schedule. If a Trainer has several of these
            callbacks, their factors are multiplied. At 0 the loss is left out, and ``training_step`` may return
            ``None`` after it has called the student, as without labels. Under DDP, parameters that only this loss uses
            then need ``find_unused_parameters``.
        labels: The place of the labels in a batch: a key, an index, or a function of the batch. ``None`` is the second
            entry of a pair, or the entry ``"labels"``, ``"label"``, ``"target"`` or ``"y"``. Read only for losses that
            need labels.
        teacher_inputs: The teacher's inputs, if they are not the student's: the key or index of them in the batch, or a
            function from the student's inputs (its only argument, the tuple of its arguments, or the dict of its
            keyword arguments) to the teacher's, in the same forms.
        teacher_weights: A weight for each of several teachers, 0 or greater, numbers or schedules, divided by their
            sum; ``"entropy"`` for weights by each teacher's confidence in each example; ``None`` for equal weights.
        mix: ``"losses"`` is the weighted mean of the losses to each teacher, ``"probabilities"`` one loss to the
            weighted mean of their softened probabilities, ``"logits"`` one loss to the weighted mean of their logits.
        route: Where a batch keeps the index of the teacher that each example belongs to: a key, an index, or a function
            of the batch, an integer tensor ``(N,)``. Each teacher then runs on its own examples alone.
        teacher_dtype: The teacher's precision, such as ``"bfloat16"``, independent of the Trainer's.
        on_policy: Lets the student write the text of some batches of a language model; see
            :class:`OnPolicyDistillation`. The default of ``terms`` is then a :class:`SequenceDistillation` with a
            :class:`ReverseKLLoss`.
        adapter_optimizer: Makes the adapters' optimizer from their parameters; ``None`` mirrors the student's.
        validate: Whether the terms' losses and the agreement with the teacher are measured in validation, which runs
            the teacher there too. ``None`` does so if the module has a ``validation_step`` and the teacher is not a
            cache. If the outputs cannot be compared, it then stops with a warning.
        log: Whether the losses are logged, and the settings as hyper-parameters. If False, nothing is measured in
            validation.
        prog_bar: Logged values to show in the progress bar, by their names without the prefix, such as
            ``["logits_loss", "val_teacher_agreement"]``. True shows ``distillation_loss`` and
            ``val_teacher_agreement``. A value that a run does not measure is left out.
        name: Prefix of the logged keys and key of the saved state, distinct for each callback of a Trainer.

    Attributes:
        terms: The terms, with their adapters.
        teacher: The teacher, or a container of several.
        mix: How several teachers are weighted and mixed.

    Raises:
        ValueError: If a setting is not as above.
        TypeError: If the teacher is not a module, or a term is not a :class:`DistillationTerm`.

    Example:
        >>> from torch import nn
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning.pytorch import Trainer
        >>> quiet = dict(
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        ... )
        >>> callback = DistillCallback(nn.Linear(32, 2))
        >>> trainer = Trainer(callbacks=callback, max_steps=1, accelerator="cpu", log_every_n_steps=1, **quiet)
        >>> trainer.fit(BoringModel())
        >>> sorted(key for key in trainer.callback_metrics if key.startswith("distill/"))
        ['distill/distillation_loss', 'distill/logits_loss', 'distill/loss', 'distill/task_loss']

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
    """

    task_weight = Setting(checks.non_negative)
    schedules: dict[str, Schedule]  # of the task weight

    def __init__(
        self,
        teacher: Teacher,
        terms: Terms = None,
        *,
        student: str | Sequence[str] | None = None,
        task_weight: float | Schedule = 1.0,
        labels: str | int | Callable[[Any], Tensor] | None = None,
        teacher_inputs: Place = None,
        teacher_weights: Weights = None,
        mix: str = "losses",
        route: Route | None = None,
        teacher_dtype: torch.dtype | str | None = None,
        on_policy: OnPolicyDistillation | None = None,
        adapter_optimizer: OptimizerCallable | None = None,
        validate: bool | None = None,
        log: bool = True,
        prog_bar: bool | Sequence[str] = False,
        name: str = "distill",
    ) -> None:
        self.task_weight = task_weight
        if not name:
            raise ValueError(f"Expected `name` to be a word, but got name={name!r}. It prefixes the logged keys.")
        if prog_bar and not log:
            raise ValueError(
                f"Expected `log` to be True where values are shown in the progress bar, but got log=False and"
                f" prog_bar={prog_bar!r}. Drop one of the two."
            )
        self._run: Run | None = None
        self._state: dict[str, Any] = {}  # the adapters of the last run or of a checkpoint
        self._mailbox = Mailbox()
        self._teacher: Any = None
        self.mix = TeacherMix(teacher_weights, mix, route)
        self.teacher = teacher
        default = LogitsDistillation if on_policy is None else reverse_term
        self.terms = [term.owned() for term in as_terms(terms, default)]
        self.on_policy = on_policy
        self.student, self.labels, self.teacher_inputs = student, labels, teacher_inputs
        self.teacher_dtype, self.adapter_optimizer = as_dtype(teacher_dtype), adapter_optimizer
        self.validate, self.name = validate, name
        self.logs = log  # the Trainer puts the module's `log` on every callback
        self.prog_bar = _names(prog_bar)
        self._state_key = self._generate_state_key(name=name)
        self._last_module: Any = None  # a weak reference to the module of the last run

    # Methods to call and override ------------------------------------------------------------------------------------

    @property
    def teacher(self) -> Any:
        """The teacher, or a container of several. It may be replaced between two runs.

        Raises:
            MisconfigurationException: If it is replaced while a Trainer runs, which holds the one that it began with.
        """
        return self._teacher

    @teacher.setter
    def teacher(self, teacher: Teacher) -> None:
        if self._run is not None:
            raise MisconfigurationException(
                "Expected `teacher` to stay the same while a Trainer runs, but got another one. Load its weights into"
                " the teacher, teacher.load_state_dict(...), or set it between two fits."
            )
        teacher = as_teacher(teacher)
        self.mix.check_teacher(teacher)
        if teacher is not self._teacher:  # the average of an earlier teacher is not this one's
            self._state = {name: value for name, value in self.adapter_state().items() if name != "teacher"}
        self._teacher = teacher

    def loss(self, calls: int | slice | None = None, task_loss: Tensor | None = None) -> Tensor:
        """The weighted distillation loss of the student's calls so far in this ``training_step``, a scalar.

        For manual optimization: add it to the loss that is differentiated, in the steps that distil. `task_weight` is
        then ignored.

        Args:
            calls: Which of the student's calls count, such as ``-1`` for the last one; ``None`` is the mean of all.
            task_loss: The student's own loss, if a weight is balanced; it is not added.

        Raises:
            MisconfigurationException: If no training step is running.
            ValueError: If the student has not been called, a layer did not run, a shape does not fit.
        """
        if self._run is None:
            raise MisconfigurationException(
                "Expected `loss` to be called inside `training_step`, but no training is running. Call trainer.fit."
            )
        return self._run.loss(calls, task_loss)

    @property
    def distils_alone(self) -> bool:
        """Whether no task loss counts: the task weight is 0, without a schedule."""
        return self.task_weight == 0 and "task_weight" not in self.schedules

    @property
    def own_text(self) -> bool:
        """Whether the batch of this training step is text of the student; for manual optimization.

        Its labels are not a reference, so that the loss of the step is :meth:`loss` alone.
        """
        return self._run is not None and self._run.step.own_text

    def teacher_forward(self, call: Call) -> Any:
        """The teacher's output for a call of the student; override it to give the teacher another input.

        Args:
            call: The student's call, with ``call.args``, ``call.kwargs`` and ``call.batch``, the batch of the training
                or validation step.

        Returns:
            The output, or with several teachers the list of their outputs.
        """
        return self.teacher(*call.args, **call.kwargs)

    def logits(self, output: Any) -> Tensor:
        """The logits in a model's output; override it for unusual outputs.

        Args:
            output: The student's or the teacher's output.

        Returns:
            The tensor itself, its ``logits``, or its only tensor.
        """
        return select(output, None, "the model's output")

    def adapter_state(self) -> dict[str, Any]:
        """The adapters, their optimizer's state and a teacher's average, as checkpoints hold them, or nothing."""
        if self._run is not None:
            return self._run.step.state_dict()
        if (sent := self._mailbox.receive()) is not None:  # from a process that this one has spawned
            self._state = sent
        return self._state

    @property
    def state_key(self) -> str:
        """Key of the saved state in a checkpoint."""
        return self._state_key  # made once: Lightning asks for it before every hook

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the start of fit or validate: check everything, hold the teacher, wrap the module's steps."""
        if stage not in ("fit", "validate"):
            return
        self._check_free(trainer)
        self._drop()
        self._check_names(trainer)
        state = self.adapter_state()
        if self._last_module is not None and self._last_module() is not pl_module:
            state = {}  # another module's
        # a new fit starts with a fresh optimizer
        kept = {name: value for name, value in state.items() if name in ("adapters", "teacher", "balance")}
        self._run = Run(self, trainer, pl_module, stage, kept)
        self._last_module = ref(pl_module)
        if stage == "fit" and self.logs:
            log_hyperparameters(trainer, settings_of(self))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first epoch: check the schedulers, which exist now."""
        check_schedulers(trainer, self.name)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the start of an epoch: start its means."""
        if self._run is not None:
            self._run.start_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of an epoch: log the means over it."""
        if self._run is not None:
            self._run.check_distilled()
            self._log(pl_module, self._run.train_means())

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the start of validation: count from zero, and log the means so far, which a checkpoint may monitor."""
        if self._run is None:
            return
        self._run.start_validation()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(pl_module, self._run.train_means())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of a validation epoch: log what was measured, over all processes."""
        if self._run is not None:
            self._log(pl_module, self._run.end_validation())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """With each checkpoint: add the adapters, if there are any."""
        if state := self.adapter_state():
            checkpoint.setdefault("callbacks", {})[self.state_key] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """With each restored checkpoint: take its adapters, or fresh ones where it has none."""
        # not load_state_dict, which Lightning does not call for an empty state: adapters that a finder has trained at
        # its last learning rate would stay
        self._state = copy.deepcopy(checkpoint.get("callbacks", {}).get(self.state_key, {}))
        if self._run is not None:
            self._run.step.load_state_dict(self._state)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the end: remove every patch and hook, and restore the teacher."""
        self._drop()
        if compat.spawns(trainer) and trainer.is_global_zero and self._state:
            self._mailbox.send(self._state)  # this process ends here; the callback lives on in its parent

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After an exception: remove every patch and hook, and restore the teacher."""
        self._drop()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _log(self, pl_module: LightningModule, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            # the means are over all processes already; equal values have themselves as mean
            shown = key.split("/")[0] in self.prog_bar  # a loader's index follows the slash
            pl_module.log(
                f"{self.name}/{key}", value, prog_bar=shown, sync_dist=True, batch_size=1, add_dataloader_idx=False
            )

    def _check_names(self, trainer: Trainer) -> None:
        callbacks = getattr(trainer, "callbacks", [])
        check_together([other for other in callbacks if isinstance(other, DistillCallback)], self.name)

    def _check_free(self, trainer: Trainer) -> None:
        if self._run is not None and self._run.trainer is not trainer and self._run.trainer.state.status == "running":
            raise MisconfigurationException(
                "Expected the callback to belong to one running Trainer, but another Trainer starts while the first"
                " still trains. Pass the second one a copy: copy.deepcopy(callback)."
            )

    def _drop(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.close()
            self._state = run.step.state_dict()

    def __repr__(self) -> str:
        teacher = type(self.teacher).__name__
        terms = ", ".join(f"{term.name!r}: {term.weight}" for term in self.terms)
        return f"{type(self).__name__}({teacher}, {{{terms}}}, task_weight={self.task_weight}, name={self.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key not in ("log", "log_dict")}  # the module's
        return {**kept, "_run": None, "_last_module": None, "_state": self.adapter_state()}

    def __deepcopy__(self, memo: dict[int, Any]) -> DistillCallback:
        # of a module that holds the callback EMA and SWA make copies; the frozen teacher must not be among them
        other = type(self).__new__(type(self))
        kept = {key: value for key, value in self.__dict__.items() if key not in ("log", "log_dict")}
        fresh: dict[str, Any] = {"_run": None, "_last_module": None, "_state": {}, "_mailbox": Mailbox()}
        other.__dict__.update(kept, **fresh)
        if isinstance(self._teacher, (EMATeacher, TeacherGroup)):  # of the copy's own student
            other._teacher = copy.deepcopy(self._teacher, memo)
        other.mix = copy.deepcopy(self.mix, memo)
        other.terms = [copy.deepcopy(term, memo) for term in self.terms]
        for term in other.terms:
            term.remake(term.reset)
        other.on_policy = copy.copy(self.on_policy)  # not deeply: its functions may hold networks
        for owner in (other, other.on_policy):
            for shared in {"_settings", "schedules"} & set(getattr(owner, "__dict__", ())):
                owner.__dict__[shared] = dict(owner.__dict__[shared])
        return other


def _names(prog_bar: bool | Sequence[str]) -> tuple[str, ...]:
    if isinstance(prog_bar, bool):
        return ("distillation_loss", "val_teacher_agreement") if prog_bar else ()
    return (prog_bar,) if isinstance(prog_bar, str) else tuple(prog_bar)
