"""Guidance: which layers, and did distillation help."""

from keras_distill.guidance.compare import compare, run_once
from keras_distill.guidance.pairs import LayerPairs, pair_layers

__all__ = ["LayerPairs", "compare", "pair_layers", "run_once"]
