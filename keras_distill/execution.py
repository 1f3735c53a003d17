"""One traced function for each set of computed terms; Python chooses one before each execution."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks, compat
from keras_distill.callbacks import scheduled_settings
from keras_distill.schedules import Progress
from keras_distill.terms import SequenceDistillation


class StepFunction:
    """The ``train_function`` or ``test_function`` of a model, which Keras calls with the data of each execution.

    The graph of a training step does not contain terms of weight 0. If a weight becomes 0 or stops being 0, another
    graph is used, which is traced once. The logs also hold values from earlier executions of the epoch.

    Args:
        model: The DistillModel.
        make: Keras' own method that makes the function.
        attribute: Where that method stores it, ``"train_function"`` or ``"test_function"``.
        training: Whether it trains.

    Attributes:
        made: The functions by the signature of the step.
    """

    def __init__(self, model: Any, make: Callable[..., Any], attribute: str, *, training: bool) -> None:
        self.model, self._make, self._attribute, self._training = model, make, attribute, training
        self.made: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *args: Any) -> Any:
        """Run one execution."""
        model, step, parts = self.model, self.model.step, self.model.loss_parts
        if self._training:
            self._follow_schedules(args)
            if any(term.measuring for term in step.terms):
                step.begin(self._iteration(args))
        for state in step.states:
            state.sync()
        signature = step.signature(self._training)
        if signature not in self.made:
            if self._training:
                _create_variables(model, args)
            with _fresh_steps(model):
                self._make(force=True)
            self.made = {key: made for key, made in self.made.items() if key[0] == step.version}
            self.made[signature] = getattr(model, self._attribute)
            setattr(model, self._attribute, self)
        step.working_names = tuple(traced[0] for traced in signature[1:])
        parts.names_measured.in_step = set()
        try:
            with self._quiet(step):
                result = self.made[signature](*self._with_numbers(args))
        finally:
            step.working_names = parts.names_measured.in_step = None
        if self._training and not all(average.followed for average in step.averages):
            expected = "the step to update the EMATeacher"
            remedy = "Call super().train_step(...), or self.step.update_teacher() after the optimizer's step."
            raise ValueError(checks.message(expected, f"a custom `train_step` of {type(model).__name__}", remedy))
        logs, *rest = result if isinstance(result, tuple) else (result,)
        return self._completed(dict(logs), rest)

    def _completed(self, logs: dict[str, Any], rest: list[Any]) -> Any:
        """The logs with the parts that were measured earlier in the epoch; on JAX followed by the state of the step."""
        parts = self.model.loss_parts
        if isinstance(logs.get(parts.name), dict):  # a train_step as in Keras' guide lists metrics by their names
            logs.update(logs.pop(parts.name))
        measured = parts.names_measured.since_reset
        measured |= parts.names & logs.keys()
        late = measured - logs.keys()
        if late:
            scope: Any = contextlib.nullcontext()
            if keras.backend.backend() == "jax":
                scope = keras.StatelessScope(list(zip(self.model.metrics_variables, rest[0][-1], strict=False)))
            with scope:
                logs.update(parts.result_of(late))
        return (logs, *rest) if rest else logs

    @contextlib.contextmanager
    def _quiet(self, step: Any) -> Iterator[None]:
        """Silence Keras' warning about variables without gradient: adapters of skipped terms do not have one."""
        if not self._training or len(step.working_names or ()) == len(step.terms):
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Gradients do not exist")
            yield

    def _follow_schedules(self, args: tuple[Any, ...]) -> None:
        """Set the scheduled numbers of a step outside of ``fit``, where only schedules over steps are defined."""
        scheduled = [] if self.model.fitting else scheduled_settings(self.model)
        for label, schedule, _ in scheduled:
            if schedule.over != "steps":
                expected = f"the schedule of `{label}` to run over steps outside of `fit`"
                remedy = "Train with `fit`, or pass a number and assign new ones yourself."
                raise ValueError(checks.message(expected, f"over={schedule.over!r}", remedy))
        if scheduled:
            progress = Progress(self._iteration(args), 0, 0.0)
            for _, schedule, assign in scheduled:
                assign(schedule.at(progress))

    def _iteration(self, args: tuple[Any, ...]) -> int:
        """Number of optimizer steps so far."""
        if keras.backend.backend() != "jax":
            batches, accumulated = compat.raw_iterations(self.model.optimizer)
            return batches // accumulated
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        # on JAX the values are in the state that a step gets and returns, not in the variables
        places = [id(variable) for variable in self.model.optimizer.variables]
        counter = next(variable for variable in optimizer.variables if "iteration" in variable.path)
        batches = int(args[0][2][places.index(id(counter))])
        return batches // (optimizer.gradient_accumulation_steps or 1)

    def _with_numbers(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """On JAX put the terms' numbers into the state that the step gets; elsewhere it reads the variables."""
        if keras.backend.backend() != "jax" or not args or not isinstance(args[0], tuple):
            return args
        (trainable, fixed, *others), *rest = args
        numbers = {
            id(variable): state.numbers_written[name]
            for state in self.model.step.states
            for name, variable in state.variables_by_name.items()
        }
        numbers[id(self.model.task_weight_variable)] = self.model.task_weight
        fixed = [
            ops.convert_to_tensor(numbers[id(variable)], variable.dtype) if id(variable) in numbers else value
            for variable, value in zip(self.model.non_trainable_variables, fixed, strict=True)
        ]
        return ((trainable, fixed, *others), *rest)


def _create_variables(model: Any, args: tuple[Any, ...]) -> None:
    """Create the variables of the optimizer and the metrics, so that TensorFlow traces the step once and not twice."""
    specification = getattr(args[0], "element_spec", None) if args else None
    parts = [part for part in keras.tree.flatten(specification) if part is not None]
    plain = all(type(part).__name__ == "TensorSpec" and part.shape.rank is not None for part in parts)
    if parts and plain and model.step.built:
        compat.create_variables(model, specification)


def position_of(model: Any) -> Any:
    """The optimizer steps that a model has made so far, an integer scalar; None if no term measures its weight.

    Args:
        model: The DistillModel, in a step.
    """
    if model.optimizer is None or not any(term.measuring for term in model.terms):
        return None
    counter, accumulated = compat.iterations_counter(model.optimizer)
    return ops.cast(backends.value_of(counter), "int32") // accumulated


def followed_by_average(model: Any, train: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Run a training step; then the teachers that are averages of the student follow, if the weights have changed.

    Args:
        model: The DistillModel.
        train: Keras' training step.
        args: Its arguments; on JAX the state of the step, then the data.

    Returns:
        The result of the step; on JAX with the new averages in the state.
    """
    follow = model.step.update_teacher
    if not model.step.averages or model.optimizer is None:
        return train(*args)
    counter, accumulated = compat.iterations_counter(model.optimizer)
    if keras.backend.backend() != "jax":
        before = backends.value_of(counter)
        result = train(*args)
        follow(backends.value_of(counter) // accumulated != before // accumulated)
        return result
    place = [id(variable) for variable in model.optimizer.variables].index(id(counter))
    before = args[0][2][place]
    logs, (trainable, fixed, optimizer, metrics) = train(*args)
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    with keras.StatelessScope(list(zip(variables, [*trainable, *fixed], strict=True))) as scope:
        follow(optimizer[place] // accumulated != before // accumulated)
    fixed = [scope.get_current_value(variable) for variable in model.non_trainable_variables]
    return logs, (trainable, fixed, optimizer, metrics)


def leave_out_xla(model: Any) -> None:
    """Switch XLA off if it cannot compile a teacher's layers, as Keras does for a model's own layers.

    Args:
        model: The DistillModel.
    """
    if model.jit_compile and not all(compat.model_supports_jit(live.model) for live in model.step.teachers):
        if model.jit_compile is True:
            warnings.warn(
                "The teacher does not support `jit_compile=True`. Proceeding with `jit_compile=False`.", stacklevel=3
            )
        model.jit_compile = False


def warn_of_accumulation(model: Any) -> None:
    """Warn of an optimizer that averages batches with unequal numbers of tokens as if they were equal.

    Args:
        model: The compiled DistillModel.
    """
    batches = getattr(model.optimizer, "inner_optimizer", model.optimizer).gradient_accumulation_steps or 1
    names = [term.name for term in model.terms if isinstance(term, SequenceDistillation)]
    if batches > 1 and names:
        warnings.warn(
            f"The optimizer averages the gradients of {batches} batches, each of which is a mean over its own tokens in"
            f" term {names[0]!r}. With unequal numbers of tokens this is not the mean over all tokens: use larger"
            " batches, or batches of equally many tokens.",
            stacklevel=3,
        )


@contextlib.contextmanager
def _fresh_steps(model: Any) -> Iterator[None]:
    """Let jax.jit trace the steps again: it caches traces by function, and bound methods of one model are equal."""
    names = ("train_step", "test_step") if keras.backend.backend() == "jax" else ()
    for name in names:
        object.__setattr__(model, name, functools.partial(getattr(type(model), name), model))
    try:
        yield
    finally:
        for name in names:
            object.__delattr__(model, name)
