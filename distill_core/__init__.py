"""What both halves share and no framework is needed for.

The files of a teacher cache, schedules, and checks of settings. Imports NumPy alone.
"""
