"""Pages from recipes and notebooks."""

from __future__ import annotations

import ast
import base64
import json
import re
from pathlib import Path


def recipe_page(path: Path) -> str:
    """A recipe: its docstring as the text, then its code."""
    source = path.read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or path.stem
    first, _, rest = text.partition("\n\n")
    name = path.name
    return f"# {name}\n\n{_prose(first)}\n\n{_prose(rest)}\n\n```python\n{source.rstrip()}\n```\n"


def _prose(text: str) -> str:
    """Text of a docstring as Markdown; a table of text stays as it is."""
    parts = []
    for paragraph in re.split(r"\n\n+", text):
        lines = paragraph.splitlines()
        printed = len(lines) > 1 and sum("  " in line.strip() for line in lines) > len(lines) / 2
        parts.append(f"```text\n{paragraph}\n```" if printed else re.sub(r"``([^`]+)``", r"`\1`", paragraph))
    return "\n\n".join(parts)


def notebook_page(path: Path, images: Path) -> str:
    """A notebook with its stored outputs; its pictures are written to the folder of images."""
    parts = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for place, output in enumerate(cell.get("outputs", [])):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{number}-{place}.png"
                images.mkdir(parents=True, exist_ok=True)
                (images / name).write_bytes(base64.b64decode("".join(data["image/png"])))
                parts.append(f"![Output of the code above](../docs/images/{name})")
            elif text := "".join(output.get("text", data.get("text/plain", []))).strip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"
