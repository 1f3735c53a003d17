"""A teacher whose outputs are read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from distill_core.store import CacheError
from lightning_distill.cache.data import IndexedBatch
from lightning_distill.cache.loaders import OpenCache, read_answers
from lightning_distill.cache.positions import padded
from lightning_distill.functional.top_k import Sampled, TopK
from lightning_distill.recording import Call, Tap, first_tensor
from lightning_distill.recording.rows import DataRows
from lightning_distill.teachers.without_network import WithoutNetwork


class Stored(NamedTuple):
    """The teacher's outputs for the examples of a batch.

    Attributes:
        answers: The outputs as CPU tensors, from :func:`read_answers`; ``None`` if the batch carried none.
        check: Checks that a call of the student got the same inputs as the teacher; ``None`` does not check.
    """

    answers: Mapping[str, Tensor] | None
    check: Callable[[Call], None] | None = None


class CachedTeacher(WithoutNetwork):
    """A source of teacher outputs from disk. They come with the batch; no state of a step is kept.

    Args:
        cache: The cache.
    """

    live, stored = False, True

    def __init__(self, cache: OpenCache) -> None:
        self.cache = cache
        self.layers = {tuple(place.split("|", 1)): name for name, place in cache.manifest.layers.items()}

    def check(self, taps: Sequence[tuple[str, Tap]], reader: str | None, output_reader: str | None) -> None:
        """Raise an error if the cache lacks an output or a layer that the terms read.

        Args:
            taps: Pairs of the argument that named a layer, and the tap.
            reader: Name of a term that reads the teacher; not used.
            output_reader: Name of a term that reads the output; ``None`` if no term does.

        Raises:
            CacheError: If the cache lacks it; the message names the cache's layers.
        """
        for _, tap in taps:
            if (tap.layer, tap.where) not in self.layers:
                held = [layer for layer, _ in self.layers] or "no layers"
                raise CacheError(
                    f"Expected the cache to hold the {tap.where} of the teacher's layer {tap.layer!r}, but it holds"
                    f" {held}. Build it with layers=[{tap.layer!r}]."
                )
        if output_reader is not None and "output" not in self.cache.manifest.arrays:
            raise CacheError("Expected the cache to hold the teacher's outputs, but it was built with outputs=False.")

    def unpack(self, batch: Any) -> tuple[Any, Stored]:
        """Split a batch of ``cache.attach(dataset)`` into the user's batch and the teacher's outputs for it."""
        if isinstance(batch, IndexedBatch):
            return batch.batch, Stored(read_answers(self.cache, batch.rows, batch.batch))
        return batch, Stored(None)

    def answers(self, call: Call, stored: Stored | None = None) -> list[Call]:
        """The teacher's call for the same examples as a call of the student, on the device of the student's.

        Args:
            call: The student's call.
            stored: The teacher's outputs for the batch.

        Raises:
            CacheError: If the batch has no outputs or for another number of examples, or the student's inputs were
                changed.
        """
        first = first_tensor(call.args, call.kwargs, call.output)
        if stored is None or stored.answers is None:
            raise CacheError(
                "Expected the batch to carry the teacher's outputs, but it does not: it comes from another loader than"
                " the Trainer's training loader, or from one that keeps an iterator or overrides __iter__. Use a plain"
                " DataLoader. In a loop of your own pass the batch of `cache.attach(dataset)` to `total`."
            )
        answers = stored.answers
        size, number = len(first) if first.ndim else 1, len(answers["rows"])
        if size != number:
            raise CacheError(
                f"Expected the student to be called with the {number} examples of the batch, since the cache holds"
                f" one output for each, but got {size}. Call the student once with the whole batch; a collate function"
                " must not drop or repeat items."
            )
        if stored.check is not None:
            stored.check(call)
        moved = {name: tensor.to(first.device, non_blocking=True) for name, tensor in answers.items() if name != "rows"}
        places = {name: place for place, name in self.layers.items()}
        held = {
            places.get(name, name): _aligned(name, moved)
            for name in self.cache.manifest.arrays
            if self.cache.manifest.is_ragged(name)
        }
        output, top_k = moved.get("output"), None
        if "output.indices" in moved:
            described = self.cache.manifest.arrays["output"]
            kind = Sampled if "sampled" in described else TopK
            indices, logs, tail = (moved[f"output.{part}"] for part in ("indices", "logs", "tail"))
            top_k = kind(indices, logs, tail, described["shape"][-1])
        channels_last = self.cache.manifest.data["kind"] == "keras"  # feature maps are (N, H, W, C) there
        features: dict[tuple[str, str], Tensor] = {
            (place[0], place[1]): (
                moved[name].movedim(-1, 1) if channels_last and moved[name].ndim == 4 else moved[name]
            ).float()
            for place, name in self.layers.items()
        }
        output = None if output is None else output.float()
        length = self.cache.manifest.length
        rows = DataRows(answers["rows"] % length, length)  # each view of a sample has a row of its own in the cache
        attributes: dict[str, Any] = {"read_logits": call.read_logits, "top_k": top_k, "held": held, "data_rows": rows}
        return [Call.from_outputs(output, features, **attributes)]


def _aligned(name: str, answers: dict[str, Tensor]) -> Tensor:
    """Put an array's positions at the places of the batch's tokens; the mask of these places."""
    mask, places = answers[f"{name}.mask"], answers[f"{name}.places"]
    for part in (name, f"{name}.indices", f"{name}.logs", f"{name}.tail"):
        if part in answers:
            answers[part] = padded(answers[part], mask, places)
    return mask
