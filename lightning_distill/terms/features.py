"""The terms on inner layers: of the student and a teacher, or of the student alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill_core.requires import Requires
from lightning_distill import checks
from lightning_distill.adapters import AdapterFactory, aligned, make_adapter, pooled
from lightning_distill.functional.detection import foreground_weights
from lightning_distill.functional.inputs import rows_mask
from lightning_distill.losses import DistillationLoss, FeatureDistance
from lightning_distill.losses.base import linked_copy
from lightning_distill.recording import Call, Tap
from lightning_distill.recording.boxes import BoxPlace, check_pixels, find_boxes
from lightning_distill.recording.rows import DataRows, IndexPlace, check_index, find_index
from lightning_distill.schedules import Weight
from lightning_distill.terms.base import DistillationTerm, LossCallable, TeacherLayers, taps_of
from lightning_distill.terms.losses import (
    Mask,
    check_held,
    check_of_examples,
    check_places,
    check_takes_mask,
    checked_loss,
    counted_positions,
    value_of,
    widened,
)
from lightning_distill.terms.maps import paired_levels, reads_maps, resized, resized_mask, warn_of_channels_last

Pairs = list[tuple[Tap, Tap]]
Boxes = tuple[list[Tensor], tuple[int, int]]


class FeatureDistillation(DistillationTerm):
    """A loss between a feature of the student, mapped by an adapter, and a feature of the teacher.

    A teacher map (N, C, H, W) of another height or width than the student's is resized to it: averaged down,
    interpolated up. With ``adapter="auto"`` tokens (N, L, D) of an image are compared with a map, or with tokens of
    another number, as maps of their patches: class and register tokens are left out, and the larger map is resized to
    the smaller. The adapters take their shapes from the first batch. A loss with parameters of its own does too, and
    every pair of layers has a copy of it. The value is the mean over the pairs of layers.

    The levels of a feature pyramid are one pair each: pass ``Tap("backbone.fpn", output="*")`` for both networks.
    Levels of the same name are compared, or in their order where they have no names.

    Args:
        student_layer: Name of a layer of the student, such as ``"layer3.0"``, or a :class:`Tap`, or a list of them.
        teacher_layer: The same for the teacher; as many as for the student.
        loss: ``"mse"``, ``"l1"``, ``"smooth_l1"``, ``"cosine"``, ``"kl"``, or a loss on ``(student, teacher)``. A loss
            with ``several_layers = True`` gets lists of features; any other is averaged over the pairs of layers. A
            loss with ``learned = True`` is trained along with the adapters.
        weight: Factor of the term in the total loss, a number or a schedule.
        adapter: ``"auto"`` (identity where the shapes agree, else a 1x1 convolution for maps and a linear map for
            vectors and token sequences), ``"pool"`` (the means of both features over their positions, and then as
            ``"auto"``), ``None``, ``"linear"``, ``"conv1x1"``, a module, which is copied, or a factory called with the
            shapes of both features.
        name: Name in logs and checkpoints; ``None`` takes the student layer's.
        mask: Where a batch keeps the mask of the positions that count: a key such as ``"attention_mask"``, an index, or
            a function of the batch. Shape ``(N,)``, ``(N, L)`` or ``(N, H, W)``; a position of a smaller map counts if
            at least half of its pixels do.
        ignore_index: Positions with this label do not count, such as void pixels; ``None`` reads no labels.
        boxes: Where a batch keeps the boxes of each image, in pixels of the student's input: a key, an index, or a
            function of the batch that returns a list of tensors ``(M, 4)`` or of dicts with ``"boxes"``. For a network
            that resizes its images itself, a tap on the layer that does: ``Tap("transform")`` for the detectors of
            torchvision. A loss that needs boxes gets their weights; for any other the positions in boxes count alone.
        index: Where a batch keeps the row of each example in the data set, for a loss that needs it: a key, an index,
            or a function of the batch; ``None`` takes it from a cached teacher.

    Attributes:
        adapters: The adapters, by teacher and then by layer; empty before the first step.
        learned: The copies of a loss with parameters of its own, in the same order; empty for other losses.

    Raises:
        ValueError: If a setting is not one of those above, ``loss`` has been built already, or it cannot leave out
            positions where a mask is given.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> FeatureDistillation("layer2", "layer4", "cosine", weight=10.0).name
        'layer2'

    References:
        Romero et al. (2015). FitNets: Hints for Thin Deep Nets. arXiv:1412.6550. The paper's factor 1/2 is left out.
    """

    shares_adapter = False  # whether all pairs of layers have one adapter
    _layers: TeacherLayers | None = None
    index: IndexPlace | None = None
    reads_maps = True  # whether features of four dimensions are maps (N, C, H, W)

    def __init__(
        self,
        student_layer: str | Tap | Sequence[str | Tap],
        teacher_layer: str | Tap | Sequence[str | Tap],
        loss: str | DistillationLoss | LossCallable = "mse",
        *,
        weight: Weight = 1.0,
        adapter: str | nn.Module | AdapterFactory | None = "auto",
        name: str | None = None,
        mask: Mask | None = None,
        ignore_index: int | None = None,
        boxes: BoxPlace | None = None,
        index: IndexPlace | None = None,
    ) -> None:
        student_taps, teacher_taps = taps_of(student_layer), taps_of(teacher_layer)
        super().__init__(weight=weight, name=name or "+".join(tap.layer for tap in student_taps) or "features")
        if len(student_taps) != len(teacher_taps) or not student_taps:
            raise ValueError(
                "Expected `student_layer` and `teacher_layer` to name the same number of layers, at least one, but got"
                f" {len(student_taps)} and {len(teacher_taps)}. Pair them."
            )
        if isinstance(adapter, str):
            kinds = ("auto", *(["pool"] if self.reads_maps else []), "linear", "conv1x1")
            checks.one_of("adapter", adapter, kinds)
        self.student_taps, self.teacher_taps = student_taps, teacher_taps
        self._pairs = [*zip(student_taps, teacher_taps, strict=True)]
        self._spreads = any(tap.spreads for tap in (*student_taps, *teacher_taps))
        self.loss = FeatureDistance(loss) if isinstance(loss, str) else checked_loss(loss)  # type: ignore[arg-type]
        self.requires = Requires.of(self.loss)
        if self.requires.learned and any(True for _ in self.loss.parameters()):
            raise ValueError(
                f"Expected `loss` not to be built yet, but got {type(self.loss).__name__} with parameters. Pass a new"
                " one: the term builds a copy for each pair of layers."
            )
        check_places(self.loss, self.requires, boxes, index)
        if mask is not None or ignore_index is not None or (boxes is not None and not self.requires.needs_boxes):
            check_takes_mask(self.loss)
        self.mask, self.ignore_index, self.boxes, self.index = mask, ignore_index, boxes, index
        self.trains_only = self.requires.needs_index
        self.student_values = (boxes,) if isinstance(boxes, Tap) else ()
        self.needs_labels = self.requires.needs_labels or ignore_index is not None
        self._adapter = [adapter]  # in a list, so that a module is not registered: it is only copied
        self.adapters = nn.ModuleList()
        self.learned = nn.ModuleList()
        self._fitted: list[nn.Module] = []  # the adapters again: a module list is slow to index

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make the adapters from the features of a first call."""
        has_batch = bool(student.args or student.kwargs)  # a process without one builds from shapes
        if self.boxes is not None and has_batch:
            check_pixels(*find_boxes(student, self.boxes))
        adapters, learned, fitted = nn.ModuleList(), nn.ModuleList(), []
        kind = self._adapter[0]
        if kind == "auto" and not self.requires.channels_must_match:
            kind = None
        for teacher in teachers:
            for index, taps in enumerate(self._levels(student, teacher)):
                student_tap, teacher_tap = taps
                feature, target = self._features(taps, student, teacher)
                if self._resizes(feature, target):
                    warn_of_channels_last(feature, target, student_tap.layer)
                if index == 0 or not self.shares_adapter:
                    adapter = make_adapter(kind, feature.shape, target.shape, student_tap.layer)
                    # under autocast parameters stay in float32; without it they must have the feature's own precision
                    dtype = torch.float32 if torch.is_autocast_enabled(feature.device.type) else feature.dtype
                    adapters.append(adapter.to(device=feature.device, dtype=dtype))
                if self.requires.learned or self.requires.reads_teacher:
                    layer_of = functools.partial(self._teacher_layer, teacher.teacher, teacher_tap)
                    rows = self._rows(student, teacher, feature) if has_batch else None
                    learned.append(self._built_loss(adapters[-1], feature, target, layer_of, teacher.data_rows))
                    if rows is not None:
                        check_index(rows, _size_of(learned[-1]))
                fitted.append(adapters[-1].train())
        self.adapters, self.learned, self._fitted = adapters, learned, fitted

    def connect(self, layers: TeacherLayers | None) -> None:
        """Learn where the teachers' layers are, if the loss reads numbers from them."""
        if self.requires.reads_teacher:
            self._layers = layers

    def reset(self) -> None:
        """Drop the adapters, and the parameters of the loss."""
        self.adapters, self.learned, self._fitted = nn.ModuleList(), nn.ModuleList(), []

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight, a scalar."""
        mask = self._mask(student, labels)
        for tap in self.teacher_taps:
            check_held(teacher.held.get((tap.layer, tap.where)), mask, self.name)
        levels = self._levels(student, teacher)
        first = teacher.teacher * len(levels)
        pairs = [self._pair(first + index, taps, student, teacher) for index, taps in enumerate(levels)]
        if self.requires.several_layers:
            features, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            return value_of(self.loss, self.requires, features, targets, labels, mask)
        boxes = None if self.boxes is None else find_boxes(student, self.boxes)
        losses = self.learned[first : first + len(pairs)] if len(self.learned) else [self.loss] * len(pairs)
        rows = self._rows(student, teacher, pairs[0][0])
        values = [
            value_of(loss, self.requires, *pair, labels, *self._weighed(mask, boxes, pair[0], rows))
            for loss, pair in zip(losses, pairs, strict=True)
        ]
        return values[0] if len(values) == 1 else torch.stack(values).mean()

    def _teacher_layer(self, index: int, tap: Tap, name: str | None) -> nn.Module:
        """The layer of a name of one teacher; ``None`` is the tapped layer."""
        if self._layers is None:
            raise ValueError(
                f"Expected `teacher` to be a network for term {self.name!r}, whose loss {self.loss!r} takes numbers"
                " from the teacher's layers, but it is not. Pass the network, or the numbers to the loss."
            )
        return self._layers(tap.layer if name is None else name)[index]

    def _built_loss(
        self,
        adapter: nn.Module,
        student: Tensor,
        teacher: Tensor,
        layer_of: Callable[[str | None], nn.Module],
        cached: DataRows | None,
    ) -> nn.Module:
        """The copy of a learned loss for one pair of layers."""
        with torch.no_grad():
            adapted = adapter.eval()(student)
        loss: Any = linked_copy(self.loss)
        if self.requires.reads_teacher:
            loss.read_teacher(layer_of)
        if self.requires.needs_index and self.index is None and loss.size is None and cached is not None:
            loss.size = cached.size
        loss.build(adapted.shape, teacher.shape)
        # in the precision in which the features will be compared
        dtype = torch.promote_types(torch.promote_types(adapted.dtype, teacher.dtype), torch.float32)
        built: nn.Module = loss.to(device=adapted.device, dtype=dtype).train()
        return built

    def _levels(self, student: Call, teacher: Call) -> Pairs:
        """The pairs of taps, with one for each level of a pyramid."""
        if not self._spreads:
            return self._pairs
        each = (paired_levels(student, student_tap, teacher, teacher_tap) for student_tap, teacher_tap in self._pairs)
        return [pair for pairs in each for pair in pairs]

    def _pair(self, index: int, taps: tuple[Tap, Tap], student: Call, teacher: Call) -> tuple[Tensor, Tensor]:
        """The adapted feature of the student and the feature of the teacher, through the adapter of that index."""
        student_tap, teacher_tap = taps
        feature, target = self._features(taps, student, teacher)
        adapted = self._fitted[index](feature)
        if self._resizes(adapted, target):
            target = resized(widened(target), adapted)
        if self.requires.channels_must_match and self.requires.positions_must_match and adapted.shape != target.shape:
            raise ValueError(
                f"Expected student feature {student_tap.layer!r} and teacher feature {teacher_tap.layer!r} to have"
                f" equal shapes, but got {tuple(adapted.shape)} and {tuple(target.shape)}."
                + (' Pass adapter="auto".' if self._adapter[0] is None else " Pass an adapter that makes them equal.")
            )
        return adapted, target

    def _resizes(self, student: Tensor, teacher: Tensor) -> bool:
        """Whether the teacher's feature is resized to the student's."""
        maps = self.reads_maps and self._adapter[0] != "linear" and student.ndim == teacher.ndim == 4
        return maps and self.requires.positions_must_match and reads_maps(self.loss)

    def _features(self, taps: tuple[Tap, Tap], student: Call, teacher: Call) -> tuple[Tensor, Tensor]:
        """The student's feature before its adapter, and the feature that it is compared with, in one form."""
        student_tap, teacher_tap = taps
        feature, target = self._feature(student, student_tap), self._target(student, teacher, teacher_tap)
        setting, match = self._adapter[0], self.requires
        if setting not in ("auto", "pool") or not self.reads_maps:
            return feature, target
        sides = (student, student_tap, feature), (teacher if self.needs_teacher else student, teacher_tap, target)
        if setting == "pool":
            return pooled(*sides), pooled(*reversed(sides))
        if not (match.channels_must_match or match.positions_must_match):
            return feature, target
        return aligned(*sides, positions=match.positions_must_match)

    def _feature(self, student: Call, tap: Tap) -> Tensor:
        """The student's feature."""
        return student.feature(tap)

    def _target(self, student: Call, teacher: Call, tap: Tap) -> Tensor:
        """The feature that the student's is compared with."""
        return teacher.feature(tap)

    def _rows(self, student: Call, teacher: Call, feature: Tensor) -> Tensor | None:
        """The rows of the examples, for a loss that needs them, on the feature's device."""
        if not self.requires.needs_index:
            return None
        rows = find_index(student, teacher, self.index, len(feature))
        if rows.device.type == "cpu" and self._fitted:  # on another device a check would wait for it in every step
            check_index(rows, _size_of(self.learned[0]))
        return rows.to(feature.device, non_blocking=True)

    def _weighed(
        self, mask: Tensor | None, boxes: Boxes | None, feature: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """The mask at the positions of a feature, and what a loss needs as its third argument."""
        maps = self.reads_maps and reads_maps(self.loss)
        mask = resized_mask(mask, feature, self.loss) if maps else mask
        if boxes is None:
            return mask, rows
        if feature.ndim != 4 or not maps:
            raise ValueError(
                f"Expected term {self.name!r} to compare maps (N, C, H, W), since it has boxes, but got a feature of"
                f" shape {tuple(feature.shape)}. Tap another layer, or leave out `boxes`."
            )
        each, image_size = boxes
        map_size = (feature.shape[-2], feature.shape[-1])
        weights = foreground_weights([corners.to(feature.device) for corners in each], image_size, map_size)
        if self.requires.needs_boxes:
            return mask, weights
        inside = weights > 0
        return (inside if mask is None else inside & rows_mask(mask, tuple(inside.shape)),)

    def _mask(self, student: Call, labels: Tensor | None) -> Tensor | None:
        """The positions that count; ``None`` if all do."""
        mask = counted_positions(student, self.mask, self.ignore_index, labels)
        if self._adapter[0] == "pool":
            check_of_examples(mask, self.name)
        return mask

    def extra_repr(self) -> str:
        """Layers and settings."""
        layers = ", ".join(f"{student.layer!r} -> {teacher.layer!r}" for student, teacher in self._pairs)
        adapter = self._adapter[0] if isinstance(self._adapter[0], str | None) else type(self._adapter[0]).__name__
        return f"{layers}, weight={self.weight}, adapter={adapter!r}, name={self.name!r}"


class SelfDistillation(FeatureDistillation):
    """A loss between shallow layers of the student and a deep layer of the student, for a network with several exits.

    The shallow layers learn from the deep layer, whose feature has no gradient. It needs no teacher: pass
    ``teacher=None`` if it is the only term.

    Args:
        student_layer: The shallow layer, or several.
        teacher_layer: The deep layer of the same network, one for all shallow layers or one for each.
        loss: As for :class:`FeatureDistillation`. For exits that return logits use a loss on logits.
        weight: Factor of the term in the total loss, a number or a schedule.
        adapter: As for :class:`FeatureDistillation`.
        name: Name in logs and checkpoints; ``None`` takes the shallow layer's.
        mask: As for :class:`FeatureDistillation`.
        ignore_index: As for :class:`FeatureDistillation`.

    Raises:
        ValueError: If a setting is not one of those above.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> from lightning_distill.losses import SoftTargetLoss
        >>> SelfDistillation(["exit1", "exit2"], "exit3", SoftTargetLoss(temperature=3.0), weight=0.5).name
        'exit1+exit2'

    References:
        Zhang et al. (2019). Be Your Own Teacher, arXiv:1905.08094.
    """

    needs_teacher = False

    def __init__(
        self,
        student_layer: str | Tap | Sequence[str | Tap],
        teacher_layer: str | Tap | Sequence[str | Tap],
        loss: str | DistillationLoss | LossCallable = "mse",
        *,
        weight: Weight = 1.0,
        adapter: str | nn.Module | AdapterFactory | None = "auto",
        name: str | None = None,
        mask: Mask | None = None,
        ignore_index: int | None = None,
    ) -> None:
        deep = [teacher_layer] if isinstance(teacher_layer, (str, Tap)) else [*teacher_layer]
        if len(deep) == 1 and not isinstance(student_layer, (str, Tap)):
            deep *= len(student_layer)
        super().__init__(
            student_layer,
            deep,
            loss,
            weight=weight,
            adapter=adapter,
            name=name,
            mask=mask,
            ignore_index=ignore_index,
        )
        self.student_taps, self.teacher_taps = [tap for pair in self._pairs for tap in pair], ()

    def _levels(self, student: Call, teacher: Call) -> Pairs:
        return super()._levels(student, student)

    def _teacher_layer(self, index: int, tap: Tap, name: str | None) -> nn.Module:
        raise ValueError(
            f"Expected `loss` to take no numbers from a teacher's layers in a SelfDistillation, but got {self.loss!r}."
            " Pass the numbers to the loss, or another loss."
        )

    def _target(self, student: Call, teacher: Call, tap: Tap) -> Tensor:
        return student.feature(tap).detach()


def _size_of(loss: Any) -> int:
    """Number of rows that a loss knows."""
    return int(loss.size)
