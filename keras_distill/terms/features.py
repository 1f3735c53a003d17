"""Terms on inner layers of both models."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_distill import checks
from keras_distill.adapters import ADAPTERS, AdapterFactory, Side, aligned, make_adapter, pooled
from keras_distill.functional.vectors import resized
from keras_distill.losses import DistillationLoss
from keras_distill.recording import Call, Tap, find_layer
from keras_distill.schedules import Weight, deserialized
from keras_distill.terms.base import DistillationTerm
from keras_distill.terms.layouts import KINDS, arranged, layouts_of_pair, widened, without_prefix
from keras_distill.terms.logits import LossLike, as_loss, fitted_rows
from keras_distill.terms.loss_term import LossTerm, copied
from keras_distill.terms.weighing import weigh

Layers: TypeAlias = str | keras.layers.Layer | Tap | Sequence[str | keras.layers.Layer | Tap]


@keras.saving.register_keras_serializable(package="keras_distill")
class FeatureDistillation(LossTerm):
    """A loss between a feature of the student, mapped by an adapter, and a feature of the teacher.

    If the teacher's map (N, H, W, C) has another height or width than the student's, it is resized to the student's:
    averaged to a smaller size, interpolated to a larger one. With ``adapter="auto"`` tokens (N, L, C) of an image are
    compared with a map, or with tokens of another number, as maps of their patches: class and register tokens are left
    out, and the larger map is resized to the smaller. The meaning of the axes follows from the layers, or from
    ``Tap(layout=...)``. Adapters, and losses with parameters of their own, take their shapes from the models; each pair
    of layers has its own copy of such a loss.

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

    one_teacher = False  # whether the term, not its loss, takes numbers from the layers of its only teacher
    _find_in_teacher: Callable[[Any], tuple[str, keras.layers.Layer]] | None = None

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        loss: str | LossLike = "mse",
        *,
        weight: Weight = 1.0,
        adapter: str | keras.layers.Layer | AdapterFactory | None = "auto",
        use_sample_weight: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        student_taps, teacher_taps = self._paired_taps(as_taps(student_layer), as_taps(teacher_layer))
        layers = re.sub(r"\W", "_", "_".join(tap.name for tap in student_taps))
        name = name or layers or "features"
        super().__init__(as_loss(loss), weight=weight, name=name, use_sample_weight=use_sample_weight, **kwargs)
        if len(student_taps) != len(teacher_taps) or not student_taps:
            expected = "`student_layer` and `teacher_layer` to name the same number of layers, at least one"
            raise ValueError(checks.message(expected, f"{len(student_taps)} and {len(teacher_taps)}", "Pair them."))
        if isinstance(adapter, str):
            checks.one_of("adapter", adapter, ADAPTERS)
        if isinstance(adapter, keras.layers.Layer) and len(student_taps) > 1:
            remedy = "Pass a function that makes a layer for each pair."
            raise ValueError(checks.message("`adapter` not to be one layer for several pairs", f"{adapter}", remedy))
        self._store_taps(student_taps, teacher_taps)
        if getattr(self.loss, "layer", None) is not None:
            remedy = "Pass a new loss: the term builds a copy of it for each pair of layers."
            raise ValueError(checks.message("`loss` not to be built yet", f"a {type(self.loss).__name__}", remedy))
        self.adapter = adapter
        self._adapters: list[keras.layers.Layer | None] = []
        self._learned: list[Any] = []
        self._learned_layers: list[keras.layers.Layer] = []
        self._built_for: list[Any] = []
        self._further: list[FeatureDistillation] = []  # the parts for teachers after the first
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

    @property
    def reads_layers(self) -> bool:
        """Whether the term takes numbers from the layers of its only teacher."""
        return self.one_teacher or self.requires.reads_teacher

    @property
    def own_parts(self) -> list[FeatureDistillation]:
        """The parts for further teachers that have adapters of their own, because the teachers' features differ."""
        return [part for part in self._further if part._built_for is not self._built_for]

    def in_teachers(self, teachers: Sequence[keras.Model]) -> None:
        """Let the taps name the layers by their paths in each teacher, as in :class:`DistillationTerm`.

        Raises:
            ValueError: If a tap does not name one layer of a teacher, the adapters were made for other teachers, or
                there are several and the term takes numbers from a teacher's layers.
        """
        if len(teachers) > 1 and self.reads_layers:
            expected = f"one teacher for term {self.name!r}, which takes numbers from the teacher's layers"
            raise ValueError(checks.message(expected, f"{len(teachers)}", "Use another loss, or one teacher."))
        further = list(teachers[1:]) if self.needs_teacher else []
        if teachers and self.own_parts and len(further) != len(self._further):
            expected = f"{len(self._further) + 1} teachers, for each of which term {self.name!r} has adapters"
            raise ValueError(checks.message(expected, f"{len(teachers)}", "Make a new DistillModel."))
        taps = [self._taps_in(teacher) for teacher in (*teachers[:1], *further)]
        super().in_teachers(teachers)
        if not self.own_parts:
            self._further = [self._part(self) for _ in further]
        for part, part_taps in zip(self._further, taps[1:], strict=False):
            part.teacher_taps = part_taps
        # a function: Keras would track a model in an attribute
        self._find_in_teacher = functools.partial(find_layer, teachers[0], who="teacher") if teachers else None
        if teachers and self._learned:
            self._read_teacher()

    def for_teacher(self, number: int) -> FeatureDistillation:
        """The part of the term that reads one of several teachers."""
        return self._further[number - 1] if number and self._further else self

    def parts(self) -> list[tuple[str, DistillationTerm]]:
        """The term and its parts for further teachers, each with a prefix for what it owns."""
        return [("part", self), *((f"teacher{index}", part) for index, part in enumerate(self._further, start=1))]

    def build_for(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make the adapters, for each teacher its own if the teachers' features differ."""
        self.build_from_calls(student, teachers[0])
        pairs = list(zip(self._further, teachers[1:], strict=False))  # stored outputs are those of one teacher
        own = self.requires.keeps_teacher and bool(pairs)
        own = own or any(part._features(student, call) != self._features(student, teachers[0]) for part, call in pairs)
        self._further = [self._part(part) for part in self._further]
        for part, call in zip(self._further, teachers[1:], strict=False):
            if own:
                part._adapters, part._built_for, part._images = [], [], []  # not those of the first teacher
                part.build_from_calls(student, call)
            else:
                part.check_calls(student, call)

    def _part(self, reads: FeatureDistillation) -> FeatureDistillation:
        """A part with this term's adapters that reads the places of another part."""
        part: FeatureDistillation = object.__new__(type(self))
        part.__dict__.update({**vars(self), "_further": [], "teacher_taps": reads.teacher_taps})
        return part

    def _features(self, student: Call, teacher: Call) -> list[Any]:
        """The shapes without the batch, and the layouts, that decide whether two teachers can share adapters."""
        described = [self._described(index, student, teacher) for index in range(len(self.pairs))]
        raw = [tuple(teacher.feature(tap).shape[1:]) for tap in self.teacher_taps]  # a route joins them as they are
        return [(shape, own[1:], other[1:], *rest) for shape, (own, other, *rest) in zip(raw, described, strict=True)]

    def _in_a_model(self) -> FeatureDistillation:
        first = self._settings.first()
        return self if self._origin is not None or first is None else first.term

    @property
    def pairs(self) -> list[tuple[Tap, Tap]]:
        """The pairs of taps that are compared, the student's and the teacher's."""
        return list(zip(self.student_taps, self.teacher_taps, strict=True))

    @property
    def trained_taps(self) -> list[Tap]:
        """Taps of the student whose features have a gradient in this term, without targets in the student."""
        return [tap for tap, _ in self.pairs]

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Make the adapters from the shapes of the features."""
        self._images = [[student.image, teacher.image] for _ in self.pairs]
        self._build_adapters([self._described(index, student, teacher) for index in range(len(self.pairs))])
        self._read_teacher()
        self.check_calls(student, teacher)

    def _read_teacher(self) -> None:
        """Let the copies of a loss take numbers from the teacher's layers."""
        if self.requires.reads_teacher:
            for loss, (_, tap) in zip(self._learned, self.pairs, strict=True):
                loss.read_teacher(functools.partial(self._teacher_layer, tap))

    def _teacher_layer(self, tap: Tap, name: str | None) -> keras.layers.Layer:
        """The teacher's layer of a name; None is the tapped layer."""
        if self._find_in_teacher is None:
            expected = f"`teacher` to be a model for term {self.name!r}, whose loss takes numbers from its layers"
            remedy = "Pass the model, or the numbers to the loss."
            raise ValueError(checks.message(expected, f"no teacher, and {self.loss!r}", remedy))
        return self._find_in_teacher(tap.layer if name is None else name)[1]

    def check_calls(self, student: Call, teacher: Call) -> None:
        """Check that the adapted features fit the teacher's, also if the teacher was replaced after the build."""
        for index, adapter in enumerate(self._adapters):
            shape, teacher_shape, *_ = self._described(index, student, teacher)
            mapped = tuple(shape if adapter is None else adapter.compute_output_shape(tuple(shape)))
            if self._resizes(index, mapped, teacher_shape):
                teacher_shape = (teacher_shape[0], *mapped[1:3], teacher_shape[3])
            self._check(mapped, teacher_shape, index)

    def _described(self, index: int, student: Call, teacher: Call) -> list[Any]:
        """The shapes of a pair of features in one form, then their layouts."""
        features = self._raw(index, student, teacher)
        layouts = self._layouts(index, *features)
        arranged_pair = [arranged(tensor, layout) for (_, tensor), layout in zip(features, layouts, strict=True)]
        shapes = [list(feature.shape) for feature in self._in_one_form(index, arranged_pair, features)]
        return [*shapes, *layouts]

    def _in_one_form(self, index: int, features: Sequence[Any], sides: Any) -> tuple[Any, Any]:
        """A pair of arranged features without prefix tokens, and tokens beside a map as a map."""
        known = self._images[index] if self._images else (None, None)
        both = []
        for tap, feature, (call, _), image in zip(self.pairs[index], features, sides, known, strict=True):
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
        if isinstance(sample_weight, (dict, list, tuple)):
            sample_weight = None  # these are weights of the outputs, but the feature belongs to all of them
        pairs = [self._pair(index, student, teacher) for index in range(len(self.pairs))]
        settings = {"labels": labels, "needs_labels": self.needs_labels, "sample_weight": sample_weight}
        if self.requires.several_layers:
            students, teachers, masks = ([pair[part] for pair in pairs] for part in range(3))
            return weigh(self.loss_of(student), students, teachers, masks=masks[0], **settings)
        losses = self._learned or [self.loss_of(student)] * len(pairs)
        values = []
        for loss, (feature, target, masks) in zip(losses, pairs, strict=True):
            if isinstance(loss, DistillationLoss) and self._learned:
                loss = copied(loss)
                loss.training = student.training
            values.append(weigh(loss, feature, self.with_rows(target, student, teacher), masks=masks, **settings))
        return sum(values) / len(pairs)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        adapter = (self._origin or self).adapter  # type: ignore[attr-defined]
        named = adapter is None or isinstance(adapter, str)
        return {
            **super().get_config(),
            "student_layer": [student.get_config() for student, _ in self.pairs],
            "teacher_layer": [teacher.get_config() for _, teacher in self.pairs],
            "loss": keras.saving.serialize_keras_object(self.loss),
            "adapter": adapter if named else keras.saving.serialize_keras_object(adapter),
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
        self._further = [self._part(self) for _ in further]
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
        for (student, teacher, kind), (tap, _) in zip(shapes, self.pairs, strict=True):
            setting = self.adapter
            if setting == "auto" and (not self.requires.channels_must_match or kind == "scores"):
                setting = None
            # pooled maps have become vectors, and tokens of four dimensions a map
            maps = len(student) > 2 and (kind == "map" or (kind != "scores" and len(student) >= 4))
            self._adapters.append(make_adapter(setting, student, teacher, tap.name, maps=maps))
        if self.requires.learned or self.requires.reads_teacher:
            self._learned = [copied(self.loss) for _ in shapes]
            for loss, adapter, (student, teacher, _) in zip(self._learned, self._adapters, shapes, strict=True):
                loss.build(student if adapter is None else adapter.compute_output_shape(student), teacher)
            self._learned_layers = [loss.layer for loss in self._learned if loss.layer is not None]
        self._built_for = pairs

    def _raw(self, index: int, student: Call, teacher: Call) -> tuple[tuple[Call, Any], tuple[Call, Any]]:
        """For each side the call, and the feature as the layer returned it."""
        student_tap, teacher_tap = self.pairs[index]
        return (student, student.feature(student_tap)), (teacher, teacher.feature(teacher_tap))

    def _layouts(self, index: int, student: tuple[Call, Any], teacher: tuple[Call, Any]) -> list[str | None]:
        """The layouts of a pair of features, None if unknown."""
        settings = {"loss": self.loss, "positions": self.requires.positions_must_match, "adapter": self.adapter}
        return layouts_of_pair(self.pairs[index], student, teacher, **settings)

    def _pair(self, index: int, student: Call, teacher: Call) -> tuple[Any, Any, Any]:
        """The adapted feature, the teacher's feature resized to its positions, and the masks of both."""
        sides = self._raw(index, student, teacher)
        (_, feature), (source, target) = sides
        masks = [student.mask_of(feature), source.mask_of(target)]
        student_layout, teacher_layout = self._built_for[index][2:] if self._built_for else (None, None)
        target = ops.stop_gradient(ops.convert_to_tensor(target))  # stored features are arrays
        before = arranged(widened(feature), student_layout), arranged(widened(target), teacher_layout)
        feature, target = self._in_one_form(index, before, sides)
        masks = [_of_patches(tap, mask) for tap, mask in zip(self.pairs[index], masks, strict=True)]
        if any(mask is not None for mask in masks) and len(feature.shape) != len(before[0].shape):
            expected = f"tokens without a mask for term {self.name!r}, which compares maps or means over positions"
            raise ValueError(checks.message(expected, "a mask", "Pass another adapter."))
        adapter = self._adapters[index] if self._adapters else None
        if adapter is not None:
            feature = adapter(feature, training=student.training)
        if self._resizes(index, feature.shape, target.shape):
            target = resized(target, feature.shape)
            masks = masks[:1]
        self._check(tuple(feature.shape), tuple(target.shape), index)
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

    def _check(self, mapped: Sequence[int | None], teacher_shape: Sequence[int | None], index: int) -> None:
        all_axes = self.requires.channels_must_match and self.requires.positions_must_match
        if all_axes and checks.shapes_differ(mapped, teacher_shape):
            names = [tap.name for tap in self.pairs[index]]
            expected = f"student feature {names[0]!r} and teacher feature {names[1]!r} to have equal shapes"
            remedy = 'Pass adapter="auto".' if self.adapter is None else "Pass an adapter that makes them equal."
            if self.adapter == "auto" and self._adapters and mapped[-1] != teacher_shape[-1]:
                remedy = "The adapter was made for another teacher: make a new DistillModel."
            raise ValueError(checks.message(expected, f"{tuple(mapped)} and {tuple(teacher_shape)}", remedy))


def as_taps(layers: Layers) -> list[Tap]:
    """One layer or several as taps."""
    return [Tap.of(layer) for layer in (layers if isinstance(layers, (list, tuple)) else [layers])]


def taps_and_settings(config: dict[str, Any], *sides: str) -> dict[str, Any]:
    """The arguments of a term's constructor from its config, whose entries for the two sides are lists of taps."""
    taps = {side: [Tap(**tap) for tap in config[side]] for side in sides}
    return {**deserialized({key: value for key, value in config.items() if key not in taps}), **taps}


def _of_patches(tap: Tap, mask: Any) -> Any:
    """A mask of tokens without those that a tap leaves out."""
    return mask[:, tap.prefix_tokens :] if mask is not None and tap.prefix_tokens else mask
