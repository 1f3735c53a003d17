"""Every benchmark in turn: ``python -m benchmarks``; with ``--device``, those on that device.

With ``--records`` they write into ``benchmarks/records``, and docs/performance.md is made from these files.
"""

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
    "token_alignment",
]
ON_DEVICE = ["on_device", "device_steps", "device_cache"]

if __name__ == "__main__":
    options = [argument for argument in sys.argv[1:] if argument != "--records"]
    kept = len(options) < len(sys.argv) - 1
    for name in ON_DEVICE if any(option.startswith("--device") for option in options) else BENCHMARKS:
        place = ["--json", f"benchmarks/records/{name}.json"] if kept else []
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options, *place], check=True)
    if kept:
        subprocess.run([sys.executable, "-m", "benchmarks.performance_page"], check=True)
