"""The base class of all terms, also of custom ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops  # noqa: F401 - the example uses it

from distill_core.checks import about_teacher
from keras_distill import checks
from keras_distill.balancing import BalanceState
from keras_distill.recording import Call, Tap
from keras_distill.schedules import Balanced, Schedule, Weight, as_weight, deserialized, first_value, serialized
from keras_distill.terms.state import Settings, TermState, layer_copy


class DistillationTerm:
    """A loss at a place in the two models, with a weight: the base class of all terms, also of custom ones.

    A term holds settings. A model makes its own copy of each term, in ``model.terms``. The copies share the settings: a
    weight that is assigned to the term or to a copy changes in every model that uses the term, from the next step on.
    Adapters and other weights belong to the model's copy: they are trained along with the student's weights and saved
    with the distillation model, but not with the student alone.

    A subclass implements :meth:`compute`. It lists the layers that it reads in ``student_taps`` and ``teacher_taps``,
    and makes weights that depend on the features' shapes in :meth:`build_from_calls`. It needs :meth:`get_config` only
    if the model is saved.

    Args:
        weight: Factor of the term in the total loss, 0 or greater, a number, a schedule or ``"balanced"``, short for
            a :class:`Balanced`. A term of weight 0 is skipped in training, and its key is missing from the logs;
            evaluation computes it.
        name: Name in logs and files, distinct among the terms.
        use_sample_weight: Whether the batch's sample weights are applied to the term. Pass False if a weight of 0 means
            that an example has no label: the task loss then ignores the example, but the term still uses it.
        trainable: Whether the term's adapters and other weights are trained.

    Attributes:
        student_taps: Layers of the student that the term reads.
        teacher_taps: Layers of the teacher that the term reads.
        student_values: Layers of the student whose outputs the term reads beside the features, such as boxes.
        needs_labels: Whether :meth:`compute` needs the batch's labels.
        needs_teacher: Whether :meth:`compute` reads the teacher.
        trains_only: Whether evaluation leaves the term out, because it knows the training data alone.
        labels_checked: Whether the targets of a batch need no further look, or have had one.
        schedules: The schedules of the weight and of the loss's settings, by name; ``fit`` follows them.
        built: Whether :meth:`build_from_calls` has run; always False for a term that is not a model's copy.
        state: The numbers and weights of a model's copy; None for a term that is not one.

    Raises:
        ValueError: If ``weight`` is negative or not finite, or ``name`` is empty, ``"task"``, ``"distillation"`` or
            contains ``/`` or ``.``.
        TypeError: If a setting has the wrong type or is unknown.

    Example:
        >>> class MeanGap(DistillationTerm):
        ...     def compute(self, student, teacher, labels=None, sample_weight=None):
        ...         return ops.abs(ops.mean(student.output) - ops.mean(teacher.output))
        >>> term = MeanGap(weight=0.5, name="gap")
        >>> float(term.compute(Call(ops.ones((2, 3))), Call(3.0 * ops.ones((2, 3)))))
        2.0
    """

    student_taps: Sequence[Tap] = ()
    teacher_taps: Sequence[Tap] = ()
    student_values: Sequence[Tap] = ()
    needs_labels: bool = False
    needs_teacher: bool = True
    trains_only: bool = False
    labels_checked: bool = True
    built: bool = False
    state: TermState | None = None
    _first_weights: dict[str, Any] | None = None
    _origin: DistillationTerm | None = None

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        name: str,
        use_sample_weight: bool = True,
        trainable: bool = True,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(_unknown_settings(type(self).__name__, unknown))
        self.schedules: dict[str, Schedule] = {}
        weight = first_value(
            "weight", as_weight(weight, checks.message), checks.non_negative, self.schedules, balances=True
        )
        checks.boolean("use_sample_weight", use_sample_weight)
        checks.boolean("trainable", trainable)
        if not isinstance(name, (str, type(None))):
            raise TypeError(checks.message("`name` to be a string", f"name={name!r}"))
        if not name or name in ("task", "distillation"):  # the logs hold task_loss and distillation_loss
            raise ValueError(checks.message("`name` to be neither empty, 'task' nor 'distillation'", f"name={name!r}"))
        if "/" in name or "." in name:  # Keras separates layers by "/", torch by "."
            raise ValueError(checks.message("`name` to hold neither '/' nor '.'", f"name={name!r}", "Use '_'."))
        self.name, self.use_sample_weight = name, use_sample_weight
        self._settings = Settings(weight=float(weight), trainable=trainable)

    @property
    def weight(self) -> float:
        """Factor of the term in the total loss; assign a number to change it from the next step on."""
        weight, balance = float(self._settings["weight"]), self._balance
        return weight if balance is None else weight * balance.factor  # of a balanced weight the share is a setting

    @weight.setter
    def weight(self, value: float) -> None:
        self.set_setting("weight", value)

    @property
    def _balance(self) -> BalanceState | None:
        return None if self.state is None else self.state.balance

    @property
    def measuring(self) -> bool:
        """Whether the weight is balanced, and not fixed yet."""
        return self._balance is not None and self._balance.measuring

    @property
    def trainable(self) -> bool:
        """Whether the term's adapters and other weights are trained."""
        return bool(self._settings["trainable"])

    @trainable.setter
    def trainable(self, value: bool) -> None:
        checks.boolean("trainable", value)
        self._settings["trainable"] = value
        self._settings.changed()

    @property
    def trainable_variables(self) -> list[Any]:
        """The trainable weights of the term in the model that owns it."""
        return [] if self.state is None else list(self.state.trainable_variables)

    @property
    def trained_taps(self) -> Sequence[Tap]:
        """Taps of the student whose features have a gradient in this term."""
        return self.student_taps

    def learned_numbers(self) -> dict[str, Any]:
        """Numbers that the term learns and logs, by name."""
        return {}

    def numbers(self) -> dict[str, float]:
        """The settings that can change without a new trace, by name."""
        balanced = isinstance(self.schedules.get("weight"), Balanced)
        return {"weight": self.weight, **({"share": self._settings["weight"]} if balanced else {})}

    def set_setting(self, name: str, value: float) -> None:
        """Set the weight, or a setting of the loss, from the next step on.

        Args:
            name: Name of the setting.
            value: A number: 0 or greater for a weight, greater than 0 for a temperature.

        Raises:
            ValueError: If the number is out of range, or the setting has a schedule, which would overwrite it.
        """
        if name in self.schedules:
            expected = f"`{name}` of term {self.name!r} not to be assigned while it has a schedule"
            received = f"{name}={value!r}, and {self.schedules[name]!r}"
            raise ValueError(checks.message(expected, received, "Pass a number instead of the schedule."))
        self.follow(name, value)

    def follow(self, name: str, value: float) -> None:
        """Set a setting to a number, also if it has a schedule, which then called this.

        Args:
            name: Name of the setting.
            value: The number.

        Raises:
            ValueError: If the number is out of range.
        """
        check = checks.non_negative if name.endswith("weight") else checks.positive
        check(name, value)
        self._store(name, float(value))
        self._settings.changed()

    def traced_settings(self) -> tuple[Any, ...]:
        """The settings that a traced graph contains as constants: if one changes, the term is traced again."""
        return (self.name, self.trainable)

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Make layers and weights that depend on the features' shapes; called once, before the first use.

        Layers and losses that are assigned to attributes here belong to the model that owns the term;
        ``self.add_weight`` makes single weights.

        Args:
            student: A call of the student. Its tensors may be symbolic, without values.
            teacher: The teacher's call with the same input.
        """

    def check_calls(self, student: Call, teacher: Call) -> None:
        """Check that a new teacher fits the layers and weights that have been built.

        Args:
            student: A symbolic call of the student.
            teacher: A symbolic call of the new teacher.
        """

    def expect_new_labels(self) -> None:
        """Let the first batch of a new training be checked too."""

    def check_labels(self, inputs: Any, labels: Any, image: tuple[int, int] | None = None) -> None:
        """Check the targets of a batch once, before the first step, where ``labels_checked`` is False.

        Args:
            inputs: The inputs of a batch.
            labels: Its labels.
            image: Height and width of the student's images, if they are known.
        """

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight.

        Args:
            student: The student's call.
            teacher: The teacher's call with the same input.
            labels: The batch's labels, or None.
            sample_weight: The batch's sample weights, or None.

        Returns:
            A scalar, under ``tf.distribute`` divided by the number of replicas, as Keras' own losses are; or one value
            for each example, which are averaged.

        Raises:
            NotImplementedError: If the subclass does not implement it.
        """
        raise NotImplementedError(f"Expected {type(self).__name__} to implement `compute`.")

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Add a weight to the model that owns the term; the arguments are those of ``keras.layers.Layer.add_weight``.

        Raises:
            ValueError: If no model owns the term yet.
        """
        if self.state is None:
            expected = f"`add_weight` of {type(self).__name__} to be called in `build_from_calls`"
            raise ValueError(checks.message(expected, "a term that no model owns yet"))
        return self.state.add_weight(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {
            "name": self.name,
            "weight": serialized(self.schedules.get("weight"), self.weight),
            "use_sample_weight": self.use_sample_weight,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistillationTerm:
        """The term that :meth:`get_config` describes."""
        return cls(**deserialized(config))

    def get_shapes(self) -> dict[str, Any] | None:
        """The shapes from which :meth:`build_from_shapes` makes the same weights again, or None."""
        return None

    def build_from_shapes(self, config: dict[str, Any]) -> None:
        """Make the weights of a saved model, before they are loaded.

        Args:
            config: The result of :meth:`get_shapes`.
        """

    # The copy that a model owns -----------------------------------------------------------------------------------

    def owned(self, student: keras.Model) -> DistillationTerm:
        """A copy for one owner, which shares the settings and makes its own adapters and other weights.

        Args:
            student: The owner's student; the copy's taps name its layers by their paths.

        Returns:
            The copy.
        """
        origin = self._origin or self
        copy = object.__new__(type(self))
        copy.__dict__.update({**vars(origin), **origin._layers_for_an_owner()})
        copy._origin = origin
        copy.student_taps = [tap.within(student, "student") for tap in origin.student_taps]
        copy.student_values = [tap.within(student, "student") for tap in origin.student_values]
        copy.state = TermState(copy)
        origin._settings.add(copy.state)
        copy.take_numbers()
        return copy

    def _layers_for_an_owner(self) -> dict[str, keras.layers.Layer]:
        """The layers that the user passed to the term: the layers themselves for the first owner, then copies.

        Two models that trained the same layer would interfere. A copy has the weights from before any training.
        """
        layers = {name: value for name, value in vars(self).items() if isinstance(value, keras.layers.Layer)}
        if self._first_weights is None:
            self._first_weights = {name: layer.get_weights() if layer.built else None for name, layer in layers.items()}
            return layers
        who = f"term {self.name!r}"
        return {name: layer_copy(layer, self._first_weights.get(name), who) for name, layer in layers.items()}

    def take_numbers(self) -> None:
        """Let an owner's copy compute with the owner's variables."""

    def in_teachers(self, teachers: Sequence[keras.Model | None]) -> None:
        """Let ``teacher_taps`` name the layers by their paths in the first of several teachers.

        Args:
            teachers: The teachers, None for one whose outputs are stored. It, and an empty list, restore the taps that
                the user passed.

        Raises:
            ValueError: If a tap does not name one layer of a teacher.
        """
        self.teacher_taps = self._taps_in(teachers[0] if teachers else None)

    def for_teacher(self, number: int) -> DistillationTerm:
        """The part of the term that reads one of several teachers: its taps and, if features differ, its adapters."""
        return self

    def parts(self) -> list[tuple[str, DistillationTerm]]:
        """The term and its parts for further teachers, each with a prefix for what it owns."""
        return [("part", self)]

    def build_for(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make the layers and weights, and check that all teachers fit.

        Args:
            student: A call of the student, which may be symbolic.
            teachers: A call of each teacher.
        """
        for number, teacher in enumerate(teachers):
            with about_teacher(number, len(teachers)):
                if number == 0:
                    self.build_from_calls(student, teacher)
                else:
                    self.check_calls(student, teacher)

    def _taps_in(self, teacher: keras.Model | None) -> list[Tap]:
        origin = self._origin or self
        taps = origin.teacher_taps
        return list(taps if teacher is None else [tap.within(teacher, "teacher") for tap in taps])

    def _store(self, name: str, value: float) -> None:
        self._settings[name] = value

    def __repr__(self) -> str:
        weight = self.schedules.get("weight", self.weight)
        return f"{type(self).__name__}(name={self.name!r}, weight={weight!r})"

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: a copy or a pickle does not belong to a model."""
        origin = self._origin or self
        return {name: dict(value) if name == "_settings" else value for name, value in vars(origin).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_settings": Settings(**state["_settings"])})


def _unknown_settings(kind: str, unknown: dict[str, Any]) -> str:
    name = next(iter(unknown))
    remedy = ""
    if name == "temperature":
        remedy = f"In keras_distill the temperature belongs to the loss: {kind}(SoftTargetLoss(temperature=...))."
    elif name in ("distillation_loss", "distillation_losses"):
        remedy = f"Pass the loss first: {kind}(loss)."
    return checks.message(f"known settings of {kind}", f"{name}={unknown[name]!r}", remedy)
