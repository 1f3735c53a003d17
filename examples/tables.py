"""The table that every recipe prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def show(title: str, results: dict[str, float], measure: str = "accuracy") -> dict[str, float]:
    """Print accuracies, or another measure from 0 to 1, and hand them on."""
    table = Table("", measure, title=title)
    for name, value in results.items():
        table.add_row(name, f"{100 * value:.1f} %")
    Console().print(table)
    return results
