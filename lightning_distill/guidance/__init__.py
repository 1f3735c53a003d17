"""Guidance: which layers, and did distillation help."""

from lightning_distill.guidance.compare import compare, run_once
from lightning_distill.guidance.pairs import LayerPairs, pair_layers

__all__ = ["LayerPairs", "compare", "pair_layers", "run_once"]
