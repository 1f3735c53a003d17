"""Terms: a loss at a place in the two models, with a weight and perhaps an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_distill import backends, checks, steps
from keras_distill.adapters import ADAPTERS, AdapterFactory, make_adapter, resized
from keras_distill.functional.top_k import TopK, check_classes, merge_classes
from keras_distill.losses import FeatureDistance, FunctionLoss, SoftTargetLoss
from keras_distill.pairs import paired_outputs
from keras_distill.schedules import Schedule, deserialized
from keras_distill.taps import Call, Tap, select
from keras_distill.term import DistillationTerm, LossTerm, copied
from keras_distill.weighting import weighted_loss

LossLike: TypeAlias = keras.losses.Loss | Callable[..., Any]
Layers: TypeAlias = str | keras.layers.Layer | Tap | Sequence[str | keras.layers.Layer | Tap]


@keras.saving.register_keras_serializable(package="keras_distill")
class LogitsDistillation(LossTerm):
    """A loss between the outputs of the two models.

    Args:
        loss: A loss of this package or of Keras, or a function of ``(student_logits, teacher_logits)``; ``None`` is
            :class:`SoftTargetLoss` at temperature 4.
        weight: Factor of the term in the total loss, a number or a schedule.
        output: Which of a model's outputs, an index or a key; ``None`` adds the loss up over all of them.
        use_sample_weight: Whether the batch's sample weights count in the term.
        name: Name in logs and files.

    Attributes:
        temperature: The loss's temperature where it has one, a scalar variable that may be set while training.

    Raises:
        TypeError: If ``loss`` cannot be called, or is a class.
        ValueError: If ``weight`` is negative.

    Example:
        >>> term = LogitsDistillation(SoftTargetLoss(temperature=1.0), weight=0.5)
        >>> round(float(term.compute(Call(ops.array([[2.0, 0.0]])), Call(ops.array([[0.0, 1.0]])))), 4)
        1.0068

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
    """

    def __init__(
        self,
        loss: LossLike | None = None,
        *,
        weight: float | Schedule = 1.0,
        output: int | str | None = None,
        use_sample_weight: bool = True,
        name: str = "logits",
        **kwargs: Any,
    ) -> None:
        chosen = _as_loss(SoftTargetLoss() if loss is None else loss)
        super().__init__(chosen, weight=weight, name=name, use_sample_weight=use_sample_weight, **kwargs)
        if getattr(loss, "learned", False):
            expected = "`loss` to have no parameters of its own"
            remedy = "Use it in a FeatureDistillation, between the models' last layers for instance."
            raise TypeError(checks.message(expected, f"a {type(loss).__name__}", remedy))
        self.output_key = output

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Check that the two models' outputs fit each other and the loss."""
        for mine, theirs, _ in paired_outputs(student, teacher, self.output_key):
            for who, tensor in (("student", mine), ("teacher", theirs)):
                if getattr(self.loss, "from_logits", False) and getattr(tensor, "_keras_logits", None) is not None:
                    expected = f"the {who}'s output to be logits, since the loss has from_logits=True"
                    remedy = "Leave out the last softmax or sigmoid, or pass a loss with from_logits=False."
                    raise ValueError(checks.message(expected, "probabilities of a softmax or sigmoid", remedy))
            if isinstance(theirs, TopK):
                self._check_merging(theirs)
                check_classes(mine, theirs)
                continue
            remedy = "Both models must score the same classes."
            checks.same_shape(mine, theirs, names=("student_logits", "teacher_logits"), remedy=remedy)
        self.built = True

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight, a scalar."""
        total = 0.0
        pairs = paired_outputs(student, teacher, self.output_key, sample_weight)
        for (mine, theirs, weights), known in zip(pairs, self._labels_of(labels, len(pairs)), strict=True):
            mask = backends.mask_of(mine)
            mine = backends.without_mask(mine)
            if isinstance(theirs, TopK):
                self._check_merging(theirs)  # here too: the term may have been built with a teacher
                mine, theirs = merge_classes(mine, theirs, getattr(self.loss, "temperature", 1.0))
            backends.check_batch(mine, theirs)
            target = (theirs, known) if self.needs_labels else theirs
            total = total + weighted_loss(self.loss, mine, target, sample_weight=weights, mask=mask)
        return total

    def _labels_of(self, labels: Any, count: int) -> list[Any]:
        """The labels of each output: nested ones are told apart as the outputs are, others serve all of them."""
        if not self.needs_labels or not keras.tree.is_nested(labels):
            return [labels] * count
        if self.output_key is not None:
            return [select(labels, self.output_key, "the labels")]
        several: list[Any] = keras.tree.flatten(labels)
        if len(several) != count:
            expected = f"labels for each of the {count} outputs, since {type(self.loss).__name__} needs them"
            raise ValueError(checks.message(expected, f"{len(several)}", "Pass output=<the output that has labels>."))
        return several

    def _check_merging(self, teacher: TopK) -> None:
        """Raise if the loss is no divergence of logits, in which classes may be merged."""
        own = getattr(self.loss, "merges_classes", False) and not getattr(self.loss, "standardize", False)
        if not own or not getattr(self.loss, "from_logits", True):
            expected = f"a cache of full outputs for {type(self.loss).__name__}"
            remedy = "Build it without top_k, or use a divergence of logits such as SoftTargetLoss()."
            received = f"the likeliest {teacher.indices.shape[-1]} classes alone"
            raise ValueError(checks.message(expected, received, remedy))

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        loss = keras.saving.serialize_keras_object(self.loss)
        return {**super().get_config(), "loss": loss, "output": self.output_key}


@keras.saving.register_keras_serializable(package="keras_distill")
class FeatureDistillation(LossTerm):
    """A loss between a feature of the student, mapped by an adapter, and a feature of the teacher.

    A teacher map (N, H, W, C) of another height or width than the student's is resized to it: averaged down,
    interpolated up. The adapters take their shapes from the models, and so does a loss with parameters of its own, of
    which every pair of layers has a copy.

    Args:
        student_layer: Name of a layer of the student, such as ``"block2"``, a layer, a :class:`Tap`, or a list of them.
        teacher_layer: The same for the teacher; as many as for the student.
        loss: ``"mse"``, ``"l1"``, ``"smooth_l1"``, ``"cosine"``, ``"kl"``, a loss of this package or of Keras, or a
            function of ``(student, teacher)``. A loss with ``several_layers = True`` is given lists of features; any
            other is averaged over the pairs of layers. A loss with ``learned = True`` is trained along with the
            adapters.
        weight: Factor of the term in the total loss, a number or a schedule.
        adapter: ``"auto"`` (identity where the shapes agree, else a 1x1 convolution for maps and a dense layer for
            vectors and token sequences), ``None``, ``"linear"``, ``"conv1x1"``, a layer, or a factory called with the
            shapes of both features, channels last.
        use_sample_weight: Whether the batch's sample weights count in the term.
        name: Name in logs and files; ``None`` takes the student layer's, ``"blocks_1"`` for ``"blocks.1"``.

    Attributes:
        adapters: The adapters, one for each pair of layers, None where there is none; empty before the first step.
        learned: The copies of a loss with parameters of its own, in the same order; empty for other losses.

    Raises:
        ValueError: If a setting is not one of those above, or ``loss`` has been built already.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> FeatureDistillation("block2", "block4", "cosine", weight=10.0).name
        'block2'

    References:
        Romero et al. (2015). FitNets: Hints for Thin Deep Nets. arXiv:1412.6550. The paper's factor 1/2 is left out.
    """

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        loss: str | LossLike = "mse",
        *,
        weight: float | Schedule = 1.0,
        adapter: str | keras.layers.Layer | AdapterFactory | None = "auto",
        use_sample_weight: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        mine, theirs = _taps(student_layer), _taps(teacher_layer)
        own = re.sub(r"\W", "_", "_".join(tap.name for tap in mine))
        name = name or own or "features"
        chosen: Any = FeatureDistance(loss) if isinstance(loss, str) else _as_loss(loss)  # type: ignore[arg-type]
        super().__init__(chosen, weight=weight, name=name, use_sample_weight=use_sample_weight, **kwargs)
        if len(mine) != len(theirs) or not mine:
            expected = "`student_layer` and `teacher_layer` to name equally many layers, at least one"
            raise ValueError(checks.message(expected, f"{len(mine)} and {len(theirs)}", "Pair them."))
        if isinstance(adapter, str):
            checks.one_of("adapter", adapter, ADAPTERS)
        if isinstance(adapter, keras.layers.Layer) and len(mine) > 1:
            remedy = "Pass a function that makes one for each pair."
            raise ValueError(checks.message("`adapter` not to be one layer for several pairs", f"{adapter}", remedy))
        self.student_taps, self.teacher_taps = mine, theirs
        if getattr(self.loss, "layer", None) is not None:
            remedy = "Pass a new one: the term builds a copy for each pair of layers."
            raise ValueError(checks.message("`loss` not to be built yet", f"a {type(self.loss).__name__}", remedy))
        self.adapter = adapter
        self.adapters: list[keras.layers.Layer | None] = []
        self.learned: list[keras.losses.Loss] = []
        self._shapes: list[Any] = []

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Make the adapters from the shapes of a first call."""
        pairs = [
            (tuple(_channels_last(student.feature(mine)).shape), tuple(_channels_last(teacher.feature(theirs)).shape))
            for mine, theirs in zip(self.student_taps, self.teacher_taps, strict=True)
        ]
        self._build_adapters(pairs)
        for (shape, wanted), adapter, tap in zip(pairs, self.adapters, self.student_taps, strict=True):
            mapped = tuple(shape if adapter is None else adapter.compute_output_shape(shape))
            if self._resizes(mapped, wanted):
                wanted = (wanted[0], *mapped[1:3], wanted[3])
            self._check(mapped, wanted, tap)

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight, a scalar."""
        if isinstance(sample_weight, (dict, list, tuple)):
            sample_weight = None  # weights of the single outputs say nothing about a feature that all of them share
        pairs = [self._pair(index, student, teacher) for index in range(len(self.student_taps))]
        if getattr(self.loss, "several_layers", False):
            mine, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            return self._value(self.loss, mine, theirs, pairs[0][2], labels, sample_weight)
        losses = self.learned or [self.loss] * len(pairs)
        values = [self._value(loss, *pair, labels, sample_weight) for loss, pair in zip(losses, pairs, strict=True)]
        return sum(values) / len(pairs)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        kept = self.adapter
        return {
            **super().get_config(),
            "student_layer": [tap.get_config() for tap in self.student_taps],
            "teacher_layer": [tap.get_config() for tap in self.teacher_taps],
            "loss": keras.saving.serialize_keras_object(self.loss),
            "adapter": kept if kept is None or isinstance(kept, str) else keras.saving.serialize_keras_object(kept),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistillationTerm:
        """The term that :meth:`get_config` describes."""
        taps: dict[str, Any] = {
            side: [Tap(**tap) for tap in config[side]] for side in ("student_layer", "teacher_layer")
        }
        rest = {key: value for key, value in config.items() if key not in taps}
        return cls(**taps, **deserialized(rest))

    def get_build_config(self) -> dict[str, Any] | None:
        """The shapes that the adapters were made from."""
        return {"shapes": self._shapes} if self.built else None

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Make the adapters from the shapes of a saved model."""
        if config:
            self._build_adapters([(tuple(mine), tuple(theirs)) for mine, theirs in config["shapes"]])

    def _build_adapters(self, pairs: list[tuple[Any, Any]]) -> None:
        wanted = self.adapter
        if wanted == "auto" and not getattr(self.loss, "channels_must_match", True):
            wanted = None
        self.adapters = [
            make_adapter(wanted, mine, theirs, tap.name)
            for (mine, theirs), tap in zip(pairs, self.student_taps, strict=True)
        ]
        if getattr(self.loss, "learned", False):
            self.learned = [copied(self.loss) for _ in pairs]
            for loss, adapter, (mine, theirs) in zip(self.learned, self.adapters, pairs, strict=True):
                loss.build(mine if adapter is None else adapter.compute_output_shape(mine), theirs)
            self._learned_layers = [loss.layer for loss in self.learned]  # Keras tracks layers, but not in a loss
        self._shapes = [[list(mine), list(theirs)] for mine, theirs in pairs]
        self.built = True

    def _pair(self, index: int, student: Call, teacher: Call) -> tuple[Any, Any, Any]:
        """The adapted feature, the teacher's at its positions, and the student's mask."""
        feature = student.feature(self.student_taps[index])
        mask = backends.mask_of(feature)
        feature, target = (
            _channels_last(_widened(backends.without_mask(feature))),
            teacher.feature(self.teacher_taps[index]),
        )
        target = _channels_last(_widened(target))
        adapter = self.adapters[index]
        if adapter is not None:
            feature = adapter(feature, training=steps.trains())
        if self._resizes(feature.shape, target.shape):
            target = resized(target, feature.shape)
        self._check(tuple(feature.shape), tuple(target.shape), self.student_taps[index])
        backends.check_batch(feature, target)
        return feature, target, mask

    def _resizes(self, mapped: Sequence[int | None], wanted: Sequence[int | None]) -> bool:
        positions = getattr(self.loss, "positions_must_match", True)
        return bool(positions and len(mapped) == len(wanted) == 4 and self.adapter != "linear")

    def _check(self, mapped: Sequence[int | None], wanted: Sequence[int | None], tap: Tap) -> None:
        channels = getattr(self.loss, "channels_must_match", True)
        positions = getattr(self.loss, "positions_must_match", True)
        if channels and positions and checks.shapes_differ(mapped, wanted):
            other = self.teacher_taps[list(self.student_taps).index(tap)].name
            expected = f"student feature {tap.name!r} and teacher feature {other!r} to have equal shapes"
            remedy = 'Pass adapter="auto".' if self.adapter is None else "Pass an adapter that makes them equal."
            raise ValueError(checks.message(expected, f"{tuple(mapped)} and {tuple(wanted)}", remedy))

    def _value(self, loss: Any, student: Any, teacher: Any, mask: Any, labels: Any, sample_weight: Any) -> Any:
        target = (teacher, labels) if self.needs_labels else teacher
        return weighted_loss(loss, student, target, sample_weight=sample_weight, mask=mask)


def _taps(layers: Layers) -> list[Tap]:
    return [Tap.of(layer) for layer in (layers if isinstance(layers, (list, tuple)) else [layers])]


def _as_loss(loss: LossLike) -> keras.losses.Loss:
    return loss if isinstance(loss, keras.losses.Loss) else FunctionLoss(loss)


def _channels_last(feature: Any) -> Any:
    if keras.config.image_data_format() == "channels_first" and len(feature.shape) >= 4:
        return ops.moveaxis(feature, 1, -1)
    return feature


def _widened(feature: Any) -> Any:
    """The feature in float32 if it is narrower: 1e4 squared leaves float16."""
    narrow = keras.backend.standardize_dtype(feature.dtype) in ("float16", "bfloat16")
    return ops.cast(feature, "float32") if narrow else feature


def as_terms(terms: DistillationTerm | Sequence[DistillationTerm] | None) -> list[DistillationTerm]:
    """The terms as a list with distinct names.

    Args:
        terms: One term, several, or ``None`` for logits at temperature 4.

    Returns:
        At least one term.

    Raises:
        TypeError: If one is no term.
        ValueError: If there are none, or two share a name.

    Example:
        >>> [term.name for term in as_terms(None)]
        ['logits']
    """
    several: Any = [LogitsDistillation()] if terms is None else terms
    found = [*several] if isinstance(several, (list, tuple)) else [several]
    if not found:
        raise ValueError(checks.message("`terms` to hold at least one term", "terms=[]", "Pass None for logits alone."))
    for index, term in enumerate(found):
        if not isinstance(term, DistillationTerm):
            remedy = "Wrap a loss: LogitsDistillation(loss) or FeatureDistillation(layer, layer, loss)."
            raise TypeError(checks.message(f"`terms[{index}]` to be a term", f"a {type(term).__name__}", remedy))
    names = [term.name for term in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(checks.message("`terms` to have distinct names", f"{twice!r} twice", "Pass name=... to one."))
    return found
