"""What the two launchers share. Each module is imported when a launcher is: ``conf`` needs pydantic and PyYAML."""
