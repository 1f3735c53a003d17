"""What both halves share and no framework is needed for.

The files of a teacher cache, schedules, checks of settings, and the command lines. Imports NumPy alone.
"""

__version__ = "0.1.0"
