"""Guidance for Keras models: what a model costs."""
