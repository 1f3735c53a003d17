"""A teacher that answers from a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.store import CacheError, Reader
from lightning_distill.functional.top_k import TopK
from lightning_distill.recording import Call, Tap


@dataclass(eq=False)
class CachedCall(Call):
    """A teacher's call that was made long ago.

    Attributes:
        cached: Features by layer and side.
        top_k: The likeliest classes, where the cache holds only those.
    """

    cached: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    top_k: TopK | None = None

    def feature(self, tap: Tap) -> Tensor:
        """The cached feature at a tap."""
        return self.cached[tap.layer, tap.where]


class CachedTeacher(nn.Module):
    """What stands in for a teacher whose outputs are on disk.

    Args:
        reader: Reads them.

    Attributes:
        rows: Rows of the batch that the student is shown, shape ``(N,)``; set before each step.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        self.rows: Tensor | None = None
        self.layers = {tuple(place.split("|", 1)): name for name, place in reader.manifest.layers.items()}

    def check(self, taps: Iterable[Tap], needs_output: bool) -> None:
        """Raise if the cache lacks what is read.

        Args:
            taps: The layers that terms read.
            needs_output: Whether a term reads the output.

        Raises:
            CacheError: If so; the message says what there is.
        """
        for tap in taps:
            if (tap.layer, tap.where) not in self.layers:
                there = [layer for layer, _ in self.layers] or "no layers"
                raise CacheError(
                    f"Expected the cache to hold the {tap.where} of the teacher's layer {tap.layer!r}, but it holds"
                    f" {there}. Build it with layers=[{tap.layer!r}]."
                )
        if needs_output and "output" not in self.reader.manifest.arrays:
            raise CacheError("Expected the cache to hold the teacher's outputs, but it was built with outputs=False.")

    def answer(self, size: int, device: torch.device, logits: Callable[[Any], Tensor]) -> CachedCall:
        """The teacher's call for the rows of this step.

        Args:
            size: Number of examples that the student was shown.
            device: Where the tensors go.
            logits: From an output to its logits.

        Returns:
            The call.

        Raises:
            CacheError: If no rows were set, or their number differs.
        """
        if self.rows is None or len(self.rows) != size:
            got = "none" if self.rows is None else f"{len(self.rows)}"
            raise CacheError(
                f"Expected one row of the cache for each of the {size} examples that the student was shown, but got"
                f" {got}. Call the student once with the whole batch."
            )
        found = self.reader.read(self.rows.cpu().numpy())
        output, top_k = found.pop("output", None), None
        if isinstance(output, tuple):
            indices, logs, tail = (torch.from_numpy(one).to(device) for one in output)
            top_k = TopK(indices, logs, tail, self.reader.manifest.arrays["output"]["shape"][-1])
            output = None
        elif output is not None:
            output = torch.from_numpy(output).to(device).float()
        last = self.reader.manifest.data["kind"] == "keras"  # whose maps have their channels there
        features = {name: np.moveaxis(one, -1, 1) if last and one.ndim == 4 else one for name, one in found.items()}
        cached = {place: torch.from_numpy(features[name]).to(device).float() for place, name in self.layers.items()}
        return CachedCall((), {}, output=output, who="teacher", read_logits=logits, cached=cached, top_k=top_k)  # type: ignore[arg-type]
