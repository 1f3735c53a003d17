"""Guidance: which layers, which weight, and did distillation help. No framework is imported."""
