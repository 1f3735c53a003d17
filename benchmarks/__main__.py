"""Every benchmark in turn: ``python -m benchmarks``; with ``--device``, those on that device."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = [
    "step_overhead",
    "cache",
    "cache_reading",
    "codecs",
    "keras_step",
    "loss_memory",
    "loss_time",
    "fused_linear",
    "pair_layers",
]
ON_DEVICE = ["on_device", "device_steps", "device_cache"]

if __name__ == "__main__":
    names = ON_DEVICE if any(argument.startswith("--device") for argument in sys.argv) else BENCHMARKS
    for name in names:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=True)
