"""Teachers: one protocol, and what answers by it: networks, a cache, nothing."""

from lightning_distill.teachers.loading import load_teacher
from lightning_distill.teachers.source import (
    LiveTeachers,
    NoTeacher,
    TeacherEnsemble,
    TeacherSource,
    as_dtype,
    as_teacher,
)

__all__ = [
    "LiveTeachers",
    "NoTeacher",
    "TeacherEnsemble",
    "TeacherSource",
    "as_dtype",
    "as_teacher",
    "load_teacher",
]
