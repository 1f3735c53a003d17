"""The predictions and the cost of networks, read while a LightningModule validates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_distill.guidance.costs import costs, sizes
from lightning_distill.recording import Call, select
from lightning_distill.recording.labels import find_labels
from lightning_distill.recording.recorder import Recording
from lightning_distill.recording.student import StudentFinder
from lightning_distill.teachers.hold import Hold

_SAMPLES = 200


class Predictions(Callback):
    """Records the student's calls in validation: logits and labels of a classifier, its first images, one call.

    Where the calls do not fit, such as those of a module that is not a classifier, nothing is kept.

    Args:
        module: The LightningModule.
        student: Path of the student in it, as in :class:`DistillCallback`.
        labels: The place of the labels in a batch, as in :class:`DistillCallback`.

    Attributes:
        root: The student's network; None if no call of it was seen.
        call: Its first call.
        images: The first images ``(N, C, H, W)``; None if its inputs are not images.
    """

    def __init__(self, module: LightningModule, student: str | Sequence[str] | None = None, labels: Any = None) -> None:
        self._finder, self._place = StudentFinder(module, [], student), labels
        self._recording: Recording | None = None
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._complete = True
        self._images: list[Tensor] = []
        self.root: nn.Module | None = None
        self.call: Call | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a batch: record the student."""
        self._recording = self._finder.recording(False, False)
        self._recording.__enter__()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a batch: keep the outputs of a classifier."""
        if self._recording is None:
            return
        self._recording.__exit__(None)
        try:
            calls = self._finder.find()
        except ValueError:  # several networks were called
            calls = []
        if len(calls) == 1:
            self.root, self.call = self._finder.root, self.call or calls[0]
            self._keep(calls[0], batch)
        else:
            self._complete = False
        self._finder.clear()

    def _keep(self, call: Call, batch: Any) -> None:
        image = call.args[0] if call.args else None
        if isinstance(image, Tensor) and image.ndim == 4 and sum(map(len, self._images)) < _SAMPLES:
            self._images.append(image[:_SAMPLES].float().cpu())
        try:
            logits, labels = select(call.output, None, "the student's output"), find_labels(batch, self._place)
        except (ValueError, TypeError):
            self._complete = False
            return
        fits = logits.ndim == 2 and labels.shape == logits.shape[:1]
        if fits and not labels.is_floating_point() and not logits.is_complex():
            self._logits.append(logits.float().cpu())
            self._labels.append(labels.long().cpu())
        else:
            self._complete = False

    @property
    def arrays(self) -> tuple[Any, Any] | None:
        """Logits ``(N, C)`` and labels ``(N,)`` of all batches; None if they are not those of a classifier."""
        sizes = {logits.shape[1] for logits in self._logits}
        if not self._complete or len(sizes) != 1:
            return None
        logits, labels = torch.cat(self._logits), torch.cat(self._labels)
        in_range = bool(((labels >= 0) & (labels < max(logits.shape[1], 2))).all())
        return (logits.numpy(), labels.numpy()) if in_range else None

    @property
    def images(self) -> Any:
        """The first images ``(N, H, W, C)``; None if the inputs are not images of one size."""
        if not self._images or len({image.shape[1:] for image in self._images}) > 1:
            return None
        return torch.cat(self._images).permute(0, 2, 3, 1).numpy()


@contextmanager
def replaced_by(root: nn.Module, teacher: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """A context in which a network answers as its teacher does, so that a module's own metrics measure the teacher.

    Args:
        root: The student's network.
        teacher: The teacher.
        device: The device to compute on; None is that of the network when it is called.
    """
    hold, own = Hold(teacher), vars(root).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        place = device or next((entry.device for entry in _tensors((args, kwargs))), None)
        hold.take(place)
        with torch.no_grad(), hold.evaluated():
            return teacher(*args, **kwargs)

    root.forward = forward
    try:
        yield
    finally:
        hold.release()
        if own is None:
            del root.forward
        else:
            root.forward = own


def cost_of(network: nn.Module, call: Call | None) -> dict[str, Any]:
    """The cost of a network: parameters, multiply-adds, bytes, latency and memory of one example.

    Args:
        network: The network.
        call: A call with a batch of inputs that it takes; None leaves out all but the sizes.

    Returns:
        ``parameters``, ``bytes`` (of the weights in a file), and, or None where they cannot be measured,
        ``multiply_adds``, ``latency_seconds`` (median) and ``memory_bytes`` (of a CUDA device).
    """
    if call is not None:
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        with suppress(Exception):  # a network that does not take one example, or not outside of its module
            return costs(network, Call(*_first_example((call.args, call.kwargs), device)))
    return sizes(network)


def _first_example(value: Any, device: torch.device) -> Any:
    """Inputs with the first example of every tensor, on a device."""
    if isinstance(value, Tensor):
        return value[:1].detach().clone().to(device) if value.ndim else value.to(device)
    if isinstance(value, dict):
        return {name: _first_example(entry, device) for name, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_first_example(entry, device) for entry in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
