"""A teacher that answers from a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from distill_core.store import CacheError
from lightning_distill.cache.loaders import read_answers
from lightning_distill.functional.top_k import TopK
from lightning_distill.outputs import first_tensor
from lightning_distill.taps import Call, Tap

if TYPE_CHECKING:
    from lightning_distill.cache import TeacherCache
    from lightning_distill.cache.training import CachedLoaders


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

    It holds nothing of a step: the teacher's outputs come with the batch and are passed to :meth:`answer`.

    Args:
        cache: The cache.
    """

    def __init__(self, cache: TeacherCache) -> None:
        super().__init__()
        self.cache = cache
        self.layers = {tuple(place.split("|", 1)): name for name, place in cache.manifest.layers.items()}

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
                held = [layer for layer, _ in self.layers] or "no layers"
                raise CacheError(
                    f"Expected the cache to hold the {tap.where} of the teacher's layer {tap.layer!r}, but it holds"
                    f" {held}. Build it with layers=[{tap.layer!r}]."
                )
        if needs_output and "output" not in self.cache.manifest.arrays:
            raise CacheError("Expected the cache to hold the teacher's outputs, but it was built with outputs=False.")

    def answer_step(
        self, call: Call, loaders: CachedLoaders | None, rows: Tensor | None, logits: Callable[[Any], Tensor]
    ) -> CachedCall:
        """The teacher's call for a call of the student in a step.

        Args:
            call: The student's call.
            loaders: The loaders of the fit, whose batch carries the teacher's outputs; None outside a Trainer.
            rows: Rows of the batch from ``cache.attach``; they take precedence.
            logits: From an output to its logits.

        Returns:
            The call.

        Raises:
            CacheError: As :meth:`answer`, and if the inputs of the student were changed in the step.
        """
        answers = None if loaders is None else loaders.answers
        answered = self.answer(call, answers if rows is None else read_answers(self.cache.reader, rows), logits)
        if loaders is not None and rows is None:
            loaders.check_unchanged(call)
        return answered

    def answer(self, call: Call, answers: Mapping[str, Tensor] | None, logits: Callable[[Any], Tensor]) -> CachedCall:
        """The teacher's call for the same examples as a call of the student.

        Args:
            call: The student's call.
            answers: The teacher's outputs that came with the batch: ``CachedLoaders.answers``, or
                :func:`read_answers`; None if none did.
            logits: From an output to its logits.

        Returns:
            The call, on the device of the student's.

        Raises:
            CacheError: If there are none, or for another number of examples.
        """
        first = first_tensor(call.args, call.kwargs, call.output)
        if answers is None:
            raise CacheError(
                "Expected the batch to carry the teacher's outputs, but it came from elsewhere: from a data loader that"
                " keeps an iterator of its own or overrides __iter__, or not from the Trainer's training loader. Use a"
                " plain DataLoader; in a loop of your own pass the batch of `cache.attach(dataset)` to `total`."
            )
        size, number = len(first) if first.ndim else 1, len(answers["rows"])
        if size != number:
            raise CacheError(
                f"Expected the student to be called with the {number} examples of the batch, for which the cache holds"
                f" one answer each, but got {size}. Call the student once with the whole batch, no more and no fewer;"
                " a collate function must not drop or repeat items."
            )
        moved = {name: tensor.to(first.device, non_blocking=True) for name, tensor in answers.items() if name != "rows"}
        output, top_k = moved.get("output"), None
        if "output.indices" in moved:
            classes = self.cache.manifest.arrays["output"]["shape"][-1]
            top_k = TopK(moved["output.indices"], moved["output.logs"], moved["output.tail"], classes)
        channels_last = self.cache.manifest.data["kind"] == "keras"  # feature maps are (N, H, W, C) there
        features = {
            place: (moved[name].movedim(-1, 1) if channels_last and moved[name].ndim == 4 else moved[name]).float()
            for place, name in self.layers.items()
        }
        return CachedCall(
            (),
            {},
            output=None if output is None else output.float(),
            who="teacher",
            read_logits=logits,
            cached=features,  # type: ignore[arg-type]
            top_k=top_k,
        )
