"""The config and the variables that files of a DistillModel hold."""

from __future__ import annotations

from typing import Any

import keras

from keras_distill import backends, checks
from keras_distill.learned_parts import ModelWithLearnedParts
from keras_distill.metrics import LossParts
from keras_distill.schedules import Schedule, deserialized, serialized
from keras_distill.teachers import EMATeacher, SelfTeacher
from keras_distill.terms import DistillationTerm


@keras.saving.register_keras_serializable(package="keras_distill")
class ModelInFiles(ModelWithLearnedParts):
    """Base of :class:`keras_distill.DistillModel`: what its files hold."""

    student: keras.Model
    terms: list[DistillationTerm]
    schedules: dict[str, Schedule]
    evaluate_distillation: bool
    must_compare: bool
    loss_parts: LossParts
    task_weight_variable: keras.Variable
    _task_weight: float

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON; they include the teacher only if ``save_teacher`` is True."""
        serialize, metrics = keras.saving.serialize_keras_object, self.loss_parts.teacher_metrics
        teachers = keras.tree.map_structure(
            lambda each: serialize(each) if self.save_teacher or _is_of_student(each) else None, self.teacher
        )  # the models and caches among several teachers leave gaps
        in_files = self.save_teacher or any(map(_is_of_student, keras.tree.flatten(self.teacher)))
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": serialize(self.dtype_policy),
            "student": serialize(self.student),
            "teacher": teachers if in_files else None,
            "terms": [serialize(term) for term in self.terms],
            "task_weight": serialized(self.schedules.get("task_weight"), self._task_weight),
            "evaluate_distillation": self.evaluate_distillation,
            "teacher_metrics": [serialize(metric) for metric in metrics] if self.must_compare or not metrics else None,
            "teacher_inputs": serialize(self._given_inputs),
            "teacher_dtype": self.step.teacher_dtype,
            **self.step.ensemble.mix.settings(),
            "save_teacher": self.save_teacher,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> ModelInFiles:
        """The model that :meth:`get_config` describes."""
        restored = {
            key: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            for key, value in config.items()
            if key in ("student", "teacher", "terms", "teacher_metrics", "teacher_inputs") and value is not None
        }
        if isinstance(config.get("teacher_weights"), list):
            restored["teacher_weights"] = [deserialized({"": weight})[""] for weight in config["teacher_weights"]]
        return cls(**deserialized({key: value for key, value in config.items() if key not in restored}), **restored)

    def get_build_config(self) -> dict[str, Any] | None:
        """The shapes from which the terms can make their adapters without a teacher."""
        return {"terms": {term.name: term.get_shapes() for term in self.terms if term.built}}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Make the adapters of a saved model."""
        self.step.build_from_config((config or {}).get("terms", {}))
        self.built = True

    def get_compile_config(self) -> dict[str, Any] | None:
        """The arguments of ``compile``, and whether the optimizer has a state."""
        config: dict[str, Any] | None = super().get_compile_config()
        if not config or not self.compiled:
            return config  # a model that is not compiled has no optimizer
        return {**config, "optimizer_built": self.optimizer is not None and self.optimizer.built}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile a loaded model; its optimizer is built only if the file holds a state for it.

        Keras builds the optimizer of each built model, which then does not know the adapters that are made later.
        """
        config, built = dict(config), self.built
        self.built = config.pop("optimizer_built", True) and built
        try:
            super().compile_from_config(config)
        finally:
            self.built = built

    def load_weights(self, filepath: Any, skip_mismatch: bool = False, **kwargs: Any) -> None:
        """Like ``keras.Model.load_weights``; it does not leave out the adapters that are still to be made.

        Args:
            filepath: The file.
            skip_mismatch: Whether to skip weights that do not fit, adapters that are still to be made among them.
            **kwargs: Further arguments of ``keras.Model.load_weights``.

        Raises:
            ValueError: If the file holds weights of adapters that a term has not made yet, for lack of a teacher.
        """
        super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)
        for term in self.terms:
            if not skip_mismatch and term.state is not None and term.state.left_out:
                expected = f"term {term.name!r} to have made its layers before weights are loaded"
                remedy = (
                    "First set `model.teacher`, or call `model.evaluate` on data with the teacher's outputs;"
                    " or pass skip_mismatch=True to leave these weights out."
                )
                raise ValueError(checks.message(expected, f"a file with {term.state.left_out} weights of them", remedy))

    def load_own_variables(self, store: Any) -> None:
        """Load this model's own variable, the task weight."""
        super().load_own_variables(store)
        self._task_weight = backends.same_or_loaded(self._task_weight, self.task_weight_variable)


def _is_of_student(teacher: Any) -> bool:
    """Whether a teacher is made of the student in the file, which has no LoRA weights: Keras merges them."""
    return isinstance(teacher, EMATeacher) or (isinstance(teacher, SelfTeacher) and teacher.adapters)
