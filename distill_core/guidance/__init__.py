"""Guidance for a distillation that needs no framework: which layers to pair, and how to show it."""
