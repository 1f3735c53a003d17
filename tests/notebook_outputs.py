"""Executes the notebooks. `python tests/notebook_outputs.py` stores their outputs, and so does `make notebooks-write`.

With names, such as `python tests/notebook_outputs.py teacher_cache`, only these notebooks are executed and written.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# TensorFlow's C++ part writes this when it is imported, whatever TF_CPP_MIN_LOG_LEVEL says; it is about the computer.
GREETING = re.compile(r"WARNING: All log messages before absl|I0000 00:00:")
CELL_TIMEOUT = 600  # seconds; only ends a cell that hangs


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook with the outputs of an execution from top to bottom.

    It runs in `folder / "reader"`, with `folder / "temporary"` for temporary files. The kernel is the interpreter that
    runs this code, and it imports the packages of this checkout.
    """
    for name in ("reader", "temporary", "kernels/tested"):
        (folder / name).mkdir(parents=True)
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "IPYTHONDIR": str(folder / "ipython"),
        "TMPDIR": str(folder / "temporary"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # as in Jupyter: figures become outputs
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "tested", "language": "python", "env": environment}
    (folder / "kernels" / "tested" / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")

    notebook = nbformat.read(path, as_version=4)
    metadata = copy.deepcopy(notebook.metadata)
    resources = {"metadata": {"path": str(folder / "reader")}}
    places = {"JUPYTER_PATH": str(folder), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    with mock.patch.dict(os.environ, places):
        NotebookClient(
            notebook, timeout=CELL_TIMEOUT, kernel_name="tested", resources=resources, record_timing=False
        ).execute()
    notebook.metadata = metadata  # without the version of this interpreter
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = tidied(cell.outputs)
    return notebook


def tidied(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs without TensorFlow's greeting, and with the lines of one stream in one output."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
            continue
        text = "".join(line for line in output.text.splitlines(keepends=True) if not GREETING.match(line))
        if not text:
            continue
        if kept and kept[-1].get("name") == output.name:
            kept[-1].text += text
        else:
            kept.append(nbformat.v4.new_output("stream", name=output.name, text=text))
    return kept


def printed(cell: NotebookNode) -> str:
    """The text outputs of a cell."""
    outputs = cell.get("outputs", [])
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") + "\n" for output in outputs)


def main(names: list[str]) -> None:
    """Execute notebooks and store their outputs in their files."""
    for path in NOTEBOOKS:
        if names and path.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
