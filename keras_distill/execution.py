"""One traced function for each set of working terms, chosen in Python before each execution."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_distill import checks, compat
from keras_distill.callbacks import steps_of
from keras_distill.schedules import Progress


class StepFunction:
    """A function that Keras keeps as ``train_function`` or ``test_function`` and calls with each execution's data.

    A term of weight 0 is not in the graph at all. A weight that crosses 0 chooses the graph of another set of terms,
    which is traced once. Keys of the logs that an execution does not measure are those of earlier ones in the epoch.

    Args:
        model: The DistillModel.
        make: Keras' own method that makes the function.
        attribute: Where that method puts it, ``"train_function"`` or ``"test_function"``.
        training: Whether it trains.
    """

    def __init__(self, model: Any, make: Callable[..., Any], attribute: str, *, training: bool) -> None:
        self.model, self._make, self._attribute, self._training = model, make, attribute, training
        self.made: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *args: Any) -> Any:
        """One execution."""
        model, step, parts = self.model, self.model.step, self.model.loss_parts
        if self._training:
            self._follow_schedules(args)
        for state in step.states:
            state.sync()
        signature = step.signature(self._training)
        if signature not in self.made:
            with _fresh_steps(model):
                self._make(force=True)
            self.made = {key: made for key, made in self.made.items() if key[0] == step.version}
            self.made[signature] = getattr(model, self._attribute)
            setattr(model, self._attribute, self)
        step.working_names = tuple(traced[0] for traced in signature[1:])
        parts.now = set()
        try:
            with self._quiet(step):
                result = self.made[signature](*self._with_numbers(args))
        finally:
            step.working_names = parts.now = None
        logs, *rest = result if isinstance(result, tuple) else (result,)
        return self._completed(dict(logs), rest)

    def _completed(self, logs: dict[str, Any], rest: list[Any]) -> Any:
        """The logs with the parts that were measured earlier in the epoch; with Keras' own values of JAX after them."""
        parts = self.model.loss_parts
        if isinstance(logs.get(parts.name), dict):  # a train_step as in Keras' guide lists metrics by their names
            logs.update(logs.pop(parts.name))
        parts.measured |= parts.names & logs.keys()
        late = parts.measured - logs.keys()
        if late:
            scope: Any = contextlib.nullcontext()
            if keras.backend.backend() == "jax":
                scope = keras.StatelessScope(list(zip(self.model.metrics_variables, rest[0][-1], strict=False)))
            with scope:
                logs.update(parts.result_of(late))
        return (logs, *rest) if rest else logs

    @contextlib.contextmanager
    def _quiet(self, step: Any) -> Iterator[None]:
        """Without Keras' warning about variables without gradient where adapters of skipped terms have none."""
        if not self._training or len(step.working_names or ()) == len(step.terms):
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Gradients do not exist")
            yield

    def _follow_schedules(self, args: tuple[Any, ...]) -> None:
        """Set the numbers of a step outside of ``fit``, which has no epochs and no end."""
        scheduled = [] if self.model.fitting else steps_of(self.model)
        for label, schedule, _ in scheduled:
            if schedule.over != "steps":
                expected = f"the schedule of `{label}` to run over steps outside of `fit`"
                remedy = "Train with `fit`, or give the setting a number and assign it."
                raise ValueError(checks.message(expected, f"over={schedule.over!r}", remedy))
        if scheduled:
            progress = Progress(self._iteration(args), 0, 0.0)
            for _, schedule, assign in scheduled:
                assign(schedule.at(progress))

    def _iteration(self, args: tuple[Any, ...]) -> int:
        """Steps of the optimizer so far."""
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if keras.backend.backend() != "jax":
            return int(ops.convert_to_numpy(optimizer.iterations))
        # in a step of JAX values are in the state that is handed on, not in the variables
        places = [id(variable) for variable in self.model.optimizer.variables]
        counter = next(variable for variable in optimizer.variables if "iteration" in variable.path)
        batches = int(args[0][2][places.index(id(counter))])
        return batches // (optimizer.gradient_accumulation_steps or 1)

    def _with_numbers(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """On JAX the numbers of the terms in the state that is handed on; elsewhere the variables hold them."""
        if keras.backend.backend() != "jax" or not args or not isinstance(args[0], tuple):
            return args
        (trainable, fixed, *others), *rest = args
        now = {
            id(variable): state.numbers_written[name]
            for state in self.model.step.states
            for name, variable in state.variables_by_name.items()
        }
        now[id(self.model.task_weight_variable)] = self.model.task_weight
        fixed = [
            ops.convert_to_tensor(now[id(variable)], variable.dtype) if id(variable) in now else value
            for variable, value in zip(self.model.non_trainable_variables, fixed, strict=True)
        ]
        return ((trainable, fixed, *others), *rest)


def leave_out_xla(model: Any) -> None:
    """Compile without XLA where a teacher has layers that it cannot compile, as Keras does for a model's own layers.

    Args:
        model: The DistillModel.
    """
    if model.jit_compile and not all(compat.model_supports_jit(live.model) for live in model.step.teachers):
        if model.jit_compile is True:
            warnings.warn(
                "The teacher does not support `jit_compile=True`. Proceeding with `jit_compile=False`.", stacklevel=3
            )
        model.jit_compile = False


@contextlib.contextmanager
def _fresh_steps(model: Any) -> Iterator[None]:
    """jax.jit keeps traces by function, and two bound methods of one model are equal: without this none is traced."""
    names = ("train_step", "test_step") if keras.backend.backend() == "jax" else ()
    for name in names:
        object.__setattr__(model, name, functools.partial(getattr(type(model), name), model))
    try:
        yield
    finally:
        for name in names:
            object.__delattr__(model, name)
