"""Run the example of every loss's page: ``python docs/site/run_programs.py [NAME ...]``."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import ModuleType

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import lightning.pytorch  # noqa: F401 - before TensorFlow: Triton, which it imports, crashes after it
import tensorflow as tf
from loss_pages import programs


def run(names: list[str]) -> list[str]:
    """Run the programs of these losses, or of all; returns those that failed."""
    warnings.simplefilter("ignore")
    tf.config.run_functions_eagerly(True)  # one or two steps: tracing would take most of the time
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    failed = []
    for name, code in programs().items():
        if names and name.split()[0] not in names:
            continue
        start = time.perf_counter()
        module = ModuleType("program")  # its classes can be found and pickled
        sys.modules["program"] = module
        try:
            exec(compile(code, f"{name}.py", "exec"), module.__dict__)
        except Exception:
            failed.append(name)
            traceback.print_exc()
        print(f"{name}: {'failed' if name in failed else 'ran'} in {time.perf_counter() - start:.1f} s", flush=True)
    return failed


if __name__ == "__main__":
    if failures := run(sys.argv[1:]):
        sys.exit(f"failed: {', '.join(failures)}")
