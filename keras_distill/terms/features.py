"""Terms on inner layers of both models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill import checks
from keras_distill.adapters import ADAPTERS, AdapterFactory, Side, aligned, make_adapter, pooled
from keras_distill.functional.vectors import resized
from keras_distill.losses import DistillationLoss
from keras_distill.recording import Call, Tap
from keras_distill.recording.boxes import BoxPlace
from keras_distill.schedules import Weight
from keras_distill.terms.base import DistillationTerm
from keras_distill.terms.boxes import box_weights, check_batch, check_boxes
from keras_distill.terms.counting import MaskPlace
from keras_distill.terms.layouts import KINDS, arranged, layouts_of_pair, widened, without_prefix
from keras_distill.terms.levels import Layers, Pair, as_taps, check_single, paired_levels, taps_and_settings
from keras_distill.terms.logits import LossLike, as_loss, fitted_rows
from keras_distill.terms.loss_term import copied
from keras_distill.terms.teacher_parts import TeacherParts
from keras_distill.terms.weighing import weigh, weights_of_examples


@keras.saving.register_keras_serializable(package="keras_distill")
class FeatureDistillation(TeacherParts):
    """A loss between a feature of the student, mapped by an adapter, and a feature of the teacher.

    If the teacher's map (N, H, W, C) has another height or width than the student's, it is resized to the student's:
    averaged to a smaller size, interpolated to a larger one. With ``adapter="auto"`` tokens (N, L, C) of an image are
    compared with a map, or with tokens of another number, as maps of their patches: class and register tokens are left
    out, and the larger map is resized to the smaller. The meaning of the axes follows from the layers, or from
    ``Tap(layout=...)``. Adapters, and losses with parameters of their own, take their shapes from the models; each pair
    of layers has its own copy of such a loss.

    The levels of a feature pyramid are one pair each: pass ``Tap("neck", output="*")`` for both models. Levels of the
    same name are compared, or in their order where they have no names.

    Args:
        student_layer: Name of a layer of the student, such as ``"block2"``, a layer, a :class:`Tap`, or a list of them.
        teacher_layer: The same for the teacher; as many as for the student.
        loss: ``"mse"``, ``"l1"``, ``"smooth_l1"``, ``"cosine"``, ``"kl"``, a loss of this package or of Keras, or a
            function of ``(student, teacher)``. A loss with ``several_layers = True`` gets lists of features; any other
            loss is averaged over the pairs of layers. A loss with ``learned = True`` is trained along with the
            adapters.
        weight: Factor of the term in the total loss, a number or a schedule.
        adapter: ``"auto"`` (none if the channels agree, else a 1x1 convolution for maps and a dense layer for vectors
            and token sequences), ``"pool"`` (the means of both features over their positions, and then as ``"auto"``),
            ``None``, ``"linear"``, ``"conv1x1"``, a layer, which the first model trains and other models copy, or a
            factory called with the shapes of both features, channels last.
        boxes: Where a batch keeps the boxes of its images, ``(N, M, 4)`` with left, top, right and bottom in pixels of
            the student's input: a key or an index of the targets, a key of the inputs where the targets do not have it,
            a function of the targets, or a :class:`Tap` on the student's layer that returns resized images with their
            boxes, a pair or a dict of ``"images"`` and ``"bounding_boxes"``. Rows without an area, such as padding of 0
            or -1, do not count. A loss that needs boxes gets their weights; for any other the positions in boxes count
            alone.
        mask: Where the inputs keep the mask of the positions that count, as for :class:`LogitsDistillation`: shape
            ``(N,)``, ``(N, L)`` or ``(N, H, W)``, which is resized to the student's map after its adapter.
        ignore_index: Positions with this label do not count, as for :class:`LogitsDistillation`.
        use_sample_weight: Whether the batch's sample weights are applied to the term.
        name: Name in logs and files; ``None`` takes the student layer's name, ``"blocks_1"`` for ``"blocks.1"``.
        **kwargs: ``index`` of :class:`LossTerm`, and further settings of :class:`DistillationTerm`.

    Raises:
        ValueError: If a setting is not one of those above, the two sides have different numbers of layers, or ``loss``
            has been built already.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> FeatureDistillation("block2", "block4", "cosine", weight=10.0).name
        'block2'

    References:
        Romero et al. (2015). FitNets: Hints for Thin Deep Nets. arXiv:1412.6550. The paper's factor 1/2 is left out.
    """

    reads_boxes = True  # whether the term takes `boxes`

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        loss: str | LossLike = "mse",
        *,
        weight: Weight = 1.0,
        adapter: str | keras.layers.Layer | AdapterFactory | None = "auto",
        boxes: BoxPlace | None = None,
        mask: MaskPlace | None = None,
        ignore_index: int | None = None,
        use_sample_weight: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        student_taps, teacher_taps = self._paired_taps(as_taps(student_layer), as_taps(teacher_layer))
        layers = re.sub(r"\W", "_", "_".join(tap.name for tap in student_taps))
        name = name or layers or "features"
        kwargs |= {"mask": mask, "ignore_index": ignore_index}
        settings: dict[str, Any] = {"weight": weight, "name": name, "use_sample_weight": use_sample_weight}
        super().__init__(as_loss(loss), **settings, **kwargs)
        if len(student_taps) != len(teacher_taps) or not student_taps:
            expected = "`student_layer` and `teacher_layer` to name the same number of layers, at least one"
            raise ValueError(checks.message(expected, f"{len(student_taps)} and {len(teacher_taps)}", "Pair them."))
        if isinstance(adapter, str):
            checks.one_of("adapter", adapter, ADAPTERS)
        check_single(adapter, len(student_taps))
        self._store_taps(student_taps, teacher_taps)
        if boxes is not None and not self.reads_boxes:
            raise TypeError(checks.message(f"known settings of {type(self).__name__}", f"boxes={boxes!r}"))
        check_boxes(boxes, self.loss, self.requires)
        self.boxes, self.student_values = boxes, [boxes] if isinstance(boxes, Tap) else []
        self.expect_new_labels()
        if self.requires.reads_teacher and any(tap.spreads for pair in self.pairs for tap in pair):
            expected = f"single layers for {type(self.loss).__name__}, which takes numbers from the teacher's layers"
            raise ValueError(checks.message(expected, "output='*'", "Name them."))
        if getattr(self.loss, "layer", None) is not None:
            remedy = "Pass a new loss: the term builds a copy of it for each pair of layers."
            raise ValueError(checks.message("`loss` not to be built yet", f"a {type(self.loss).__name__}", remedy))
        self.adapter = adapter
        self._adapters: list[keras.layers.Layer | None] = []
        self._learned: list[Any] = []
        self._learned_layers: list[keras.layers.Layer] = []
        self._built_for: list[Any] = []
        self._further = []
        self._images: list[Any] = []

    @property
    def adapters(self) -> list[keras.layers.Layer | None]:
        """Adapters in the order of pairs, of the model that owns this copy or of the first model that uses the term.

        If the features of several teachers differ, each teacher has its own, those of the first teacher first.
        """
        term = self._in_a_model()
        return [adapter for part in (term, *term.own_parts) for adapter in part._adapters]

    @property
    def learned(self) -> list[Any]:
        """Built copies of a learned loss, in the same order, of the same model; empty for other losses."""
        term = self._in_a_model()
        return [loss for part in (term, *term.own_parts) for loss in part._learned]

    def levels(self, student: Call, teacher: Call) -> list[Pair]:
        """The pairs of taps of two calls, with one for each level of a pyramid."""
        levels = [pair for taps in self.pairs for pair in paired_levels(student, taps[0], teacher, taps[1])]
        if self._built_for and len(levels) != len(self._built_for):
            expected = f"term {self.name!r} to read the {len(self._built_for)} levels that it was made for"
            raise ValueError(checks.message(expected, f"{len(levels)}", "Make a new DistillModel."))
        return levels

    def _features(self, student: Call, teacher: Call) -> list[Any]:
        """The shapes without the batch, and the layouts, that decide whether two teachers can share adapters."""
        described = self._all_described(student, teacher)
        # a route joins them as they are
        raw = [tuple(teacher.feature(level).shape[1:]) for tap in self.teacher_taps for level in teacher.levels(tap)]
        return [(shape, own[1:], other[1:], *rest) for shape, (own, other, *rest) in zip(raw, described, strict=True)]

    def _in_a_model(self) -> FeatureDistillation:
        first = self._settings.first()
        return self if self._origin is not None or first is None else first.term

    @property
    def trained_taps(self) -> list[Tap]:
        """Taps of the student whose features have a gradient in this term, without targets in the student."""
        return [tap for tap, _ in self.pairs]

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Make the adapters from the shapes of the features."""
        self._images = [[student.image, teacher.image] for _ in self.levels(student, teacher)]
        self._build_adapters(self._all_described(student, teacher))
        self._read_teacher()
        self.check_calls(student, teacher)

    def check_calls(self, student: Call, teacher: Call) -> None:
        """Check that the adapted features fit the teacher's, also if the teacher was replaced after the build."""
        for index, taps in enumerate(self.levels(student, teacher) if self._adapters else ()):
            adapter = self._adapters[index]
            shape, teacher_shape, *_ = self._described(index, taps, student, teacher)
            mapped = tuple(shape if adapter is None else adapter.compute_output_shape(tuple(shape)))
            if self._resizes(index, mapped, teacher_shape):
                teacher_shape = (teacher_shape[0], *mapped[1:3], teacher_shape[3])
            self._check(mapped, teacher_shape, taps)

    def _all_described(self, student: Call, teacher: Call) -> list[Any]:
        pairs = enumerate(self.levels(student, teacher))
        return [self._described(index, taps, student, teacher) for index, taps in pairs]

    def _described(self, index: int, taps: Pair, student: Call, teacher: Call) -> list[Any]:
        """The shapes of a pair of features in one form, then their layouts."""
        features = self._raw(taps, student, teacher)
        layouts = self._layouts(taps, *features)
        arranged_pair = [arranged(tensor, layout) for (_, tensor), layout in zip(features, layouts, strict=True)]
        shapes = [list(feature.shape) for feature in self._in_one_form(index, taps, arranged_pair, features)]
        return [*shapes, *layouts]

    def _in_one_form(self, index: int, taps: Pair, features: Sequence[Any], sides: Any) -> tuple[Any, Any]:
        """A pair of arranged features without prefix tokens, and tokens beside a map as a map."""
        known = self._images[index] if self._images else (None, None)
        both = []
        for tap, feature, (call, _), image in zip(taps, features, sides, known, strict=True):
            place = f"{call.who} feature {tap.name!r}"
            both.append(Side(without_prefix(tap, feature, place), place, tap.prefix_tokens, call.image or image))
        if self.adapter == "pool":
            return pooled(both[0]), pooled(both[1])
        match = self.requires
        if self.adapter != "auto" or not (match.channels_must_match or match.positions_must_match):
            return both[0].feature, both[1].feature
        return aligned(both[0], both[1], match.positions_must_match)

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight, a scalar."""
        sample_weight = weights_of_examples(sample_weight)
        levels = enumerate(self.levels(student, teacher))
        pairs = [self._pair(index, taps, student, teacher) for index, taps in levels]
        self.check_labels(student.inputs, labels, student.image)
        settings = self._weighing(labels, sample_weight)
        if self.requires.several_layers:
            students, teachers, masks = ([pair[part] for pair in pairs] for part in range(3))
            return weigh(self.loss_of(student), students, teachers, masks=masks[0], **settings)
        losses = self._learned or [self.loss_of(student)] * len(pairs)
        values = []
        for loss, (feature, target, masks) in zip(losses, pairs, strict=True):
            if isinstance(loss, DistillationLoss) and self._learned:
                loss = self.with_numbers(loss, student)
                loss.training = student.training
            target, masks = self._in_boxes(feature, target, masks, student, labels)
            target, counted = self.with_rows(target, student, teacher), self.counted(student, labels, feature)
            values.append(weigh(loss, feature, target, masks=masks, counted=counted, **settings))
        return sum(values) / len(pairs)

    def _weighing(self, labels: Any, sample_weight: Any) -> dict[str, Any]:
        """Arguments of :func:`weigh` that are the same for all pairs."""
        needs = self.requires.needs_labels
        return {"labels": self.labels_of_loss(labels), "needs_labels": needs, "sample_weight": sample_weight}

    def _in_boxes(self, feature: Any, target: Any, masks: list[Any], student: Call, labels: Any) -> tuple[Any, Any]:
        """The teacher's map, with the weights of the boxes if the loss needs them, and the masks of both maps."""
        if self.boxes is None:
            return target, masks
        place = self.student_values[0] if self.student_values else self.boxes
        weights = box_weights(place, student, labels, feature, self.name)
        return ((target, weights), masks) if self.requires.needs_boxes else (target, [*masks, weights > 0])

    def expect_new_labels(self) -> None:
        """Let the first batch of a new training be checked too."""
        self.labels_checked = self.boxes is None or bool(self.student_values)

    def check_labels(self, inputs: Any, labels: Any, image: tuple[int, int] | None = None) -> None:
        """Check that boxes are corners in pixels, once, as soon as their values are known; it waits for the device.

        Args:
            inputs: The inputs of a batch.
            labels: Its targets.
            image: Height and width of the student's images, if they are known.

        Raises:
            ValueError: If they are not, as far as it can be seen.
        """
        if not self.labels_checked and self.boxes is not None:
            self.labels_checked = check_batch(self.boxes, inputs, labels, image)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        boxes = next((tap.get_config() for tap in self.student_values), self.boxes)
        named_boxes = {} if boxes is None else {"boxes": keras.saving.serialize_keras_object(boxes)}
        adapter = (self._origin or self).adapter  # type: ignore[attr-defined]
        named = adapter is None or isinstance(adapter, str)
        return {
            **super().get_config(),
            "student_layer": [student.get_config() for student, _ in self.pairs],
            "teacher_layer": [teacher.get_config() for _, teacher in self.pairs],
            "loss": keras.saving.serialize_keras_object(self.loss),
            "adapter": adapter if named else keras.saving.serialize_keras_object(adapter),
            **named_boxes,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistillationTerm:
        """The term that :meth:`get_config` describes."""
        return cls(**taps_and_settings(config, "student_layer", "teacher_layer"))

    def get_shapes(self) -> dict[str, Any] | None:
        """The shapes and layouts that the adapters were made from."""
        if not self.built:
            return None
        further = [{"pairs": part._built_for, "images": part._images} for part in self.own_parts]
        return {"pairs": self._built_for, "images": self._images, **({"further": further} if further else {})}

    def build_from_shapes(self, config: dict[str, Any]) -> None:
        """Make the adapters from the shapes of a saved model."""
        further = config.get("further", ())
        self._build_pairs(config)
        parts: list[Any] = [self._part(self) for _ in further]
        self._further = parts
        for part, shapes in zip(self._further, further, strict=True):
            part._build_pairs(shapes)

    def _build_pairs(self, config: dict[str, Any]) -> None:
        sizes = config.get("images") or [[None, None]] * len(config["pairs"])
        self._images = [[None if size is None else tuple(size) for size in pair] for pair in sizes]
        self._build_adapters(config["pairs"])

    def _build_adapters(self, pairs: list[Any]) -> None:
        # tuples, because a factory may compare shapes, and files hold lists
        shapes = [(tuple(student), tuple(teacher), KINDS.get(layout)) for student, teacher, layout, _ in pairs]
        self._adapters = []
        # more shapes than pairs are the levels of a pyramid
        names = [tap.name for tap, _ in self.pairs] if len(shapes) == len(self.pairs) else [self.name] * len(shapes)
        check_single(self.adapter, len(shapes))
        for (student, teacher, kind), name in zip(shapes, names, strict=True):
            # pooled maps have become vectors, and tokens of four dimensions a map
            maps = len(student) > 2 and (kind == "map" or (kind != "scores" and len(student) >= 4))
            self._adapters.append(make_adapter(self._setting(kind), student, teacher, name, maps=maps))
        if self.requires.learned or self.requires.reads_teacher:
            self._learned = [copied(self.loss) for _ in shapes]
            for loss, adapter, (student, teacher, _) in zip(self._learned, self._adapters, shapes, strict=True):
                loss.build(student if adapter is None else adapter.compute_output_shape(student), teacher)
            self._learned_layers = [loss.layer for loss in self._learned if loss.layer is not None]
        self._built_for = pairs

    def _setting(self, kind: str | None) -> Any:
        """The adapter for features of a kind: none where their channels need not agree."""
        unneeded = not self.requires.channels_must_match or kind == "scores"
        return None if self.adapter == "auto" and unneeded else self.adapter

    def _raw(self, taps: Pair, student: Call, teacher: Call) -> tuple[tuple[Call, Any], tuple[Call, Any]]:
        """For each side the call, and the feature as the layer returned it."""
        return (student, student.feature(taps[0])), (teacher, teacher.feature(taps[1]))

    def _layouts(self, taps: Pair, student: tuple[Call, Any], teacher: tuple[Call, Any]) -> list[str | None]:
        """The layouts of a pair of features, None if unknown."""
        settings = {"loss": self.loss, "positions": self.requires.positions_must_match, "adapter": self.adapter}
        return layouts_of_pair(taps, student, teacher, **settings)

    def _pair(self, index: int, taps: Pair, student: Call, teacher: Call) -> tuple[Any, Any, Any]:
        """The adapted feature, the teacher's feature resized to its positions, and the masks of both."""
        sides = self._raw(taps, student, teacher)
        (_, feature), (source, target) = sides
        masks = [student.mask_of(feature), source.mask_of(target)]
        student_layout, teacher_layout = self._built_for[index][2:] if self._built_for else (None, None)
        target = ops.stop_gradient(ops.convert_to_tensor(target))  # stored features are arrays
        before = arranged(widened(feature), student_layout), arranged(widened(target), teacher_layout)
        feature, target = self._in_one_form(index, taps, before, sides)
        masks = [_of_patches(tap, mask) for tap, mask in zip(taps, masks, strict=True)]
        if any(mask is not None for mask in masks) and len(feature.shape) != len(before[0].shape):
            expected = f"tokens without a mask for term {self.name!r}, which compares maps or means over positions"
            raise ValueError(checks.message(expected, "a mask", "Pass another adapter."))
        adapter = self._adapters[index] if self._adapters else None
        if adapter is not None:
            feature = adapter(feature, training=student.training)
        if self._resizes(index, feature.shape, target.shape):
            target = resized(target, feature.shape)
            masks = masks[:1]
        self._check(tuple(feature.shape), tuple(target.shape), taps)
        return feature, fitted_rows(feature, target), masks

    def _resizes(self, index: int, mapped: Sequence[int | None], teacher_shape: Sequence[int | None]) -> bool:
        kind = KINDS.get(self._built_for[index][2]) if self._built_for else None
        positions = self.requires.positions_must_match
        maps = kind in (None, "map") and len(mapped) == len(teacher_shape) == 4
        return bool(positions and maps and self.adapter != "linear")

    def _paired_taps(self, student_taps: list[Tap], teacher_taps: list[Tap]) -> tuple[list[Tap], list[Tap]]:
        """The taps of both sides in the order of pairs."""
        return student_taps, teacher_taps

    def _store_taps(self, student_taps: list[Tap], teacher_taps: list[Tap]) -> None:
        """Set the taps that each model's recorder reads."""
        self.student_taps, self.teacher_taps = student_taps, teacher_taps

    def _check(self, mapped: Sequence[int | None], teacher_shape: Sequence[int | None], taps: Pair) -> None:
        all_axes = self.requires.channels_must_match and self.requires.positions_must_match
        if all_axes and checks.shapes_differ(mapped, teacher_shape):
            names = [tap.name for tap in taps]
            expected = f"student feature {names[0]!r} and teacher feature {names[1]!r} to have equal shapes"
            remedy = 'Pass adapter="auto".' if self.adapter is None else "Pass an adapter that makes them equal."
            if self.adapter == "auto" and self._adapters and mapped[-1] != teacher_shape[-1]:
                remedy = "The adapter was made for another teacher: make a new DistillModel."
            raise ValueError(checks.message(expected, f"{tuple(mapped)} and {tuple(teacher_shape)}", remedy))


def _of_patches(tap: Tap, mask: Any) -> Any:
    """A mask of tokens without those that a tap leaves out."""
    return mask[:, tap.prefix_tokens :] if mask is not None and tap.prefix_tokens else mask
