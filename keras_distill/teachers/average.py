"""A teacher that is the moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks
from keras_distill.recording import sublayers
from keras_distill.schedules import Schedule, deserialized, first_value, serialized
from keras_distill.states import NumbersState
from keras_distill.teachers.live import StudentAsTeacher


@keras.saving.register_keras_serializable(package="keras_distill")
class AverageState(NumbersState):
    """The averages of a student's weights, with the decay and the number of updates, as variables that Keras saves.

    Args:
        teacher: The owner.
        number: Its position among several teachers.

    Attributes:
        updates: Number of updates so far.
    """

    def __init__(self, teacher: EMATeacher, number: int = 0) -> None:
        self.teacher = teacher
        super().__init__({"decay": teacher.decay}, name=f"average_{number}" if number else "average")
        self.updates = self._variable("updates", (), "int32", "zeros", "only_first_replica")

    def current(self) -> Mapping[str, float]:
        """The decay."""
        return {"decay": self.teacher.decay}

    def take(self, numbers: Mapping[str, float]) -> None:
        """Accept the decay of a file."""
        self.teacher.follow("decay", numbers["decay"])
        self.teacher.expect_loaded()

    def made(self, student: keras.Model) -> list[tuple[keras.Variable, keras.Variable]]:
        """Make the averages, with the student's values.

        Args:
            student: The student, built.

        Returns:
            Pairs of a variable of the student and its average.
        """
        pairs = []
        for index, variable in enumerate(student.weights):
            dtype = keras.backend.standardize_dtype(variable.dtype)
            if keras.backend.is_float_dtype(dtype):
                dtype = keras.backend.result_type(dtype, "float32")  # a step of 0.001 is lost in half precision
            # statistics differ between replicas, trained weights do not
            aggregation = "only_first_replica" if variable.trainable else "mean"
            value = backends.value_of(variable)
            first = _Value(value)
            pairs.append((variable, self._variable(f"average_{index}", variable.shape, dtype, first, aggregation)))
        return pairs

    def _variable(self, name: str, shape: Any, dtype: str, initializer: Any, aggregation: str) -> keras.Variable:
        if not keras.backend.is_float_dtype(dtype) and aggregation == "mean":
            aggregation = "only_first_replica"
        return self.add_weight(
            name=name, shape=shape, dtype=dtype, initializer=initializer, trainable=False, autocast=False,
            aggregation=aggregation,
        )  # fmt: skip


class _Value:
    """An initializer that returns a value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        return ops.cast(self.value, dtype)


@keras.saving.register_keras_serializable(package="keras_distill")
class EMATeacher:
    r"""A teacher that is the exponential moving average of the student's weights (mean teacher).

    .. math:: \theta_t \leftarrow d \, \theta_t + (1 - d) \, \theta_s

    It follows each step of the optimizer, with gradient accumulation only the steps in which weights change. Statistics
    such as those of batch normalisation are averaged too, integers are copied. The average begins as a copy of the
    student when the training begins; it is kept in float32 or better, and saved with the model, not with the student.
    It may be one of several teachers, ``[EMATeacher(0.99), model]``.

    Args:
        decay: Share of the old average, from 0 to 1, a number or a schedule.

    Attributes:
        schedules: The schedule of the decay, if it has one.
        student: The student that it follows; None before a model owns it. A model makes its own copy.

    Raises:
        ValueError: If ``decay`` is out of range.

    Example:
        >>> from keras_distill import DistillModel
        >>> model = DistillModel(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]), EMATeacher(0.9))
        >>> model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> history = model.fit(ops.ones((8, 4)), ops.zeros((8,)), verbose=0)
        >>> before = model.teacher.averaged().get_weights()[1]  # the bias, which began at 0
        >>> bool((abs(before - 0.1 * model.student.get_weights()[1]) < 1e-6).all())
        True

    References:
        Tarvainen, Valpola (2017). Mean teachers are better role models. arXiv:1703.01780.
    """

    student: keras.Model | None = None
    state: AverageState | None = None
    followed = False
    _begun = False
    _first_batch: int | None = None  # the optimizer's counter when the average began

    def __init__(self, decay: float | Schedule = 0.999) -> None:
        # not in an attribute of the state, where Keras would count the student's variables as the state's own
        self._pairs: list[tuple[keras.Variable, keras.Variable]] = []
        self.schedules: dict[str, Schedule] = {}
        self._decay = first_value("decay", decay, _check_decay, self.schedules)

    @property
    def decay(self) -> float:
        """Share of the old average; assign a number to change it from the next step on."""
        return self._decay

    @decay.setter
    def decay(self, value: float) -> None:
        if "decay" in self.schedules:
            expected = "`decay` not to be assigned while it has a schedule"
            received = f"decay={value!r}, and {self.schedules['decay']!r}"
            raise ValueError(checks.message(expected, received, "Pass a number instead of the schedule."))
        self.follow("decay", value)

    def follow(self, name: str, value: float) -> None:
        """Set the decay, also if it has a schedule, which then called this.

        Args:
            name: ``"decay"``.
            value: The number.
        """
        _check_decay(name, value)
        self._decay = float(value)
        if self.state is not None and self.state.numbers_written["decay"] != self._decay:
            self.state.sync()

    def owned(self, student: keras.Model, number: int = 0) -> EMATeacher:
        """A copy for one student.

        Args:
            student: The student.
            number: Its position among several teachers.

        Returns:
            The copy.

        Raises:
            ValueError: If the average of the student's weights would not be a model.
        """
        for path, layer in sublayers(student):
            kind = type(layer).__name__
            if kind == "TorchModuleWrapper" or getattr(layer, "stateful", False):
                expected = "a student of Keras layers without a state between batches, for an EMATeacher"
                raise ValueError(checks.message(expected, f"the {kind} {path!r}"))
        copy = EMATeacher(self._decay)
        copy.schedules, copy.student = dict(self.schedules), student
        copy.state = AverageState(copy, number)
        copy.build()
        return copy

    def build(self) -> None:
        """Make the averages, if the student is built."""
        if self.state is not None and self.student is not None and self.student.built and not self._pairs:
            self._pairs = self.state.made(self.student)

    def begin(self, batches: int = 0) -> None:
        """Copy the student's weights before the first batch: they may have been loaded after the teacher was made.

        It waits for the device.

        Args:
            batches: Number of batches that the optimizer has processed. If they have become more since the average
                began, an evaluation among batches that are accumulated for the first step changes nothing.
        """
        if self._begun or self.state is None:
            return
        if int(ops.convert_to_numpy(self.state.updates)) > 0:
            self._begun = True
        elif self._first_batch is None or batches <= self._first_batch:
            self._first_batch = batches
            for variable, average in self.pairs():
                average.assign(ops.cast(backends.value_of(variable), average.dtype))

    def expect_loaded(self) -> None:
        """Take the average of a file for one that begins with the first batch of its optimizer."""
        self._first_batch = 0

    def pairs(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """The student's variables with their averages.

        Raises:
            ValueError: If the student has got other weights since.
        """
        student = self.student
        if student is None:
            raise ValueError(checks.message("an EMATeacher of a model", "one that no model owns", "Use model.teacher."))
        if self._pairs and [id(weight) for weight in student.weights] != [id(own) for own, _ in self._pairs]:
            expected = "the student to have the weights that it had when the EMATeacher was made"
            remedy = "Change the student first, then make the DistillModel."
            raise ValueError(checks.message(expected, f"{len(student.weights)} weights, some of them new", remedy))
        return self._pairs

    def update(self, stepped: Any = True) -> None:
        """Move the averages towards the student.

        Args:
            stepped: Whether the optimizer has changed the weights, a bool or a scalar tensor.
        """
        pairs, state = self.pairs(), self.state
        self.followed = True
        if state is None or not pairs:
            return
        decay = state.number("decay")
        for variable, average in pairs:
            value, before = ops.cast(backends.value_of(variable), average.dtype), ops.convert_to_tensor(average)
            if keras.backend.is_float_dtype(keras.backend.standardize_dtype(average.dtype)):
                share = ops.cast(decay, average.dtype)
                value = share * before + (1.0 - share) * value
            average.assign(ops.where(stepped, value, before))
        state.updates.assign(state.updates + ops.cast(stepped, "int32"))

    def averaged(self) -> keras.Model:
        """A copy of the student with the averaged weights, a plain Keras model to evaluate or save.

        Returns:
            A new model.

        Raises:
            ValueError: If no model owns the teacher, or the student is not built.
        """
        pairs, student = self.pairs(), self.student
        if not pairs or student is None:
            raise ValueError(checks.message("a student that is built", "no weights yet", "Call it on a batch first."))
        copy: keras.Model = keras.models.clone_model(student)
        if not copy.built:
            copy.build_from_config(student.get_build_config())
        copy.set_weights([ops.convert_to_numpy(ops.cast(average, variable.dtype)) for variable, average in pairs])
        return copy

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {"decay": serialized(self.schedules.get("decay"), self._decay)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EMATeacher:
        """The teacher that :meth:`get_config` describes."""
        return cls(**deserialized(config))

    def __repr__(self) -> str:
        return f"EMATeacher(decay={self.schedules.get('decay', self._decay)!r})"


class AveragedTeacher(StudentAsTeacher):
    """Runs the student's layers with the averages in the place of the student's weights."""

    def values_instead(self) -> list[tuple[keras.Variable, Any]]:
        """The averages."""
        self.teacher.build()
        return [(variable, ops.convert_to_tensor(average)) for variable, average in self.teacher.pairs()]

    def _values(self, part: keras.layers.Layer) -> list[tuple[keras.Variable, Any]]:
        """The weights of a part with their averages."""
        own = {id(variable) for variable in part.variables}
        pairs = [(variable, average) for variable, average in self.teacher.pairs() if id(variable) in own]
        return [(variable, ops.convert_to_tensor(average)) for variable, average in pairs]


def _check_decay(name: str, value: Any) -> None:
    checks.between(name, value, 0, 1)
