"""Guidance: which layers to pair."""

from lightning_distill.guidance.pairs import LayerPairs, pair_layers

__all__ = ["LayerPairs", "pair_layers"]
