"""Teachers: models and functions that run in inference mode and without gradient."""

from keras_distill.teachers.average import AveragedTeacher, EMATeacher
from keras_distill.teachers.checked import as_teachers, checked_dtype
from keras_distill.teachers.inputs import checked_hook, chosen_inputs, joint_inputs, with_call
from keras_distill.teachers.itself import OwnLayers, SelfTeacher
from keras_distill.teachers.live import LiveTeacher, StudentAsTeacher
from keras_distill.teachers.outside import CallableTeacher
from keras_distill.teachers.stored import StoredTeacher

__all__ = [
    "AveragedTeacher",
    "CallableTeacher",
    "EMATeacher",
    "LiveTeacher",
    "OwnLayers",
    "SelfTeacher",
    "StoredTeacher",
    "StudentAsTeacher",
    "as_teachers",
    "checked_dtype",
    "checked_hook",
    "chosen_inputs",
    "joint_inputs",
    "with_call",
]
