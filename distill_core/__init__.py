"""The parts that both halves share and that need no framework.

These are the files of a teacher cache, schedules, checks of settings, and the command lines. Only NumPy is imported.
"""

__version__ = "0.1.0"

PACKAGES = ("distill_core", "lightning_distill", "keras_distill")
