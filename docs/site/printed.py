"""Run the programs of pages and put what they print into the pages.

``python docs/site/printed.py docs/quickstart_keras.md ...`` runs the ``python`` blocks of a page in order, in an empty
folder, and replaces the text block after ``<!-- output: ... -->`` with what they printed up to there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"((?:<!--[^>]*-->\n+)?)```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def with_output(text: str) -> str:
    """A page with the output of its program.

    Raises:
        RuntimeError: If the program fails; the message ends with its traceback.
    """
    program, files = "", {}
    for block in BLOCK.finditer(text):
        note, language, code = block.groups()
        if note.startswith("<!-- output"):
            return f"{text[: block.start(3)]}{printed(program, files)}{text[block.end(3) :]}"
        if name := re.match(r"<!-- file: (\S+) -->", note):
            files[name[1]] = code
        program += code if language == "python" and not note.startswith("<!-- no-run") else ""
    return text


def printed(program: str, files: dict[str, str]) -> str:
    """The standard output of a program, which runs beside the files that the page shows."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {**files, "page.py": program}.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        done = subprocess.run([sys.executable, "page.py"], capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return re.sub(r" +$", "", done.stdout, flags=re.MULTILINE).strip("\n") + "\n"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(with_output(page.read_text(encoding="utf-8")), encoding="utf-8")
