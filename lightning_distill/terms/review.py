"""The term in which each layer of the teacher reviews the student's layers from there to the deepest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.losses import DistillationLoss, HierarchicalContextLoss
from lightning_distill.recording import Call, Tap
from lightning_distill.schedules import Weight
from lightning_distill.terms.base import LossCallable
from lightning_distill.terms.features import FeatureDistillation
from lightning_distill.terms.losses import value_of, widened
from lightning_distill.terms.maps import check_normalisable, resized


class ReviewDistillation(FeatureDistillation):
    r"""A loss between each layer of the teacher and the student's layers from there to the deepest, fused.

    .. math:: \sum_i D(g(x_i), f^t_i), \qquad x_i = a_i \odot h_i(f^s_i) + b_i \odot \mathrm{up}(x_{i+1})

    The deepest layer is first. Each shallower one is joined with what has been fused so far, enlarged to its size: the
    factors a and b of each position come from both, through a sigmoid. The parts (1x1 convolutions h, the attention for
    a and b, and 3x3 convolutions g to the teacher's channels) are learned, and made, trained, saved and resumed as
    adapters are. Their batch normalisation takes the statistics of the batch, in validation too.

    Args:
        student_layers: Layers of the student, or taps, from the shallowest to the deepest, each with a map
            ``(N, C, H, W)``.
        teacher_layers: As many layers of the teacher, in the same order.
        loss: The loss at each layer, a loss on two maps of equal shape; ``None`` is :class:`HierarchicalContextLoss`.
        channels: Channels of the fused maps; ``None`` takes those of the student's deepest layer, at most 512.
        weight: Factor of the term in the total loss, a number or a schedule.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: If the two sides have different numbers of layers, or ``channels`` is less than 1. In the first
            step: if a feature is not a map.
        TypeError: If ``loss`` cannot be called, or has parameters of its own.

    Example:
        >>> ReviewDistillation(["layer1", "layer2", "layer3"], ["layer1", "layer2", "layer3"], weight=5.0).name
        'review'

    References:
        Chen et al. 2021 (ReviewKD), section 3, arXiv:2104.09044, with weights of 0.6 to 8 on CIFAR-100. As everywhere
        in this package, a map of the teacher is resized to the student's height and width.
    """

    def __init__(
        self,
        student_layers: Sequence[str | Tap],
        teacher_layers: Sequence[str | Tap],
        loss: DistillationLoss | LossCallable | None = None,
        *,
        channels: int | None = None,
        weight: Weight = 1.0,
        name: str = "review",
    ) -> None:
        loss = HierarchicalContextLoss() if loss is None else loss
        super().__init__(student_layers, teacher_layers, loss, weight=weight, adapter=None, name=name)
        if self.requires.learned or self.requires.several_layers or self.requires.needs_labels:
            expected = "`loss` to be a loss on two maps without parameters of its own"
            raise TypeError(checks.message(expected, repr(loss), "Use it in a FeatureDistillation."))
        if channels is not None:
            checks.integer("channels", channels)
            checks.at_least("channels", channels, 1)
        self.channels = channels

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make the parts from the maps of a first call."""
        adapters = nn.ModuleList()
        for teacher in teachers:
            pairs = self._levels(student, teacher)
            features, targets = [student.feature(tap) for tap, _ in pairs], [teacher.feature(tap) for _, tap in pairs]
            for (student_tap, teacher_tap), feature, target in zip(pairs, features, targets, strict=True):
                if feature.ndim != 4 or target.ndim != 4:
                    expected = f"layers {student_tap.layer!r} and {teacher_tap.layer!r} to return maps (N, C, H, W)"
                    raise ValueError(checks.message(expected, f"{tuple(feature.shape)} and {tuple(target.shape)}"))
            narrow, wide = ([feature.shape[1] for feature in side] for side in (features, targets))
            middle = self.channels or min(narrow[-1], 512)
            dtype = torch.float32 if torch.is_autocast_enabled(features[0].device.type) else features[0].dtype
            adapters.append(_Review(narrow, wide, middle).to(features[0].device, dtype))
        self.adapters, self._fitted = adapters, list(adapters)

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight, added over the layers, a scalar."""
        pairs = self._levels(student, teacher)
        features = [student.feature(tap) for tap, _ in pairs]
        for feature in features:  # in validation too: the parts keep no statistics
            check_normalisable(feature, self.name)
        fused = self._fitted[teacher.teacher](features)
        values = []
        for feature, (_, tap) in zip(fused, pairs, strict=True):
            target = resized(widened(teacher.feature(tap)), feature)
            values.append(value_of(self.loss, self.requires, feature, target, labels))
        return torch.stack(values).sum()

    def extra_repr(self) -> str:
        """Layers and settings."""
        layers = ", ".join(f"{student.layer!r} -> {teacher.layer!r}" for student, teacher in self._pairs)
        return f"{layers}, channels={self.channels}, weight={self.weight}, name={self.name!r}"


class _Review(nn.Module):
    """Fuses maps from the deepest to the shallowest, and maps each result to the teacher's channels."""

    def __init__(self, student: Sequence[int], teacher: Sequence[int], middle: int) -> None:
        super().__init__()
        self.squeeze = nn.ModuleList(_convolution(channels, middle, 1) for channels in student)
        self.attention = nn.ModuleList(nn.Conv2d(2 * middle, 2, 1) for _ in student[1:])
        self.spread = nn.ModuleList(_convolution(middle, channels, 3) for channels in teacher)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The fused maps, in the order of the features."""
        fused: Tensor | None = None
        results: list[Tensor] = []
        for index in reversed(range(len(features))):
            feature = self.squeeze[index](features[index])
            if fused is not None:
                fused = F.interpolate(fused, feature.shape[2:], mode="nearest")
                factors = self.attention[index](torch.cat([feature, fused], dim=1)).sigmoid()
                feature = feature * factors[:, :1] + fused * factors[:, 1:]
            fused = feature
            results.insert(0, self.spread[index](feature))
        return results


def _convolution(narrow: int, wide: int, kernel: int) -> nn.Sequential:
    # statistics of the batch always: nothing of the loss is used without one
    norm = nn.BatchNorm2d(wide, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(narrow, wide, kernel, padding=kernel // 2, bias=False), norm)
