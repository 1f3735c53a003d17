"""The parts that both halves share and that need no framework.

These are the files of a teacher cache, schedules, checks of settings and of installed packages, and the command lines.
No framework is imported.
"""

__version__ = "0.1.0"  # the only place; setup.cfg reads it here

PACKAGES = ("distill_core", "lightning_distill", "keras_distill")
