"""One forward pass of a network, in which each feature is reduced to a Gram matrix as soon as its layer returns."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill_core.grids import find_grid
from distill_core.guidance.assignment import Layer
from distill_core.guidance.pairing import Features
from lightning_distill.compat import version_of
from lightning_distill.recording.outputs import entries_of, select

_CONSTANT = 1e-12  # of the sum of squares: below it the differences between examples are rounding errors
Key = tuple[str, int, int | str | None]  # name of the layer, its call, the entry of its output


@contextlib.contextmanager
def evaluated(network: nn.Module) -> Iterator[None]:
    """A context in which a network is in eval mode and has no gradients; afterwards every module has its old mode."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class GramRecorder:
    """Hooks on the layers of a network for one forward pass.

    Args:
        layers: The modules by name, and whether each is a block.
        size: Number of examples.
        image: Height and width of the images, if the network gets images.
        mask: The tokens that are not padding, shape ``(n, L)``.
        grams: Whether to compute Gram matrices.
        prints: Whether to compute fingerprints.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[nn.Module, bool]],
        size: int,
        image: tuple[int, int] | None,
        mask: Tensor | None,
        *,
        grams: bool,
        prints: bool,
    ) -> None:
        self._layers, self._size, self._image, self._mask = layers, size, image, mask
        self._asked = {"grams": grams, "prints": prints}
        self._calls: Counter[str] = Counter()
        self._learned = False  # whether a layer with parameters has run
        self._numbers: dict[str, dict[Key, Tensor]] = {"grams": {}, "prints": {}}
        self._facts: dict[Key, Layer] = {}
        self._versions: dict[Key, tuple[Tensor, int]] = {}
        self._alive: dict[int, tuple[weakref.ref[Tensor], Key]] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """A context in which calls of the layers are recorded."""
        handles = []
        try:
            for name, (module, block) in self._layers.items():
                handles.append(module.register_forward_hook(self._hook(name, block)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._alive.clear()

    def _hook(self, name: str, block: bool) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            call = self._calls[name]
            self._calls[name] += 1
            self._learned = self._learned or any(True for _ in module.parameters())
            if not self._learned:  # the input in another form
                return
            for entry, feature in _tensors(output):
                if feature.is_floating_point() and feature.ndim > 1 and len(feature) == self._size and feature.numel():
                    self._note((name, call, entry), feature, block, plain=output is feature)

        return note

    def _note(self, key: Key, feature: Tensor, block: bool, plain: bool) -> None:
        earlier = self._same(feature)
        if earlier is not None:
            # a container returns the output of its last layer: the outer of the two names is kept
            if not plain or not earlier[0].startswith(f"{key[0]}."):
                return
            block = block or self._facts[earlier].block
            for numbers in self._numbers.values():
                if earlier in numbers:
                    numbers[key] = numbers.pop(earlier)
            self._drop(earlier)
        else:
            if self._asked["grams"]:
                self._numbers["grams"][key] = gram(feature, self._mask)
            if self._asked["prints"]:
                self._numbers["prints"][key] = fingerprints(feature)
        self._facts[key] = self._described(key, feature, block)
        self._alive[feature.data_ptr()] = weakref.ref(feature), key
        self._versions[key] = _counter(feature)

    def _same(self, feature: Tensor) -> Key | None:
        """The layer that has returned the same values already, as this tensor or as another view of its memory."""
        reference, key = self._alive.get(feature.data_ptr(), (None, None))
        earlier = None if reference is None else reference()
        if earlier is None or key not in self._facts or earlier.numel() != feature.numel() or self._changed(key):
            return None
        return key

    def _drop(self, key: Key) -> None:
        del self._facts[key], self._versions[key]
        for numbers in self._numbers.values():
            numbers.pop(key, None)

    def leave_out_scores(self, output: Any) -> None:
        """Leave out the layer that returns the network's class scores or embedding, which terms on outputs compare.

        Args:
            output: The network's output.
        """
        with contextlib.suppress(ValueError):
            picked = select(output, None, "the output")
            *others, last = self._facts
            scores = picked.ndim == 2 or "logits" in entries_of(output)
            # they may be scaled after the layer
            if others and scores and self._facts[last].shape == tuple(picked.shape[1:]):
                self._drop(last)

    def _changed(self, key: Key) -> bool:
        counter, version = self._versions[key]
        return version_of(counter) != version

    def _described(self, key: Key, feature: Tensor, block: bool) -> Layer:
        shape, positions, layout = tuple(feature.shape[1:]), tuple(feature.shape[2:]), None
        if math.prod(positions) == 1:  # pooled
            positions = ()
        elif feature.ndim == 3:
            positions = _grid(feature.shape[1], self._image)
        elif feature.ndim == 4 and self._image is not None:
            first, second, third = shape
            if _in_proportion(first, second, self._image) and not _in_proportion(second, third, self._image):
                positions, layout = (first, second), "channels_last"
        return Layer(key[0], shape, positions, key[1], key[2], layout, block)

    def features(self) -> Features:
        """The numbers of the pass, without features that were changed in place: no term could read them."""
        result = Features(self._size)
        labels = {}
        for key, layer in self._facts.items():
            if not self._changed(key):
                layer = layer if self._calls[key[0]] > 1 else replace(layer, call=None)
                labels[key] = layer.label
                result.layers[layer.label] = layer
        for name, asked in self._asked.items():
            if asked and labels:
                values = [self._numbers[name][key].cpu().double().numpy() for key in labels]
                setattr(result, name, dict(zip(labels.values(), values, strict=True)))
        return result


def _tensors(output: Any) -> Iterator[tuple[int | str | None, Tensor]]:
    """The tensors in the output of a layer that a tap can read."""
    try:
        yield None, select(output, None, "the output", first=True)
    except ValueError:
        for entry, value in entries_of(output).items():
            if isinstance(value, Tensor) and isinstance(entry, (int, str)):
                yield entry, value


def _counter(feature: Tensor) -> tuple[Tensor, int]:
    """A tensor without memory that counts the in-place changes of a feature, and the present count."""
    counter = feature.detach()
    counter.data = feature.new_empty(0)  # drops the memory, but not the counter, which the two share
    return counter, version_of(counter)


def _in_proportion(height: int, width: int, image: tuple[int, int]) -> bool:
    return abs(height * image[1] - width * image[0]) < max(image)


def _grid(tokens: int, image: tuple[int, int] | None) -> tuple[int, ...]:
    """Height and width of the patches among the tokens of an image, or the number of tokens."""
    if image is not None:
        with contextlib.suppress(ValueError):
            grid = find_grid(tokens, image, None, "a feature")
            return (grid.height, grid.width)
    return (tokens,)


def gram(feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """The Gram matrix of a feature's examples, each a vector of all its values.

    The mean over the examples is subtracted first, which does not change the similarity but keeps its digits. A feature
    that is the same for all examples has a matrix of zeros.

    Args:
        feature: Shape ``(n, ...)``.
        mask: The tokens that count, shape ``(n, L)``; read for features ``(n, L, D)``. A token's mean is taken over
            the examples that have it.

    Returns:
        Shape ``(n, n)``, in float32 or float64.

    Example:
        >>> gram(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    with torch.autocast(feature.device.type, enabled=False):
        wide = feature.float() if feature.dtype.itemsize < 4 else feature
        if mask is not None and wide.ndim == 3 and wide.shape[:2] == mask.shape:
            counts = mask.to(wide.device, torch.bool)[:, :, None]
            wide = wide.masked_fill(~counts, 0.0)
            mean = wide.sum(0) / counts.sum(0).clamp(min=1)
            centred = (wide - mean).masked_fill(~counts, 0.0).flatten(1)
        else:
            flat = wide.reshape(len(wide), -1)
            mean = flat.mean(0)
            centred = flat - mean
        product = centred @ centred.T
        constant = product.trace() <= _CONSTANT * len(wide) * mean.square().sum()
        return torch.where(constant, torch.zeros_like(product), product)


def fingerprints(feature: Tensor) -> Tensor:
    """A number for each example that tells other features apart, shape ``(n,)``.

    It is a projection on fixed directions, divided by the length of the feature.

    Args:
        feature: Shape ``(n, ...)``.
    """
    with torch.autocast(feature.device.type, enabled=False):
        wide = feature.float() if feature.dtype.itemsize < 4 else feature
        flat = wide.reshape(len(wide), -1)
        places = torch.arange(flat.shape[1], device=flat.device, dtype=flat.dtype)
        numbers: Tensor = flat @ torch.cos(1.7 * places) / torch.linalg.vector_norm(flat, dim=1).clamp(min=1e-30)
        return numbers
