"""Teachers: one protocol, implemented by networks, by a cache, and for no teacher."""

from lightning_distill.teachers.callable_teacher import CallableTeacher
from lightning_distill.teachers.group import TeacherGroup, members
from lightning_distill.teachers.loading import load_teacher
from lightning_distill.teachers.make import as_dtype, as_teacher
from lightning_distill.teachers.moving_average import EMATeacher
from lightning_distill.teachers.normalize import Normalize
from lightning_distill.teachers.self_teacher import SelfTeacher
from lightning_distill.teachers.source import LiveTeachers, NoTeacher, TeacherEnsemble, TeacherSource

__all__ = [
    "CallableTeacher",
    "EMATeacher",
    "LiveTeachers",
    "NoTeacher",
    "Normalize",
    "SelfTeacher",
    "TeacherEnsemble",
    "TeacherGroup",
    "TeacherSource",
    "as_dtype",
    "as_teacher",
    "load_teacher",
    "members",
]
