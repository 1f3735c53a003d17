"""The JSON file of a benchmark: settings, machine, versions, command, date and rows."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "triton", "liger-kernel", "lightning", "keras", "tensorflow")
# Settings of the benchmarks that change timings.
VARIABLES = (
    *("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS"),
    *("DISTILL_KERNELS", "PYTORCH_ALLOC_CONF"),
)


def write_record(path: Path, title: str, rows: Sequence[Any], settings: Mapping[str, Any], device: str = "cpu") -> None:
    """Write what a benchmark measured, and where.

    Args:
        path: The file.
        title: The benchmark in a few words.
        rows: Dataclasses; the file holds the name of the class as ``kind``, and ``passed`` for those that have a gate.
        settings: Settings of the benchmark.
        device: ``"cpu"`` or ``"cuda"``: where the tensors were.
    """
    content = {
        "title": title,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "settings": dict(settings),
        **environment(device),
        "rows": [_entry(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _entry(row: Any) -> dict[str, Any]:
    judged = {"passed": row.passed} if hasattr(row, "passed") else {}
    return {"kind": type(row).__name__, **asdict(row), **judged}


def environment(device: str) -> dict[str, Any]:
    """``machine``, ``versions``, ``commit``, ``command`` and ``environment`` of this process.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    import torch

    from distill_core.guidance.machine import machine, version

    known = machine(device, **{name: version(name) for name in PACKAGES if version(name)})
    known["versions"]["torch"] = torch.__version__
    known["machine"] |= {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores_busy_with_other_work": _other_work(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known["machine"] |= {
            "gpu": properties.name,
            "gpu_memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
        }
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {**known, "command": _without_path(known["command"]), "environment": variables}


def _without_path(command: str) -> str:
    """The command without ``--json PATH``, which is a matter of the machine."""
    words = shlex.split(command)
    if "--json" in words:
        place = words.index("--json")
        del words[place : place + 2]
    return shlex.join(word for word in words if not word.startswith("--json="))


def _clocks() -> tuple[float, float, float] | None:
    """Seconds: of wall time, of all cores together, and of this process with those that it has ended."""
    try:
        jiffies = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]]
    except (OSError, ValueError):
        return None
    idle = sum(jiffies[3:5])
    own = os.times()
    spent = own.user + own.system + own.children_user + own.children_system
    # the last two count again as work of guests
    return time.monotonic(), (sum(jiffies[:8]) - idle) / os.sysconf("SC_CLK_TCK"), spent


_START = _clocks()


def _other_work() -> float | None:
    """Mean number of cores that other processes kept busy since this process began; None where Linux does not say."""
    now = _clocks()
    if _START is None or now is None:
        return None
    wall, busy, spent = (after - before for before, after in zip(_START, now, strict=True))
    return round(max(0.0, busy - spent) / wall, 2) if wall > 1 else None
