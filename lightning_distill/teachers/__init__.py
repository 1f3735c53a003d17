"""Teachers: loading them from files."""
