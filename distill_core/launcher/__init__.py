"""The parts that both launchers share; they need pydantic, and for files PyYAML."""

from distill_core.installed import unusable

if _problem := unusable("The launcher", "pydantic", "yaml"):
    raise _problem
