"""Guidance for PyTorch modules: what a model costs."""
