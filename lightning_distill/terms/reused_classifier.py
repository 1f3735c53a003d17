"""The term that lets the student reuse the teacher's classifier, and the student that results."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.losses.networks import linear_classifier
from lightning_distill.recording import Call, Recorder, Recording, Tap
from lightning_distill.recording.recorder import find_layer
from lightning_distill.schedules import Weight
from lightning_distill.terms.base import TeacherLayers
from lightning_distill.terms.features import FeatureDistillation
from lightning_distill.terms.losses import value_of, widened
from lightning_distill.terms.maps import check_normalisable, resized


class ReusedClassifierDistillation(FeatureDistillation):
    r"""Mean squared difference of the student's projected feature and the teacher's, whose classifier then serves both.

    .. math:: \frac{1}{N D} \sum_n \| P(f^s_n) - f^t_n \|_2^2

    The projector P is learned: convolutions of 1, 3 and 1 with batch normalisation and ReLUs (linear maps for vectors).
    It is made, trained, saved and resumed as adapters are. The student's own classifier is not trained: pass
    ``task_weight=0.0``. After the training :meth:`deployable` puts student, projector and the teacher's classifier
    together. That network is what you validate, save and export.

    Args:
        student_layer: The student's last feature before its classifier, or a tap: a map ``(N, C, H, W)``, or a vector.
        teacher_layer: The teacher's. Its classifier must make the logits from the average of this map over the
            positions, or from this vector; the first step checks it.
        classifier: Name of the teacher's classifier, a linear layer; ``None`` takes the only linear layer of the
            teacher that takes as many numbers as the feature has channels.
        factor: The projector is this much narrower inside than the teacher's feature, 1 or more.
        weight: Factor of the term in the total loss, a number or a schedule.
        name: Name in logs and checkpoints.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``factor`` is less than 1. In the first step: if there is not one teacher, it has no such
            classifier, or the classifier does not make its logits from the feature.

    Example:
        >>> distill = ReusedClassifierDistillation("layer4", "layer4", classifier="fc")
        >>> distill.name
        'reused_classifier'

    References:
        Chen et al. 2022 (SimKD), section 3, arXiv:2203.14001, with factor 2 and this loss alone; deviation: vectors, by
        the same rule. As everywhere in this package, a map of the teacher is resized to the student's.
    """

    def __init__(
        self,
        student_layer: str | Tap,
        teacher_layer: str | Tap,
        *,
        classifier: str | None = None,
        factor: int = 2,
        weight: Weight = 1.0,
        name: str = "reused_classifier",
    ) -> None:
        super().__init__(student_layer, teacher_layer, "mse", weight=weight, adapter=None, name=name)
        if not isinstance(classifier, str | None):
            raise TypeError(checks.message("`classifier` to be the name of a layer", f"classifier={classifier!r}"))
        checks.integer("factor", factor)
        checks.at_least("factor", factor, 1)
        self.classifier, self.factor = classifier, factor

    def connect(self, layers: TeacherLayers | None) -> None:
        """Learn where the teacher's layers are."""
        self._layers = layers

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make the projector from the features of a first call."""
        if len(teachers) != 1:
            expected = f"one teacher for term {self.name!r}, whose classifier the student reuses"
            raise ValueError(checks.message(expected, f"{len(teachers)}"))
        ((student_tap, teacher_tap),) = self._pairs
        feature, target = student.feature(student_tap), teachers[0].feature(teacher_tap)
        if feature.ndim != target.ndim or feature.ndim not in (2, 4):
            expected = f"layers {student_tap.layer!r} and {teacher_tap.layer!r} to return maps (N, C, H, W) or vectors"
            raise ValueError(checks.message(expected, f"{tuple(feature.shape)} and {tuple(target.shape)}"))
        layer_of = functools.partial(self._teacher_layer, 0, teacher_tap)
        layer = linear_classifier(layer_of, self.classifier, target.shape[1])
        if teachers[0].output is not None and not target.is_meta:
            self._check_classifier(layer, target, teachers[0])
        projector = _projector(feature.shape[1], target.shape[1], self.factor, feature.ndim)
        dtype = torch.float32 if torch.is_autocast_enabled(feature.device.type) else feature.dtype
        self.adapters = nn.ModuleList([projector.to(feature.device, dtype)])
        self._fitted = list(self.adapters)

    def _check_classifier(self, layer: nn.Linear, target: Tensor, teacher: Call) -> None:
        """Raise if the classifier does not make the teacher's logits from its averaged feature."""
        if not target.any():  # zeros in the shapes of a call, where another process checks
            return
        with torch.no_grad():
            made, logits = layer(_pooled(target).to(layer.weight.dtype)).float(), teacher.logits.float()
        narrow = min(torch.finfo(tensor.dtype).bits for tensor in (target, teacher.logits)) < 32
        close = made.shape == logits.shape and (made - logits).abs().max() <= (5e-2 if narrow else 2e-2) * (
            logits.abs().max() + 1e-6
        )
        if not close:
            expected = f"the teacher's classifier to make its logits from the average of {self._pairs[0][1].layer!r}"
            remedy = "Name the last layer before the average, behind its activation."
            raise ValueError(checks.message(expected, f"other logits, shape {tuple(logits.shape)}", remedy))

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight, a scalar."""
        ((student_tap, teacher_tap),) = self._pairs
        feature, target = student.feature(student_tap), teacher.feature(teacher_tap)
        if self._fitted[0].training:
            check_normalisable(feature, self.name)
        feature = self._fitted[0](feature)
        if feature.ndim == 4:
            target = resized(widened(target), feature)
        return value_of(self.loss, self.requires, feature, target, labels)

    def deployable(self, student: nn.Module, teacher: nn.Module) -> nn.Module:
        """The student with the projector and the teacher's classifier, after a step of training.

        Args:
            student: The trained student.
            teacher: The teacher, from which its classifier is copied.

        Returns:
            A network of copies in eval mode, called as the student is, that returns logits ``(N, K)``. It knows nothing
            of the training. Its ``state_dict`` has the parts ``student``, ``projector`` and ``classifier``.

        Raises:
            ValueError: If no step has been made, or the teacher has no such classifier.
        """
        if not len(self.adapters):
            remedy = "Call it on the owner's term after a step of training, as callback.terms[0].deployable(...)."
            raise ValueError(checks.message("the projector to be made", "no step yet", remedy))
        projector: Any = self.adapters[0]

        def layer_of(name: str | None) -> nn.Module:
            layer = find_layer(teacher, name or "")
            if layer is None:
                raise ValueError(checks.message(f"the teacher to have a layer {name!r}", type(teacher).__name__))
            return layer

        layer = linear_classifier(layer_of, self.classifier, projector[-3].weight.shape[0])
        return _Deployable(student, self._pairs[0][0], projector, layer).eval()

    def extra_repr(self) -> str:
        """Layers and settings."""
        ((student, teacher),) = self._pairs
        layers = f"{student.layer!r} -> {teacher.layer!r}, classifier={self.classifier!r}"
        return f"{layers}, factor={self.factor}, weight={self.weight}, name={self.name!r}"


class _Deployable(nn.Module):
    """A student, a projector of one of its features, and a classifier."""

    def __init__(self, student: nn.Module, tap: Tap, projector: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.tap = tap
        self.student, self.projector, self.classifier = map(copy.deepcopy, (student, projector, classifier))
        dtype = next(self.projector.parameters()).dtype
        self.classifier.to(next(self.projector.parameters()).device, dtype)
        for parameter in self.classifier.parameters():
            parameter.requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logits."""
        recorder = Recorder(self.student, [self.tap], "student")
        with Recording([recorder]):
            self.student(*args, **kwargs)
        feature = recorder.calls[-1].feature(self.tap)
        logits: Tensor = self.classifier(_pooled(self.projector(feature)))
        return logits


def _pooled(feature: Tensor) -> Tensor:
    return feature if feature.ndim == 2 else feature.mean(dim=(2, 3))


def _projector(narrow: int, wide: int, factor: int, rank: int) -> nn.Sequential:
    """Layers of 1, 3 and 1 with batch normalisation and ReLUs, narrower inside."""
    middle = max(1, wide // factor)
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in ((narrow, middle, 1), (middle, middle, 3), (middle, wide, 1)):
        if rank == 2:
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        else:
            convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
