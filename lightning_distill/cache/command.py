"""The commands of ``lightning-distill cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.data import IterableDataset

from distill_core.class_paths import make_from_class_path
from distill_core.cli import working_directory
from distill_core.manifest import Rule, among, or_none, place_in_batch, text, whole
from distill_core.parts import Part
from distill_core.remote import is_url, local_folder
from distill_core.terminal import printable
from distill_core.yaml_files import read_yaml
from lightning_distill.cache import TeacherCache
from lightning_distill.checks import closest

_SETTINGS: dict[str, Rule] = {
    "layers": lambda value: "" if _is_names(value) else "a list of layer names",
    "outputs": among(True, False),
    "top_k": or_none(whole(1)),
    "dtype": text(),
    "key": or_none(place_in_batch),
    "mask": or_none(place_in_batch),
    "sampled": or_none(whole(2)),
    "feature_dtype": or_none(text()),
    "views": whole(1),
    "transform_seed": or_none(whole(0)),
    "batch_size": whole(1),
    "num_workers": whole(0, 1024),
    "device": or_none(text()),
    "allow_stale_augmentation": among(True, False),
    "shard_bytes": whole(1),
}


def build_from_file(file: Path, part: str | None = None) -> None:
    """Build the cache that a YAML file describes, or a part of it.

    Args:
        file: The file: ``path``, ``teacher`` and ``dataset`` by class_path and init_args, and settings of
            :meth:`TeacherCache.build`.
        part: Which part, such as ``"3/16"``; its folder has the ending ``-part-3-of-16``.

    Raises:
        ValueError: If something in the file is wrong.
        OSError: If the file cannot be read, or the cache cannot be written.
    """
    values, known = read_yaml(file), ("path", "teacher", "dataset", *_SETTINGS)
    for key in values:
        if key not in known:
            raise ValueError(f"{file}: Expected `{key}` to be a known key, but it is not. {closest(key, known)}")
    for key in ("teacher", "dataset", "path"):
        if key not in values:
            raise ValueError(f"{file}: Expected `{key}` to be given, but it is not.")
    if not isinstance(values["path"], str) or not values["path"]:
        raise ValueError(f"{file}: Expected `path` to name a folder, but got path={values['path']!r}.")
    settings = {key: values[key] for key in _SETTINGS if key in values}
    for key, value in settings.items():
        if words := _SETTINGS[key](value):
            raise ValueError(f"{file}: Expected `{key}` to be {words}, but got {key}={value!r}.")
    with working_directory(first=True):
        teacher, dataset = (make_from_class_path(key, values[key], f"{file}: ") for key in ("teacher", "dataset"))
    if not isinstance(teacher, nn.Module):
        raise ValueError(
            f"{file}: Expected `teacher` to make a torch.nn.Module, but got a {type(teacher).__name__}. Name a class or"
            " a function that returns the network."
        )
    by_number = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not by_number and not (isinstance(dataset, IterableDataset) and settings.get("key") is not None):
        raise ValueError(
            f"{file}: Expected `dataset` to make a dataset with a length and samples by index, but got a"
            f" {type(dataset).__name__}. Name a class or a function that returns a map-style dataset, or give `key` for"
            " a stream."
        )
    place = values["path"]
    folder: Any = place if is_url(place) else file.parent / place
    if part is None:
        TeacherCache.build(teacher, dataset, folder, **settings)
    else:
        chosen = Part.of(part)
        folder = local_folder(folder)
        folder = folder.with_name(f"{folder.name}-part-{chosen.number}-of-{chosen.count}")
        TeacherCache.build_part(teacher, dataset, folder, part, **settings)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def describe(cache: TeacherCache) -> None:
    """Print the contents of a cache."""
    manifest = cache.manifest
    table = Table("array", "shape", "stored as", "bytes an item")
    for name, codec in manifest.codecs.items():
        described = manifest.arrays[name]
        kept = described["dtype"]
        if "top_k" in described:
            kept = f"top {described['top_k']}, {kept}"
        elif "sampled" in described:
            kept = f"{described['sampled']} drawn at random"
        if "ragged" in described:
            kept += ", tokens alone"
        label = f"{name} ({manifest.layers[name].replace('|', ', ')})" if name in manifest.layers else name
        table.add_row(*map(_plain, (label, tuple(described["shape"]), kept, f"{codec.bytes_per_item:,}")))
    console = Console(highlight=False)
    console.print(
        _plain(f"{manifest.length:,} items in {manifest.views} view(s), {cache.reader.bytes / 2**20:,.1f} MiB")
    )
    if manifest.key is not None:
        console.print(_plain(f"rows by key: {manifest.key.get('column', manifest.key['kind'])}"))
    console.print(_plain(f"teacher {manifest.teacher['class']} {manifest.teacher['fingerprint']}"))
    console.print(table)


def _plain(text: Any) -> Text:
    """Text that may come from a file, without effect of rich's markup and of control characters."""
    return Text(printable(text))
