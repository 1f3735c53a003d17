"""What both halves share and no framework is needed for: the files of a teacher cache. Imports NumPy alone."""
