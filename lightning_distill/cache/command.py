"""What ``lightning-distill cache`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from distill_core.launcher.class_path import ClassPath
from lightning_distill.cache import TeacherCache
from lightning_distill.checks import closest

_SETTINGS = (
    "layers",
    "outputs",
    "top_k",
    "dtype",
    "views",
    "transform_seed",
    "batch_size",
    "num_workers",
    "device",
    "allow_stale_augmentation",
    "shard_bytes",
)


def build_from_file(file: Path) -> TeacherCache:
    """Build the cache that a YAML file describes.

    Args:
        file: The file: ``path``, ``teacher`` and ``dataset`` by class_path and init_args, and settings of
            :meth:`TeacherCache.build`.

    Returns:
        The cache.

    Raises:
        ValueError: If something in the file is wrong.
        OSError: If it cannot be read, or the cache cannot be written.
    """
    try:
        values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: Expected a YAML file, but got {' '.join(str(error).split())}.") from None
    known = ("path", "teacher", "dataset", *_SETTINGS)
    for key in values if isinstance(values, dict) else ():
        if key not in known:
            raise ValueError(f"{file}: Expected `{key}` to be a known key, but it is not. {closest(str(key), known)}")
    made = {}
    for key in ("teacher", "dataset", "path"):
        if not isinstance(values, dict) or key not in values:
            raise ValueError(f"{file}: Expected `{key}` to be given, but it is not.")
        try:
            made[key] = values[key] if key == "path" else ClassPath(**values[key]).make()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: Expected `{key}` to be a class_path with init_args, but got {error}.") from None
    settings = {key: values[key] for key in _SETTINGS if key in values}
    return TeacherCache.build(made["teacher"], made["dataset"], file.parent / made["path"], **settings)


def describe(cache: TeacherCache) -> None:
    """Print what a cache holds."""
    manifest = cache.manifest
    table = Table("array", "shape", "stored as", "bytes a row")
    for name, codec in manifest.codecs.items():
        described = manifest.arrays[name]
        kept = f"top {described['top_k']}, {described['dtype']}" if described.get("top_k") else described["dtype"]
        label = f"{name} ({manifest.layers[name].replace('|', ', ')})" if name in manifest.layers else name
        table.add_row(label, str(tuple(described["shape"])), kept, f"{codec.bytes_per_row:,}")
    console = Console()
    console.print(f"{manifest.length:,} items in {manifest.views} view(s), {manifest.bytes / 2**20:,.1f} MiB")
    console.print(f"teacher {manifest.teacher['class']} {manifest.teacher['fingerprint']}")
    console.print(table)
