"""Which layer of the student with which layer of the teacher? Pairs by similarity or by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from distill_core.checks import Checks
from distill_core.guidance.assignment import Layer
from distill_core.guidance.layer_pairs import LayerPairs as CoreLayerPairs
from distill_core.guidance.pairing import EVERYTHING, Features, find_pairs
from keras_distill import checks, compat
from keras_distill.guidance.candidates import Key, candidates, entries
from keras_distill.guidance.grams import fingerprints, gram
from keras_distill.model import DistillModel
from keras_distill.recording import Tap, find_layer, recorded
from keras_distill.recording.recorder import Record, Recording
from keras_distill.teachers import CallableTeacher, LiveTeacher, as_teachers, checked_hook, chosen_inputs
from keras_distill.terms import FeatureDistillation

Layers = str | Sequence[str] | None
_PADDING = ("padding_mask", "attention_mask")


class LayerPairs(CoreLayerPairs):
    """The pairs of layers that :func:`pair_layers` has chosen, in order."""

    package = "keras_distill"
    term_class = FeatureDistillation
    tap_class = Tap


def pair_layers(
    student: keras.Model,
    teacher: keras.Model,
    batches: Iterable[Any],
    *,
    by: str = "cka",
    count: int | None = None,
    student_layers: Layers = None,
    teacher_layers: Layers = None,
    teacher_inputs: Callable[[Any], Any] | None = None,
    max_batches: int | None = 8,
) -> LayerPairs:
    """Find out which layers of a student and a teacher to compare.

    With ``by="cka"`` both models run on a few batches, and all their layers are compared by linear CKA, with the
    unbiased estimator over minibatches. A batch counts by its number of examples. The pairs are then chosen so:

    1. The layers of a functional model are those on its main path, past which no other tensor leads, such as the
       outputs of residual blocks; of a subclassed model, its sublayers. The layers to choose from are the blocks (ends
       of branches, alike sublayers in a list) and the layers after the last block, or all layers of a model
       without blocks. Student layers without positions, such as pooled vectors, are left out if others have some.
    2. The student's layers are cut into groups: a stage of layers in a row with equally many positions is a group. If
       all are one stage, it is cut into four. ``count`` halves the longest groups, or leaves out the first ones.
    3. Each group gets one pair. The order of the teacher's layers is that of the student's, and no layer is taken
       twice. Among all such choices the one with the largest sum of scores is taken. A score is the similarity, less
       0.2 for each halving of height and width (of the length, for tokens) between the two layers, less 0.01 times
       the difference of their relative depths from 0 to 1.

    Padding does not count where a layer's output carries a mask, or the inputs have a ``padding_mask``. The models
    run with ``training=False`` and are not changed; one that is not built yet is built. A student with random
    weights says less about its layers than one that was trained for a while; if in doubt, pair by depth.

    Args:
        student: The model; of a :class:`DistillModel` its student is taken.
        teacher: The model.
        batches: A ``tf.data.Dataset``, or a list of batches or of inputs. Of a tuple the first entry is passed to the
            models, of a dict the entries that each of them declares.
        by: ``"cka"``; or a map by depth, for which no values are computed: ``"uniform"`` pairs layer ceil(m L / k) of
            both for m = 1 to k, ``"last"`` the last k of both, ``"original"`` the layers of a student that was cut out
            of the teacher with those of equal weights. They pair blocks alone, if both have some.
        count: Number of pairs. ``None`` is one for each stage, or at most 4 if there is one stage alone; with
            ``student_layers`` one for each of them, and by depth one for each layer of the model with fewer.
        student_layers: Names of the student's layers to choose from; ``"all"`` for every layer; ``None`` as above.
        teacher_layers: The same for the teacher.
        teacher_inputs: Makes the teacher's inputs from the batch's inputs; ``None`` passes the same.
        max_batches: The most batches that are read; ``None`` reads all.

    Returns:
        The pairs, a sequence. ``print`` shows a table, ``draw`` the map of similarities, ``code`` terms as code, and
        ``terms`` makes them.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a batch has fewer than 4 examples, a feature is not finite, a name is unknown, or a model has no
            layers to compare.

    Warns:
        UserWarning: If a model is random with ``training=False``.

    Example:
        >>> layers = [keras.layers.Dense(8, "tanh", name="first"), keras.layers.Dense(8, "tanh", name="second")]
        >>> teacher = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(3)])
        >>> student = keras.Sequential([keras.Input((6,)), layers[0], keras.layers.Dense(3)])
        >>> pairs = pair_layers(student, teacher, [np.random.randn(64, 6)])
        >>> pairs[0].student.name, pairs[0].teacher.name, round(pairs[0].similarity, 3)
        ('first', 'first', 1.0)

    References:
        Nguyen et al. (2020), arXiv:2010.15327, and Kornblith et al. (2019), arXiv:1905.00414: the similarity, here with
        batches weighted by size. Jiao et al. (2020), arXiv:1909.10351: the uniform map.
    """
    if not isinstance(student, keras.Model):
        raise TypeError(checks.message("`student` to be a Keras model", f"student={student!r}", "Pass the model."))
    student = student.student if isinstance(student, DistillModel) else student
    teachers = as_teachers(teacher, student)
    if len(teachers) != 1 or isinstance(teachers[0], CallableTeacher) or not isinstance(teachers[0], keras.Model):
        expected = "`teacher` to be one model with layers"
        remedy = "Pass the model, or call pair_layers for each of several."
        raise TypeError(checks.message(expected, f"a {type(teacher).__name__}", remedy))
    if isinstance(batches, (np.ndarray, dict, str, tuple)) or keras.ops.is_tensor(batches):
        expected = "`batches` to be a dataset or a list of batches"
        raise TypeError(checks.message(expected, f"a {type(batches).__name__}", "Pass [batch]."))
    sides = (
        _Side(student, "student", student_layers, None),
        _Side(teachers[0], "teacher", teacher_layers, checked_hook(teacher_inputs, None)),
    )
    pairing = find_pairs(
        *sides,
        batches,
        by,
        count,
        max_batches,
        lambda *layers: _originals(sides, *layers),
        Checks(checks.message),
    )
    return LayerPairs(pairing.pairs, pairing.student, pairing.teacher, pairing.similarity, pairing.note)


class _Side:
    """One of the two models, its layers and its inputs."""

    def __init__(self, model: keras.Model, who: str, layers: Layers, inputs: Callable[[Any], Any] | None) -> None:
        self.model, self.who, self._inputs = model, who, inputs
        self.named = layers is not None and layers != "all"
        self._everything = layers == "all"
        self._names: list[str] | None = None
        if self.named:
            listed = [layers] if isinstance(layers, str) else list(layers or [])
            self._names = [find_layer(model, name, who)[0] for name in listed]
        self._live = LiveTeacher(model, [])
        self._candidates: dict[Key, Layer] = {}

    def features(self, batch: Any, *, rows: slice = EVERYTHING, grams: bool = True, prints: bool = False) -> Features:
        """The numbers of one forward pass, or the layers alone."""
        inputs = self._chosen(batch)
        size = len(keras.tree.flatten(inputs)[0])
        if rows != EVERYTHING:
            order = [*range(size)][rows]
            inputs = keras.tree.map_structure(
                lambda leaf: leaf[order] if leaf.ndim and len(leaf) == size else leaf, inputs
            )
            size = len(order)
        if not self.model.built:
            self._live.answer(inputs)
        if not self._candidates:
            self._candidates = candidates(self.model, inputs, self._names, self._everything)
        result = Features(size)
        if not (grams or prints):
            result.layers = {layer.label: layer for layer in self._candidates.values()}
            return result
        padding = (
            next((inputs[name] for name in _PADDING if name in inputs), None) if isinstance(inputs, dict) else None
        )
        calls: Counter[int] = Counter()

        def watch(record: Record, layer: Any, arguments: Any, output: Any) -> None:
            call = calls[id(layer)]
            calls[id(layer)] += 1
            for entry, feature in entries(output).items():
                description = self._candidates.get((id(layer), call, entry))
                if description is None or feature.shape[0] != size:
                    continue
                if grams:
                    mask = compat.get_keras_mask(feature)
                    result.grams[description.label] = gram(feature, padding if mask is None else mask)
                if prints:
                    result.prints[description.label] = fingerprints(feature)

        with recorded(Recording(self.model, set(), watch=watch)):
            self._live.answer(inputs)
        done = result.grams if grams else result.prints
        result.layers = {layer.label: layer for layer in self._candidates.values() if layer.label in done}
        return result

    def _chosen(self, batch: Any) -> Any:
        """The inputs of the model in a batch, as NumPy arrays."""
        inputs = batch[0] if isinstance(batch, tuple) else batch
        inputs = inputs if self._inputs is None else self._inputs(inputs)
        return keras.tree.map_structure(keras.ops.convert_to_numpy, chosen_inputs(self.model, inputs))


def _originals(sides: Sequence[_Side], student: Sequence[Layer], teacher: Sequence[Layer]) -> dict[str, str]:
    """The labels of layers with equal weights, the student's first. Each layer of the teacher is taken once."""
    origins: dict[str, str] = {}
    for layer in student:
        own = find_layer(sides[0].model, layer.name, "student")[1].get_weights()
        for origin in teacher:
            other = find_layer(sides[1].model, origin.name, "teacher")[1].get_weights()
            same = bool(own) and len(own) == len(other) and all(map(np.array_equal, own, other))
            if same and origin.label not in origins.values():
                origins[layer.label] = origin.label
                break
    return origins
