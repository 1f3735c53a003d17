"""Everything of one fit or validation under a Trainer: made in `setup`, dropped at the end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill import checks, compat
from lightning_distill.adapters.follower import bare
from lightning_distill.adapters.learned import LearnedParts
from lightning_distill.cache.teacher import Stored
from lightning_distill.cache.training import CachedLoaders
from lightning_distill.hparams import Settings
from lightning_distill.measures import Means, Validation
from lightning_distill.neighbours import monitored_names
from lightning_distill.patch import MethodPatch, patch_step
from lightning_distill.progress import fraction_done
from lightning_distill.recording.batches import kept
from lightning_distill.recording.student import StudentFinder
from lightning_distill.schedules import Progress
from lightning_distill.step import DistillStep
from lightning_distill.step_calls import StepCalls
from lightning_distill.teachers import EMATeacher, members
from lightning_distill.teachers.make import as_source, check_shares_nothing
from lightning_distill.terms import connected, teacher_inputs_of
from lightning_distill.terms.counting import token_sizes
from lightning_distill.texts import TrainerTexts
from lightning_distill.totals import Total, logged_value, loss_in, with_loss
from lightning_distill.windows import TokenWindow

_TRUE_PRECISIONS = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


class Run:
    """One fit or validation: the patches, the recording, the hold on the teacher, the adapters, the measurements.

    Nothing is left on the LightningModule between two steps. Patches sit on objects of the Trainer, which copies and
    pickles of the module do not contain. The hooks of the module's layers are put there for one call.

    Args:
        callback: The settings, and the methods that users override.
        trainer: The Trainer.
        module: The LightningModule.
        stage: ``"fit"`` or ``"validate"``.
        state: The adapters of an earlier run, as `LearnedParts.state_dict` gives them.

    Raises:
        MisconfigurationException: If the strategy or the module's step cannot be distilled.
        ValueError: If a layer is unknown, or the teacher shares trained parameters with the student.
    """

    def __init__(
        self, callback: Settings, trainer: Trainer, module: LightningModule, stage: str, state: dict[str, Any]
    ) -> None:
        self.callback, self.trainer, self.module = callback, trainer, module
        self._patches: list[Any] = []
        self._cached: CachedLoaders | None = None
        self._window: TokenWindow | None = None
        terms = callback.terms
        self.learned = LearnedParts(terms, callback.adapter_optimizer)
        self.learned.allowed = not compat.has_strategy(trainer, "DeepSpeedStrategy")
        self.learned.seed = trainer.strategy.broadcast(torch.initial_seed())  # processes may be seeded differently
        taps = [tap for term in terms for tap in term.teacher_taps]
        student = StudentFinder(module, [tap for term in terms for tap in term.recorded_taps], callback.student)
        self.step = DistillStep(
            callback,
            terms,
            student,
            as_source(
                callback.teacher,
                taps,
                callback.teacher_forward,
                callback.teacher_dtype,
                teacher_inputs_of(terms, callback.teacher_inputs, compat.redefined(callback, "teacher_forward")),
                callback.mix.route,
            ),
            self.learned,
            labels=callback.labels,
            read_logits=callback.logits,
            never_called=student.never_called,
            mix=callback.mix,
        )
        of_terms = [name for term in terms for name in term.logged_names]
        self._names = ["loss", "task_loss", "distillation_loss", *of_terms]
        self._train_means = Means(self._names)
        self._validation = Validation(self.step, callback, self._names)
        self._validates = False  # whether validation is measured; the same in all processes
        self._measures = False  # whether this process still measures it
        self._position: float | None = 0.0
        self._batch: Any = None
        self._takes_iterator = "dataloader_iter" in inspect.signature(module.training_step).parameters
        self._in_step = self._explicit = self._ever_explicit = self._distilled = self._skipped = False
        self._texts: TrainerTexts | None = None
        if stage == "fit" and callback.on_policy is not None:
            self._texts = TrainerTexts(callback.on_policy, trainer, student, terms, callback.labels)
        # with one of these hooks the layers may not exist yet: the first step checks
        self._checked = not (compat.overrides(module, "configure_model") or compat.overrides(module, "setup"))
        if self._checked:
            self._check()
        self.step.load_state_dict(state)
        self.step.balance.start()
        try:
            self._begin(stage)
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        sharding = [name for name in ("DeepSpeedStrategy", "FSDPStrategy") if compat.has_strategy(self.trainer, name)]
        self.step.check(sharding)
        if sharding and any(isinstance(each, EMATeacher) for each in members(self.callback.teacher)):
            raise MisconfigurationException(
                f"Expected DDP or one device with an EMATeacher, but got {sharding[0]}, which shards the student."
            )
        if self._texts is not None:
            self._texts.check(self.step.source.stored, self.callback.teacher_inputs)
        remedy = " If the module also holds the teacher, pass student=<path of the student>."
        check_shares_nothing(self.step.student.root, self.step.source.modules(), remedy)

    def _begin(self, stage: str) -> None:
        trainer, callback = self.trainer, self.callback
        known = [*self._names, *(f"val_{name}" for name in self._names), "val_teacher_agreement"]
        for name in callback.prog_bar:
            checks.one_of("prog_bar", name, [*known, *self.step.scheduler.names])
        # not by the precision plugin, which replaces layers under some settings and could not be undone
        dtype = _TRUE_PRECISIONS.get(str(trainer.precision_plugin.precision))
        self.step.source.hold(trainer.strategy.root_device, dtype)
        self._patches.append(compat.HookGuards())
        if stage == "fit":
            self._patches += [
                patch_step(trainer.strategy, "training_step", self.training_step),
                MethodPatch(*compat.after_closure(trainer), self._before_optimizer_step),
            ]
            if self.step.source.stored:
                self._cached = CachedLoaders(trainer, cast(Any, self.step.source).cache)
            if any(term.counts_tokens for term in callback.terms):
                self._window = TokenWindow(trainer, callback.terms, self._unpacked, callback.labels)
        if callback.validate and not self.step.source.live:
            rank_zero_warn(
                "Expected a teacher network with validate=True, but got a cache, which has no outputs for the"
                " validation data: nothing is measured in validation. Pass validate=None."
            )
        measured = callback.validate is not False and callback.logs and self.step.source.live
        if measured and compat.overrides(self.module, "validation_step"):
            self._validates = self._measures = True
            self._patches.append(patch_step(trainer.strategy, "validation_step", self.validation_step))

    def close(self) -> None:
        """Undo every patch, and restore the teacher to its state before the run."""
        for patch in self._patches:
            patch.undo()
        self._patches = []
        if self._cached is not None:
            self._cached.close()
            self._cached = None
        self.learned.unfollow()
        connected(self.step.terms, None)
        self.step.release()
        self.step.student.close()
        self.step.source.release()

    # Training --------------------------------------------------------------------------------------------------------

    def training_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's training step, with the total in place of its loss."""
        if not self._checked:
            self._check()
            self._checked = True
        self._advance()
        distill = self.step
        distill.forget()
        if self._texts is not None:
            args, kwargs, distill.own_text = self._texts.arguments(args, kwargs)
        self._batch = None if self._takes_iterator else kept(args[0] if args else kwargs.get("batch"))
        self._in_step, self._explicit = True, False
        try:
            self._begin_window()
            with distill.record(batch=self._batch):
                output = step(*args, **kwargs)
            self._follow_the_students()
            # asked after the step, which may have set a weight
            if not self._explicit and self._changes_loss():
                output = self._with_distillation(output)
            elif not self._explicit and self.module.automatic_optimization:
                distill.rest(Total.of(loss_in(output)).task_loss)
        finally:
            distill.release()
            self._in_step, self._batch, distill.own_text = False, None, False
        if distill.parts:
            self._distilled = True
            self._log(output)
        if self._window is not None:
            self._window.compare(distill.counted)
        return output

    def _unpacked(self, batch: Any, steps: int) -> Any:
        """A loader's batch as the user's code will get it, so many steps ahead."""
        if self._texts is not None:
            return self._texts.ahead(batch, steps)
        return batch if self._cached is None else self._cached.separated(batch)[0]

    def _begin_window(self) -> None:
        if self._window is None:
            return
        if self._texts is not None and self._texts.changed:
            self._window.fail("the module changed the prompts of a batch after it was loaded")
        self._window.begin(self._batch)
        self.step.share = self._window.share

    def _changes_loss(self) -> bool:
        return not (self.step.idle and self.callback.task_weight == 1) or self.trainer.world_size > 1

    def _with_distillation(self, output: Any) -> Any:
        """The result of a training step, with the total in place of its loss."""
        if not self.module.automatic_optimization:
            return output
        loss = loss_in(output)
        if loss is None and self.step.skips_heads:
            if output is None and self._distilled and not self.step.student.find():
                return output  # Lightning skips such a batch
            return self._total(None)  # the step has no logits to make a loss of its own
        if output is None and self.step.student.find():
            if self.callback.distils_alone and not self.step.idle:
                return self._total(None)  # a batch without labels
            self._skipped = True
        if not isinstance(loss, Tensor):
            return output  # Lightning skips such a batch, or says what is missing
        return with_loss(output, self._total(loss))

    def _total(self, loss: Tensor | None) -> Tensor:
        """The total of a step that has returned this loss, which may be the total of another callback."""
        before = Total.of(loss)
        distillation = self.step.loss(self._batch, self._step_calls(), before.task_loss)
        if self.step.own_text:  # its labels are not a reference
            before = Total(None)
        elif before.task_loss is not None:
            self.step.parts["task_loss"] = before.task_loss.detach()
        return before.plus(distillation, self.callback.task_weight, self.step.unlogged)

    def _step_calls(self, calls: int | slice | None = None) -> StepCalls:
        stored = None if self._cached is None else Stored(self._cached.answers, self._cached.check_unchanged)
        return StepCalls(calls, stored=stored)

    def loss(self, calls: int | slice | None, task_loss: Tensor | None = None) -> Tensor:
        """The weighted distillation loss of the student's calls so far in this step.

        Args:
            calls: Which of them count.
            task_loss: The task loss, for balanced weights.

        Raises:
            MisconfigurationException: If no training step is running.
        """
        if not self._in_step:
            raise MisconfigurationException(
                "Expected `loss` to be called inside `training_step`, but no step is running. Call it there."
            )
        self._explicit = self._ever_explicit = True
        self._follow_the_students()
        return self.step.loss(self._batch, self._step_calls(calls), task_loss)

    def _advance(self) -> None:
        """Set the scheduled values at this point of the training."""
        if not self.step.scheduler:
            return
        trainer = self.trainer
        if self.callback in trainer.callbacks:  # type: ignore[attr-defined]
            self._position = fraction_done(trainer)
        # else a tuner runs a trial: it has removed all callbacks, and the position stays where it is
        self.step.advance(Progress(trainer.global_step, trainer.current_epoch, self._position))

    def _follow_the_students(self) -> None:
        """Let the adapters step with the optimizer of the student."""
        leader = self.learned.leader
        if leader is not None and any(leader is optimizer for optimizer in self.trainer.optimizers):
            return
        if not self.step.student.find() and self.trainer.world_size == 1:
            return  # not called yet, so the student is not known yet; of several processes another one may wait here
        trained = {id(parameter) for parameter in self.step.student.root.parameters()}
        wrapped = self.module.optimizers()
        for optimizer in wrapped if isinstance(wrapped, list) else [wrapped]:
            groups = bare(optimizer).param_groups
            if any(id(parameter) in trained for group in groups for parameter in group["params"]):
                self.step.follow(cast(Optimizer, optimizer))
                return

    def _before_optimizer_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Called by every optimizer step, after the backward pass and after the gradients are unscaled."""
        optimizer = kwargs["optimizer"] if "optimizer" in kwargs else args[1]
        if (self.trainer.world_size > 1 or self.step.source.moves) and self._in_step:
            # in manual optimization another process may have called `loss` already, and waits in this step
            self._follow_the_students()
        self.step.source.before_step()
        follower, trainer = self.learned.follower, self.trainer
        if follower is not None and bare(optimizer) is follower.leader:
            follower.prepare(getattr(trainer.precision_plugin, "scaler", None))
            if trainer.gradient_clip_val and follower.optimizer is not None and follower.has_gradients:
                # by themselves: the student's gradients are clipped as in a plain run
                algorithm = GradClipAlgorithmType(trainer.gradient_clip_algorithm or "norm")
                trainer.precision_plugin.clip_gradients(follower.optimizer, trainer.gradient_clip_val, algorithm)
        return original(*args, **kwargs)

    def check_distilled(self) -> None:
        """Raise if no step of an epoch has distilled: in manual optimization none has added the distillation loss.

        Raises:
            MisconfigurationException: If so.
        """
        if not (self.module.automatic_optimization or self._ever_explicit or self.step.idle):
            raise MisconfigurationException(
                "Expected `callback.loss()` to be added to the loss inside `training_step`, since optimization is"
                " manual, but it was not called in any step. Call it after the student."
            )
        if self._skipped and not self._distilled:
            raise MisconfigurationException(
                "Expected `training_step` to return a loss, but it called the student and returned None in every step,"
                " which Lightning skips. Return the loss, or pass task_weight=0 to train without one."
            )

    # Validation ------------------------------------------------------------------------------------------------------

    def validation_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's validation step, followed by measurements of the terms' losses and the agreement."""
        if not self._measures or self.trainer.sanity_checking:
            return step(*args, **kwargs)
        batch = kept(args[0] if args else kwargs.get("batch"))
        with self.step.record(needs_grad=False):
            output = step(*args, **kwargs)
        loader = args[2] if len(args) > 2 else kwargs.get("dataloader_idx", 0)
        try:
            self._validation.add(batch, loader, output)
        except ValueError as error:
            if self.callback.validate:
                raise
            # the features can be distilled even if the outputs are not logits
            self._measures = False
            self._validation.reset()
            rank_zero_warn(f"Validation does not measure distillation: {error} Pass validate=False.")
        finally:
            self.step.release()
        return output

    def start_validation(self) -> None:
        """Count from zero."""
        self._validation.reset()

    def end_validation(self) -> dict[str, Tensor]:
        """The measurements of a validation epoch, over all processes, by their names in the logs."""
        if not self._validates or self.trainer.sanity_checking:
            return {}
        return self._validation.results(len(self.trainer.num_val_batches), self._device, self._sum)

    # Logging ---------------------------------------------------------------------------------------------------------

    def _log(self, output: Any) -> None:
        callback, parts = self.callback, dict(self.step.parts)
        if not callback.logs:
            return
        loss = loss_in(output)
        if isinstance(loss, Tensor) and not self._explicit:
            parts["loss"] = logged_value(loss)
        self._train_means.add(parts, self.step.batch_size, token_sizes(self.step.terms, self.step.counted))
        logs_all, monitored = compat.is_log_step(self.trainer), monitored_names(self.trainer, callback.name)
        if not (callback.prog_bar or logs_all or monitored):
            return
        values: dict[str, Any] = {**parts, **self.step.scheduler.values}
        shown = {key: values.pop(key) for key in callback.prog_bar if key in values}
        self._log_step(shown, prog_bar=True)  # in every step: the loggers take the log steps alone
        self._log_step({key: value for key, value in values.items() if logs_all or key in monitored}, prog_bar=False)

    def _log_step(self, values: Mapping[str, Any], prog_bar: bool) -> None:
        if values:
            named = {f"{self.callback.name}/{key}": value for key, value in values.items()}
            self.module.log_dict(
                named, prog_bar=prog_bar, on_step=True, on_epoch=False, batch_size=self.step.batch_size
            )

    def train_means(self) -> dict[str, Tensor]:
        """The means of the parts over the epoch so far, over all processes."""
        return self._train_means.compute(self._device, self._sum) if self.callback.logs else {}

    def start_epoch(self) -> None:
        """Start the means of an epoch."""
        self._train_means.reset()

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device

    def _sum(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.trainer.strategy.reduce(tensor.to(self._device), reduce_op="sum"))
