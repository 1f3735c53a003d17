"""Which layer of the student with which layer of the teacher? Pairs by similarity or by depth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill_core.checks import Checks
from distill_core.guidance.assignment import Layer
from distill_core.guidance.layer_pairs import LayerPairs as CoreLayerPairs
from distill_core.guidance.pairing import EVERYTHING, Features, find_pairs
from lightning_distill import checks, compat
from lightning_distill.guidance.candidates import candidates
from lightning_distill.guidance.grams import GramRecorder, evaluated
from lightning_distill.recording import Call, Tap, find_layer, first_tensor, map_tensors
from lightning_distill.recording.arguments import parameters_of, takes
from lightning_distill.recording.batches import as_arguments, inputs_in
from lightning_distill.recording.student import possible_students
from lightning_distill.teachers import CallableTeacher, as_teacher
from lightning_distill.teachers.configs import check_images
from lightning_distill.teachers.inputs import Place, TeacherInputs
from lightning_distill.teachers.source import TeacherEnsemble
from lightning_distill.terms import FeatureDistillation

Layers = str | Sequence[str] | None


class LayerPairs(CoreLayerPairs):
    """The pairs of layers that :func:`pair_layers` has chosen, in order."""

    package = "lightning_distill"
    term_class = FeatureDistillation
    tap_class = Tap


def pair_layers(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    by: str = "cka",
    count: int | None = None,
    student_layers: Layers = None,
    teacher_layers: Layers = None,
    teacher_inputs: Place = None,
    max_batches: int | None = 8,
) -> LayerPairs:
    """Find out which layers of a student and a teacher to compare.

    With ``by="cka"`` both networks run on a few batches, and all their layers are compared by linear CKA, with the
    unbiased estimator over minibatches. A batch counts by its number of examples. The pairs are then chosen so:

    1. The layers to choose from are the blocks of a network (residual blocks, transformer layers, alike modules in a
       list) and the layers after the last block, or all layers if it has no blocks. Student layers without positions,
       such as pooled vectors, are left out if others have some.
    2. The student's layers are cut into groups: a stage of layers in a row with equally many positions is a group. If
       all are one stage, it is cut into four. ``count`` halves the longest groups, or leaves out the first ones.
    3. Each group gets one pair. The order of the teacher's layers is that of the student's, and no layer is taken
       twice. Among all such choices the one with the largest sum of scores is taken. A score is the similarity, less
       0.2 for each halving of height and width (of the length, for tokens) between the two layers, less 0.01 times
       the difference of their relative depths from 0 to 1.

    Padding does not count where a batch has an ``attention_mask`` of the tokens' shape, except in models with an
    encoder and a decoder. The networks are in eval mode without gradients meanwhile, and as before afterwards. A
    student with random weights says less about its layers than one that was trained for a while; if in doubt, pair
    by depth.

    Args:
        student: The network; or a LightningModule, whose ``forward`` is called, or else its one child with trainable
            parameters.
        teacher: The network.
        batches: A loader, or a list of batches or of inputs. Of a batch ``(inputs, labels)`` the first entry is passed
            to the networks, of a dict the entries that each of them takes.
        by: ``"cka"``; or a map by depth, for which the networks run once to see their layers: ``"uniform"`` pairs layer
            ceil(m L / k) of both for m = 1 to k, ``"last"`` the last k of both, ``"original"`` the layers of a student
            that was cut out of the teacher with those of equal weights. They pair blocks alone, if both have some.
        count: Number of pairs. ``None`` is one for each stage, or at most 4 if there is one stage alone; with
            ``student_layers`` one for each of them, and by depth one for each layer of the network with fewer.
        student_layers: Names of the student's layers to choose from; ``"all"`` for every module; ``None`` as above.
        teacher_layers: The same for the teacher.
        teacher_inputs: The teacher's inputs, if they are not the student's, as in :class:`Distiller`.
        max_batches: The most batches that are read; ``None`` reads all.

    Returns:
        The pairs, a sequence. ``print`` shows a table, ``draw`` the map of similarities, ``code`` terms as code, and
        ``terms`` makes them.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a batch has fewer than 4 examples, a feature is not finite, a name is unknown, or a network has
            no layers to compare.

    Warns:
        UserWarning: If a network is random in eval mode.

    Example:
        >>> hidden = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
        >>> teacher = nn.Sequential(*hidden, nn.Linear(8, 3))
        >>> student = nn.Sequential(*hidden[:2], nn.Linear(8, 3))
        >>> pairs = pair_layers(student, teacher, [torch.randn(64, 6)])
        >>> [(pair.student.name, pair.teacher.name, round(pair.similarity, 3)) for pair in pairs]
        [('0', '0', 1.0), ('1', '1', 1.0)]

    References:
        Nguyen et al. (2020), arXiv:2010.15327, and Kornblith et al. (2019), arXiv:1905.00414: the similarity, here with
        batches weighted by size. Jiao et al. (2020), arXiv:1909.10351: the uniform map.
    """
    network, prefix = _network_of(student)
    teacher = _checked_teacher(teacher)
    if isinstance(batches, (Tensor, Mapping, str, tuple)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"Expected `batches` to be a loader or a list of batches, but got {type(batches).__name__}. Pass [batch]."
        )
    inputs = TeacherInputs(teacher_inputs, {})
    check_images(network, [teacher], inputs)
    sides = (
        _Side(network, "student", student_layers, prefix, None),
        _Side(teacher, "teacher", teacher_layers, "", inputs),
    )
    with contextlib.ExitStack() as stack:
        for side in sides:
            stack.enter_context(evaluated(side.network))
        stack.enter_context(_uncompiled(side.network for side in sides))
        pairing = find_pairs(
            *sides, batches, by, count, max_batches, lambda *layers: _originals(sides, *layers), Checks(checks.message)
        )
    return LayerPairs(pairing.pairs, pairing.student, pairing.teacher, pairing.similarity, pairing.note)


class _Side:
    """One of the two networks, its layers and its inputs."""

    def __init__(self, network: nn.Module, who: str, layers: Layers, prefix: str, inputs: TeacherInputs | None) -> None:
        self.network, self.who, self._inputs = network, who, inputs
        self.named = layers is not None
        self._has_decoder = bool(getattr(getattr(network, "config", None), "is_encoder_decoder", False))
        blocks = candidates(network)
        if layers is None:
            names = [*blocks]
        elif layers == "all":
            names = [name for name, _ in network.named_modules() if name]
            self.named = False
        else:
            names = [layers] if isinstance(layers, str) else [*layers]
        self.layers: dict[str, tuple[nn.Module, bool]] = {}
        for name in names:
            path = str(name).removeprefix(prefix)
            module = find_layer(network, path) if path else None
            if module is None:
                known = [prefix + inner for inner, _ in network.named_modules() if inner]
                got = checks.closest(str(name), known)
                raise ValueError(f"Expected `{who}_layers` to name modules of the {who}, but got {name!r}. {got}")
            self.layers[prefix + path] = module, blocks.get(path, False)

    def features(self, batch: Any, *, rows: slice = EVERYTHING, grams: bool = True, prints: bool = False) -> Features:
        """The numbers of one forward pass."""
        args, kwargs = self._arguments(batch)
        size = len(first_tensor(args, kwargs))
        if rows != EVERYTHING:
            order = [*range(size)][rows]
            args, kwargs = map_tensors(
                (args, kwargs), lambda tensor: tensor[order] if tensor.ndim and len(tensor) == size else tensor
            )
            size = len(order)
        mask = kwargs.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.ndim == 2 and not self._has_decoder
        image = Call(args, kwargs).image_size
        recorder = GramRecorder(self.layers, size, image, mask if padded else None, grams=grams, prints=prints)
        with recorder.recording():
            output = self.network(*args, **kwargs)
            if not self.named:
                recorder.leave_out_scores(output)
        return recorder.features()

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the network for a batch, on its device and in its precision."""
        args, kwargs = as_arguments(inputs_in(batch))
        if isinstance(batch, Mapping) and self._has_decoder:
            kwargs = dict(batch)  # which makes the decoder's inputs from the labels
        if self._inputs is not None:
            call = self._inputs.of(Call(args, kwargs, batch=batch))
            args, kwargs = call.args, call.kwargs
        taken = {name: value for name, value in kwargs.items() if takes(self.network, name)}
        if not args and not taken:
            raise ValueError(
                f"Expected every batch to have entries that the {self.who} takes, {[*parameters_of(self.network)]}, but"
                f" got {[*kwargs]}. Rename them in the batch, or pass tuples."
            )
        tensors = [*self.network.parameters(), *self.network.buffers()]
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)

        def placed(tensor: Tensor) -> Tensor:
            return tensor.to(tensors[0].device, dtype if tensor.is_floating_point() else None)

        return map_tensors((args, taken), placed) if tensors else (args, taken)


def _network_of(student: Any) -> tuple[nn.Module, str]:
    """The network to call, and the prefix of its layers' names."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"Expected `student` to be a module, but got student={student!r}. Pass the network.")
    if hasattr(student, "training_step") and not _has_forward(student):
        children = possible_students(student)
        if len(children) != 1:
            raise ValueError(
                "Expected a LightningModule with a `forward`, or with one child that has trainable parameters, but got"
                f" {', '.join(map(repr, children)) or 'none'}. Pass the network itself."
            )
        ((path, child),) = children.items()
        return _unwrapped(child), f"{path}."
    return _unwrapped(student), ""


def _has_forward(module: nn.Module) -> bool:
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return owner.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning", "torch")


def _unwrapped(network: nn.Module) -> nn.Module:
    while compat.is_wrapper(network):
        inner = compat.unwrapped(network)
        if inner is None:
            break
        network = inner
    return network


def _checked_teacher(teacher: Any) -> nn.Module:
    teacher = as_teacher(teacher)
    if isinstance(teacher, (TeacherEnsemble, CallableTeacher)) or not isinstance(teacher, nn.Module):
        raise TypeError(
            f"Expected `teacher` to be one network with layers, but got {type(teacher).__name__}. Pass the network,"
            " or call pair_layers for each of several."
        )
    return _unwrapped(teacher)


@contextlib.contextmanager
def _uncompiled(networks: Iterable[nn.Module]) -> Any:
    """A context in which compiled modules run as they are written, so that hooks see every layer."""
    if any(compat.is_compiled(module) for network in networks for module in network.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _originals(sides: Sequence[_Side], student: Sequence[Layer], teacher: Sequence[Layer]) -> dict[str, str]:
    """The labels of layers with equal weights, the student's first. Each layer of the teacher is taken once."""
    origins: dict[str, str] = {}
    for layer in student:
        own = dict(sides[0].layers[layer.name][0].state_dict())
        for origin in teacher:
            other = sides[1].layers[origin.name][0].state_dict()
            same = own.keys() == other.keys() and bool(own)
            if origin.label not in origins.values() and same and all(_alike(own[name], other[name]) for name in own):
                origins[layer.label] = origin.label
                break
    return origins


def _alike(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return True
    return first.shape == second.shape and torch.equal(first, second.to(first.device, first.dtype))
