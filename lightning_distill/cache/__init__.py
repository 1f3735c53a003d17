"""Teacher outputs on disk: the teacher runs once, and later trainings cost as much as training the student alone."""

from distill_core.store import CacheError
from lightning_distill.cache.data import AttachedDataset, IndexedBatch
from lightning_distill.cache.keyed import content_key
from lightning_distill.cache.teacher_cache import TeacherCache

__all__ = ["AttachedDataset", "CacheError", "IndexedBatch", "TeacherCache", "content_key"]
