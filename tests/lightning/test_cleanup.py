"""L7, L21 and L25: however a run ends, the library leaves nothing on the module and restores the teacher."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from lightning_distill import DistillCallback, DistillModule, FeatureDistillation, LogitsDistillation, SoftTargetLoss

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """Exclude all objects from before the test, such as torch's, from the garbage collections in it."""
    gc.freeze()
    yield
    gc.unfreeze()


class Watched(nets.MLP):
    """Remembers, weakly, every feature and output that it gave."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        feature = self.layer2(torch.tanh(self.layer1(x.flatten(1))))
        logits = self.head(torch.tanh(feature))
        self.seen += [weakref.ref(feature), weakref.ref(logits)]  # not x, which the trainer holds on to
        return logits

    def alive(self, collect: bool = True) -> int:
        if collect:
            gc.collect()
        return sum(reference() is not None for reference in self.seen)


def teacher_in_disorder() -> Watched:
    """A teacher whose modes and flags are neither all on nor all off."""
    teacher = nets.make(Watched, 2, 10).train()
    teacher.register_buffer("table", torch.linspace(0, 1, 7))
    teacher.layer2.eval()
    teacher.layer1.weight.requires_grad_(False)
    teacher.head.bias.requires_grad_(False)
    return teacher


def look(module: nn.Module) -> list[Any]:
    """The visible state of a module: modes, flags, dtypes, devices, bytes, ids of the parameters."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    modes = [(name, inner.training) for name, inner in module.named_modules()]
    return modes + [
        (
            name,
            id(tensor),
            tensor.requires_grad,
            tensor.dtype,
            tensor.device,
            tensor.grad is None,
            tensor.detach().numpy().tobytes(),
        )
        for name, tensor in tensors
    ]


class Run:
    """A module, its teacher, and what both looked like before a run."""

    def __init__(self, kind: type[nets.ForwardModule] = nets.ForwardModule) -> None:
        self.teacher, self.module = teacher_in_disorder(), kind(nets.make(Watched, 1))
        self.module.hparams  # noqa: B018  # Lightning makes it when it is first looked at
        self.before, self.attributes = look(self.teacher), set(vars(self.module))

    def callback(self, **settings: Any) -> DistillCallback:
        terms = [LogitsDistillation(), FeatureDistillation("model.layer2", "layer2")]
        return DistillCallback(self.teacher, **{"terms": terms, **settings})

    def fit(self, trainer: MakeTrainer, *callbacks: Callback, **settings: Any) -> Trainer:
        runs = trainer(**{"max_epochs": 1, **settings}, callbacks=list(callbacks))
        runs.fit(self.module, nets.loader(), nets.loader(7))
        return runs

    def assert_clean(self) -> None:
        assert look(self.teacher) == self.before
        assert set(vars(self.module)) == self.attributes
        assert nets.hooks(self.module, self.teacher) == 0
        assert (self.module.model.alive(), self.teacher.alive()) == (0, 0)


def optimizers_are_clean(trainer: Trainer) -> bool:
    return not any(
        optimizer._optimizer_step_post_hooks or optimizer._optimizer_step_pre_hooks or "zero_grad" in vars(optimizer)
        for optimizer in trainer.optimizers
    )


# L7 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_nothing_stays_after_fit(trainer: MakeTrainer, precision: Any) -> None:
    """L7: in every precision; bf16-true would round the teacher for good."""
    run = Run()
    runs = run.fit(trainer, run.callback(), precision=precision)
    assert runs.global_step == 3
    assert optimizers_are_clean(runs)
    run.assert_clean()


def test_a_teacher_dtype_is_undone_too(trainer: MakeTrainer) -> None:
    """L7, L13: bit for bit, not rounded to bfloat16 and back."""
    run = Run()
    run.fit(trainer, run.callback(teacher_dtype="bfloat16"))
    run.assert_clean()


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_nothing_stays_after_evaluation(trainer: MakeTrainer, method: str) -> None:
    """L7, L30: after validate, test and predict, which change neither network."""
    run = Run()
    student = look(run.module)
    run.module.test_step = run.module.validation_step
    run.attributes.add("test_step")
    data = nets.as_loader([nets.digits(8)[0]]) if method == "predict" else nets.loader()
    more = {"return_predictions": False} if method == "predict" else {}
    getattr(trainer(callbacks=[run.callback()]), method)(run.module, data, **more)
    run.assert_clean()
    assert look(run.module) == student


class Fails(Callback):
    """Raises in one hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("no luck")


HOOKS = [
    *("setup", "on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_batch_start"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"),
    *("on_train_batch_end", "on_validation_batch_end", "on_validation_epoch_end", "on_train_end"),
]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_nothing_stays_after_an_exception_in_any_hook(trainer: MakeTrainer, hook: str, first: bool) -> None:
    """L7: wherever another callback fails, before the distilling one or after it."""
    run = Run()
    callbacks = [run.callback(), Fails(hook)]
    with pytest.raises(RuntimeError, match="no luck"):
        run.fit(trainer, *(reversed(callbacks) if first else callbacks))
    run.assert_clean()


class FailsIn(nets.ForwardModule):
    """Raises in the step of the given name, at its second batch, after the student was called."""

    where = ""

    def _maybe_fail(self, name: str, x: Tensor, batch_idx: int) -> Tensor:
        logits = self(x)
        if self.where == name and batch_idx == 1:
            raise self.error("no luck")
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self._maybe_fail("training", batch[0], batch_idx), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._maybe_fail("sanity" if self.trainer.sanity_checking else "validation", batch[0], batch_idx)


def failing_run(where: str, error: type[BaseException]) -> Run:
    run = Run(FailsIn)
    run.module.where, run.module.error = where, error
    run.attributes |= {"where", "error"}
    return run


def fit_failing(run: Run, trainer: MakeTrainer) -> None:
    runs = trainer(max_epochs=2, callbacks=[run.callback()])
    runs.fit(run.module, nets.loader(), nets.loader(16))


@pytest.mark.parametrize("where", ["training", "validation", "sanity"])
def test_nothing_stays_after_an_exception_in_a_step(trainer: MakeTrainer, where: str) -> None:
    """L7: in training, in validation, in the sanity check."""
    run = failing_run(where, RuntimeError)
    with pytest.raises(RuntimeError, match="no luck"):
        fit_failing(run, trainer)
    run.assert_clean()


@pytest.mark.parametrize("where", ["training", "validation"])
def test_nothing_stays_after_an_interrupt(trainer: MakeTrainer, where: str) -> None:
    """L7: Lightning turns KeyboardInterrupt into an exit."""
    run = failing_run(where, KeyboardInterrupt)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="1"):
            fit_failing(run, trainer)
    finally:
        signal.signal(signal.SIGINT, handler)
    run.assert_clean()


@pytest.mark.parametrize("layer", ["model.layer2", "model.layer7"])
def test_nothing_stays_after_an_error_of_our_own(trainer: MakeTrainer, layer: str) -> None:
    """L7: neither from the checks at setup nor from the first step."""
    run = Run()
    callback = run.callback(terms=FeatureDistillation(layer, "layer2", adapter=None))
    with pytest.raises(ValueError, match=r"Expected (student feature|`terms\[0\]\.student_layer`)"):
        run.fit(trainer, callback)
    run.assert_clean()


def test_weights_trained_before_an_exception_are_kept(trainer: MakeTrainer) -> None:
    """L7: the adapters go on from there in the next fit."""
    run = failing_run("training", RuntimeError)
    callback = run.callback()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no luck"):
            trainer(max_epochs=1, callbacks=[callback]).fit(run.module, nets.loader(), nets.loader(16))
    adapters = callback.adapter_state()["adapters"]["model.layer2"]
    run.module.where = ""
    run.module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    trainer(max_epochs=1, callbacks=[callback]).fit(run.module, nets.loader(), nets.loader(16))
    assert nets.same(dict(adapters), dict(callback.adapter_state()["adapters"]["model.layer2"]))
    run.assert_clean()


# Two callbacks: L7 and L21 -------------------------------------------------------------------------------------------


def pair(run: Run, shared: bool) -> list[DistillCallback]:
    other = run.teacher if shared else teacher_in_disorder()
    feature = FeatureDistillation("model.layer2", "layer2", adapter=nets.make(nn.Linear, 5, 6, 10))
    logits = DistillCallback(other, LogitsDistillation(SoftTargetLoss(2.0)), name="first")
    return [logits, DistillCallback(run.teacher, feature, name="second")]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_two_callbacks_leave_nothing_in_either_order(
    trainer: MakeTrainer, shared: bool, turned: bool, precision: Any
) -> None:
    """L7: the first set up is the first torn down; with one teacher for both, too."""
    run = Run()
    callbacks = pair(run, shared)
    other = look(callbacks[0].teacher)
    run.fit(trainer, *(reversed(callbacks) if turned else callbacks), precision=precision)
    assert look(callbacks[0].teacher)[:6] == other[:6]
    run.assert_clean()


@pytest.mark.parametrize("turned", [False, True])
def test_two_callbacks_leave_nothing_after_an_exception(trainer: MakeTrainer, turned: bool) -> None:
    """L7: the same when the run fails."""
    run = failing_run("training", RuntimeError)
    callbacks = pair(run, True)
    with pytest.raises(RuntimeError, match="no luck"):
        trainer(max_epochs=1, callbacks=callbacks[::-1] if turned else callbacks).fit(
            run.module, nets.loader(), nets.loader(7)
        )
    run.assert_clean()


@pytest.mark.parametrize("turned", [False, True])
def test_two_callbacks_train_like_one_with_both_terms(trainer: MakeTrainer, turned: bool) -> None:
    """L7, L21: each with its own log keys; the student is hooked twice."""
    run, single = Run(), Run()
    callbacks = pair(run, False)
    runs = run.fit(trainer, *(reversed(callbacks) if turned else callbacks), log_every_n_steps=1)
    terms = [callback.terms[0] for callback in pair(single, False)]
    single.fit(trainer, single.callback(terms=terms))
    nets.close(list(run.module.parameters()), list(single.module.parameters()), 1e-6)
    assert {"first/logits_loss", "second/model.layer2_loss", "first/val_teacher_agreement"} <= set(
        runs.callback_metrics
    )


@pytest.mark.parametrize("kind", ["two callbacks", "a DistillModule and a callback"])
def test_two_callbacks_of_one_name_raise(trainer: MakeTrainer, kind: str) -> None:
    """L21: before anything is touched."""
    run = Run()
    module: Any = run.module
    callbacks = [run.callback(), run.callback()]
    if kind != "two callbacks":
        module, callbacks = DistillModule(nets.student(), nets.teacher()), callbacks[:1]
    with pytest.raises(
        MisconfigurationException, match=r"Expected `name` to be distinct .* name='distill'.*Pass name="
    ):
        trainer(callbacks=callbacks).fit(module, nets.loader(), nets.loader(7))
    run.assert_clean()


def test_two_names_save_two_states(trainer: MakeTrainer, tmp_path: Any) -> None:
    """L21: and each callback finds its own again."""
    run = Run()
    callbacks = [run.callback(name=name) for name in ("first", "second")]
    runs = run.fit(trainer, *callbacks)
    runs.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert callbacks[0].state_key != callbacks[1].state_key
    for callback in callbacks:
        expected = callback.adapter_state()["adapters"]["model.layer2"]
        assert nets.same(dict(saved[callback.state_key]["adapters"]["model.layer2"]), dict(expected))


# Memory: L25 ---------------------------------------------------------------------------------------------------------


class Sized(nets.InnerModule):
    """Runs out of memory at batches of more than 16, after the student was called; counts what earlier steps left."""

    def __init__(self) -> None:
        super().__init__(nets.make(Watched, 1))
        self.batch_size, self.left, self.failed = 4, [], 0

    def train_dataloader(self) -> Any:
        return nets.loader(256, self.batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.left.append(self.model.alive(collect=False))  # the finder has collected garbage
        x, y = batch
        logits = self.model(x)
        if len(x) > 16:
            self.failed += 1
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return F.cross_entropy(logits, y)


def test_a_step_that_ran_out_of_memory_holds_nothing(trainer: MakeTrainer) -> None:
    """L25: inside the batch-size finder, whose next try needs that memory."""
    module, teacher = Sized(), nets.make(Watched, 2, 10)
    callback = DistillCallback(teacher, FeatureDistillation("model.layer2", "layer2"))
    runs = trainer(max_epochs=1, callbacks=[callback])
    assert Tuner(runs).scale_batch_size(module, mode="power", steps_per_trial=2, max_trials=6) == 16
    assert module.failed > 0
    assert set(module.left) == {0}
    assert (module.model.alive(), teacher.alive(), nets.hooks(module, teacher)) == (0, 0, 0)


def test_no_step_holds_the_tensors_of_the_one_before(trainer: MakeTrainer) -> None:
    """L25: not even until the next step begins, and without waiting for the garbage collector."""
    left: list[int] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            left.append(run.teacher.alive(collect=False) + run.module.model.alive(collect=False))

    run = Run()
    run.fit(trainer, Look(), run.callback())
    assert left == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_returned_none_holds_nothing(trainer: MakeTrainer) -> None:
    """L25, L2: its student was called, and nothing was made of it."""
    left: list[int] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            left.append(pl_module.model.alive(collect=False))

    def step(module: Any, batch: Any, batch_idx: int) -> Any:
        output = module.model(batch[0])
        return output.sum() if batch_idx == 2 else None  # an epoch without any loss is refused

    callback = DistillCallback(nets.teacher(), FeatureDistillation("layer2", "layer2"))
    module = nets.StepModule(nets.make(Watched, 1), step)
    trainer(max_epochs=1, callbacks=[Look(), callback]).fit(module, nets.loader())
    assert left[:2] == [0, 0]
