"""The student as its own teacher."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill import checks
from keras_distill.recording import sublayers
from keras_distill.teachers.live import StudentAsTeacher

_FACTORS = ("lora_kernel_b", "lora_embeddings_b")


@keras.saving.register_keras_serializable(package="keras_distill")
class SelfTeacher:
    """The student as its own teacher: without its LoRA weights, or with other inputs.

    It runs in inference mode and without gradient, with the weights that the student has at that moment, and takes no
    memory of its own. ``adapters=False`` is the model before ``enable_lora``, as far as other weights do not train:
    Keras trains the biases of such layers too. With adapters it is the student itself, so pass ``teacher_inputs=``,
    such as images without noise or a richer prompt. It may be one of several teachers. Files hold it only with
    adapters, because Keras merges LoRA weights into the others when it saves them.

    Args:
        student: The model that is trained.
        adapters: Whether its LoRA weights are on.

    Attributes:
        student: The model; None in a teacher of a file, until a :class:`DistillModel` takes it.

    Raises:
        TypeError: If ``student`` is not a Keras model.
        ValueError: If it has no LoRA weights to leave out.

    Example:
        >>> from keras_distill import DistillModel
        >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> student.layers[0].enable_lora(2)
        >>> DistillModel(student, SelfTeacher(student, adapters=False)).teacher
        SelfTeacher(adapters=False)
    """

    student: keras.Model | None

    def __init__(self, student: keras.Model, *, adapters: bool = True) -> None:
        if not isinstance(student, keras.Model):
            raise TypeError(checks.message("`student` to be a keras.Model", f"a {type(student).__name__}"))
        checks.boolean("adapters", adapters)
        if not adapters and not _lora_variables(student):
            remedy = "Call enable_lora(rank) of its layers or of its backbone first."
            raise ValueError(checks.message("`student` to have LoRA weights", f"{student.name!r} without", remedy))
        self.student, self.adapters = student, adapters

    def take(self, student: keras.Model) -> None:
        """Become the teacher of a student, whose copy a file holds.

        Args:
            student: The student that is trained.

        Raises:
            ValueError: If this is a teacher of another one.
        """
        if self.student is not None and self.student is not student:
            expected = "the SelfTeacher to hold the student that is trained"
            raise ValueError(checks.message(expected, "another model", "Pass SelfTeacher(student)."))
        self.student = student

    def check_differs(self) -> None:
        """Raise if its output must be the student's, because it gets the same input.

        Raises:
            ValueError: If so.
        """
        if self.student is not None and self.adapters and not _trains_otherwise(self.student):
            expected = "the SelfTeacher to answer otherwise than the student"
            received = "the same weights and inputs, without dropout or another layer that trains otherwise"
            remedy = "Pass teacher_inputs=<function> for other inputs, or SelfTeacher(student, adapters=False)."
            raise ValueError(checks.message(expected, received, remedy))

    def get_config(self) -> dict[str, Any]:
        """The setting, ready for JSON; the file of a model holds the student itself."""
        return {"adapters": self.adapters}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SelfTeacher:
        """The teacher that :meth:`get_config` describes, without a student."""
        teacher = cls.__new__(cls)
        teacher.student, teacher.adapters = None, config["adapters"]
        return teacher

    def __call__(self, inputs: Any) -> Any:
        """The output for a teacher's input."""
        return OwnLayers(self, []).answer(inputs).output

    def __repr__(self) -> str:
        return f"SelfTeacher(adapters={self.adapters})"


class OwnLayers(StudentAsTeacher):
    """Runs the student's layers, without the LoRA weights if the teacher says so."""

    def values_instead(self) -> list[tuple[keras.Variable, Any]]:
        """Zeros for one factor of each product of LoRA."""
        if self.teacher.adapters:
            return []
        return [(variable, ops.zeros(variable.shape, variable.dtype)) for variable in _lora_variables(self.model)]

    def _values(self, part: keras.layers.Layer) -> list[tuple[keras.Variable, Any]]:
        """The weights of a part with their values, or with zeros."""
        zeros = {id(variable): value for variable, value in self.values_instead()}
        return [(variable, zeros.get(id(variable), value)) for variable, value in super()._values(part)]


def _lora_variables(model: keras.Model) -> list[keras.Variable]:
    """The second factors of the products that LoRA adds to weights."""
    layers = [layer for _, layer in sublayers(model) if getattr(layer, "lora_enabled", False)]
    return [getattr(layer, name) for layer in layers for name in _FACTORS if hasattr(layer, name)]


def _trains_otherwise(model: keras.Model) -> bool:
    """Whether the output may differ between training and inference; a layer that is not Keras' own may be random."""
    changing = (keras.layers.BatchNormalization, keras.layers.SpectralNormalization)
    for layer in (model, *(layer for _, layer in sublayers(model))):
        random = any(getattr(layer, name, None) is not None for name in ("seed_generator", "generator"))
        if random or isinstance(layer, changing) or not type(layer).__module__.startswith("keras."):
            return True
    return False
