"""A row of ``cases.py``, which describes a loss, and how the generic tests use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_distill import losses

GOLDEN_FOLDER = Path(__file__).parent / "golden"
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Golden:
    """A published implementation's cases: golden value = factor x our loss, and likewise for the gradient."""

    key: str
    factor: Callable[[Mapping[str, Any], tuple[int, ...]], float] = lambda settings, shape: 1.0
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda reference: {}
    cases: tuple[str, ...] | None = None  # None: all that the index has of this key
    value: str = "loss"  # array that holds the value
    # From the reference's inputs to the library's, if the reference changes its inputs first.
    arrange: Callable[[Tensor, Tensor, Arrays], tuple[Tensor, Tensor]] = lambda student, teacher, arrays: (
        student,
        teacher,
    )


def unmasked_tokens(student: Tensor, teacher: Tensor, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """The tokens that have a label, one row for each."""
    if "labels" in arrays:
        chosen = torch.as_tensor(arrays["labels"] != -100)
        return student[chosen], teacher[chosen]
    return student, teacher


def labels_of(teacher: Tensor, class_dim: int | None) -> Tensor:
    """Labels that follow a row of logits wherever a test moves it: the teacher's first or second choice."""
    class_dim = (1 if teacher.ndim >= 4 else -1) if class_dim is None else class_dim
    choices = teacher.argsort(dim=class_dim, descending=True, stable=True)
    second = teacher.argmin(dim=class_dim) % 2 == 1
    return torch.where(second, choices.select(class_dim, 1), choices.select(class_dim, 0))


class Labelled(nn.Module):
    """A loss that needs labels, called with the two models' logits alone."""

    def __init__(self, loss: losses.DistillationLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        labels = labels_of(teacher.detach(), self.loss.class_dim) if labels is None else labels
        return self.loss(student, teacher, labels, mask=mask)


def foreground_of(teacher: Tensor) -> Tensor:
    """Weights of boxes that follow a position wherever a test moves it: where its first channel is positive."""
    return torch.where(teacher[:, 0] > 0, 0.25, 0.0)


def layers_of(feature: Tensor) -> tuple[Tensor, ...]:
    """Two layers of a network, made from one feature: the first half of its channels, and the others."""
    return feature.tensor_split(2, dim=1 if feature.ndim >= 4 else -1)


class SeveralLayers(nn.Module):
    """A loss on lists of layers, called with one feature of each model."""

    def __init__(self, loss: losses.DistillationLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.loss(layers_of(student), layers_of(teacher), mask=mask)


def index_of(teacher: Tensor) -> Tensor:
    """Rows of the data set that follow an example wherever a test moves it: the place of its largest number.

    The tests change the positions of maps: their examples are all one row.
    """
    return teacher.argmax(dim=1) if teacher.ndim == 2 else teacher.new_zeros(len(teacher), dtype=torch.int64)


class Learned(nn.Module):
    """A loss with its parameters fixed, in the precision and on the device of what it is called with."""

    def __init__(
        self, loss: losses.DistillationLoss, parameters: Arrays, classifier: Any, *shapes: tuple[int, ...]
    ) -> None:
        super().__init__()
        if classifier is not None:
            layer = nn.Linear(*classifier.shape[::-1]).double()
            layer.weight.data.copy_(torch.as_tensor(classifier))
            loss.read_teacher(lambda name: layer)
        loss.build(*(torch.Size(shape) for shape in shapes))
        counters = {name: value for name, value in loss.state_dict().items() if not value.is_floating_point()}
        numbers = {name: torch.as_tensor(array) for name, array in parameters.items()}
        loss.double().load_state_dict({**counters, **numbers})
        self.loss = loss.eval()  # a queue stays as it is
        self._third = ((foreground_of, loss.needs_boxes), (index_of, loss.needs_index))

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        first = [*self.loss.parameters(), *self.loss.buffers()][0]
        dtype = torch.promote_types(student.dtype, torch.float32)
        if (first.dtype, first.device) != (dtype, student.device):
            self.loss.to(student.device, dtype)
        third = [of(teacher.detach()) for of, needed in self._third if needed]
        return self.loss(student, teacher, *third, mask=mask)


@dataclass(frozen=True)
class LossCase:
    """How the generic tests use one loss."""

    name: str
    loss: type[losses.DistillationLoss]
    oracle: Callable[..., float]
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...] | None = None  # None: as the student's
    settings: Mapping[str, Any] = field(default_factory=dict)
    golden: tuple[Golden, ...] = ()
    zero_at_identity: bool = True
    on_logits: bool = False
    knows_classes: bool = True  # whether it matters which class has which score
    shift_invariant: bool = True  # whether a shift of all logits of a row changes nothing
    # One value for each position, for each example from its positions, or for the batch from the examples' relations;
    # "neighbourhood" where a position's value depends on its neighbours, so that masking is not slicing.
    over: str = "positions"
    per_example: bool = True  # whether the loss of a batch is the mean over its examples
    parameters: Arrays | None = None  # of a learned loss, by the names of PyTorch's state_dict
    classifier: NDArray[Any] | None = None  # weight (K, C) of the teacher's linear classifier, for losses that read it
    # Whether the gradient grows with the cube of the features: at 1e4 it is more than float16 holds, by the formula.
    steep: bool = False
    detached: bool = False  # whether the oracle's ``frozen`` is the student at which a factor without gradient is taken

    def __str__(self) -> str:
        """The name, which the tests' ids use."""
        return self.name

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of both features."""
        return self.student_shape, self.teacher_shape or self.student_shape

    def build(self) -> nn.Module:
        return self.make(**self.settings)

    def make(self, **settings: Any) -> nn.Module:
        """The loss with other settings; called with the two tensors only, even where it needs labels."""
        loss = self.loss(**settings)
        if self.parameters is not None:
            return Learned(loss, self.parameters, self.classifier, *self.shapes)
        if loss.several_layers:
            return SeveralLayers(loss)
        return Labelled(loss) if loss.needs_labels else loss

    def reference(self, student: oracle.Array, teacher: oracle.Array, frozen: oracle.Array | None = None) -> float:
        settings = {name: value for name, value in self.settings.items() if name != "kind"}
        if self.loss.needs_labels:
            labels = labels_of(torch.tensor(teacher), settings.get("class_dim"))
            settings["labels"] = labels.numpy()
        if self.loss.needs_index:
            settings["index"] = index_of(torch.tensor(teacher)).numpy()
        if self.parameters is not None:
            settings["parameters"] = self.parameters
        if self.classifier is not None:
            settings["classifier"] = self.classifier
        if self.detached:
            settings["frozen"] = student if frozen is None else frozen
        return self.oracle(student, teacher, **settings)

    @property
    def selects(self) -> bool:
        """Whether a mask selects rows, for which the host waits for the device."""
        return (self.over == "batch" and not self.on_logits) or self.loss is losses.PearsonFeatureLoss

    def inputs(self, seed: int = 0, scale: float = 2.0) -> tuple[oracle.Array, oracle.Array]:
        generator = np.random.default_rng(seed)
        student, teacher = (scale * generator.standard_normal(shape) for shape in self.shapes)
        return student, teacher


def golden_index(key: str) -> list[dict[str, Any]]:
    """The entries of one key, in the order of the index."""
    entries = json.loads((GOLDEN_FOLDER / "index.json").read_text(encoding="utf-8"))
    return [entry for entry in entries if entry["key"] == key]


def golden_arrays(entry: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of one golden case."""
    with np.load(GOLDEN_FOLDER / entry["file"]) as stored:
        return dict(stored)


def softened(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings from a reference's, where a temperature is all there is."""
    return {"temperature": reference.get("T", reference.get("temperature"))}
