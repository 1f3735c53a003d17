"""Adapters: the learned maps from a student feature's shape to a teacher feature's, and their life in a run."""

from lightning_distill.adapters.align import aligned, pooled
from lightning_distill.adapters.follower import OptimizerCallable
from lightning_distill.adapters.make import AdapterFactory, make_adapter
from lightning_distill.adapters.principal import PCAProjection

__all__ = ["AdapterFactory", "OptimizerCallable", "PCAProjection", "aligned", "make_adapter", "pooled"]
