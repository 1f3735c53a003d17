"""The parts that both launchers share; they need pydantic, and for files PyYAML."""
