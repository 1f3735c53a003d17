"""Teacher outputs on disk: the teacher runs once, in either framework, and later trainings run without it."""

from distill_core.store import CacheError
from keras_distill.cache.data import CachedData
from keras_distill.cache.teacher_cache import TeacherCache

__all__ = ["CacheError", "CachedData", "TeacherCache"]
