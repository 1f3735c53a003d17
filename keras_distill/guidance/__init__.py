"""Guidance: which layers, which weight, and did distillation help."""

from keras_distill.guidance.compare import compare, run_once

__all__ = ["compare", "run_once"]
