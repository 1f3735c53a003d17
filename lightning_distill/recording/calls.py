"""Taps, the places that features are read from, and calls, the recorded forward passes that they are read in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill import checks
from lightning_distill.compat import version_of
from lightning_distill.recording.outputs import entries_of, entry_at, map_tensors, select, tensors_in
from lightning_distill.recording.predictions import check_scores

Versions = list[tuple[Tensor, int]]


@dataclass(frozen=True)
class Tap:
    """A place in a network that a feature is read from.

    Args:
        layer: Dotted path of the layer below the student or the teacher, such as ``"layer3.0"``; ``""`` is the whole
            network.
        output: Which part of the layer's output: an index of a tuple or list, a key of a dict or a field of a
            dataclass, a tuple of these for nested outputs, or a callable that picks a tensor. ``None`` takes the
            obvious tensor and refuses to guess. ``"*"``, or a tuple that ends with it, stands for every tensor of a
            dict, list or tuple, such as the levels of a feature pyramid.
        call: Which call of the layer, from 0, where one forward pass runs it several times.
        where: ``"output"`` reads the layer's output, ``"input"`` its input.
        layout: ``"channels_last"`` for maps ``(N, H, W, C)``, as some Swin transformers have inside; they are read as
            ``(N, C, H, W)``. ``None`` leaves the axes as they are.
        prefix_tokens: Number of class and register tokens at the beginning of tokens ``(N, L, D)``, which are left out.
            ``None`` leaves out none, except where an adapter needs the patches alone and finds their number.

    Raises:
        TypeError: If ``layer`` is not a string, or ``prefix_tokens`` not an int.
        ValueError: If ``where`` or ``layout`` is not one of those above, or ``call`` or ``prefix_tokens`` is negative.

    Example:
        >>> Tap("encoder.layer.3", output=0)
        Tap(layer='encoder.layer.3', output=0, call=None, where='output', layout=None, prefix_tokens=None)
    """

    layer: str
    output: int | str | tuple[int | str, ...] | Callable[[Any], Tensor] | None = None
    call: int | None = None
    where: Literal["output", "input"] = "output"
    layout: Literal["channels_last", "channels_first"] | None = None
    prefix_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str):
            raise TypeError(f"Expected `layer` to be a string, but got layer={self.layer!r}. Pass the layer's path.")
        if self.where not in ("output", "input"):
            raise ValueError(f"Expected `where` to be 'output' or 'input', but got where={self.where!r}.")
        if self.call is not None and self.call < 0:
            raise ValueError(f"Expected `call` to be 0 or greater, but got call={self.call}.")
        if self.layout is not None:
            checks.one_of("layout", self.layout, ("channels_last", "channels_first"))
        if self.prefix_tokens is not None:
            checks.integer("prefix_tokens", self.prefix_tokens)
            checks.non_negative("prefix_tokens", self.prefix_tokens)

    def arranged(self, feature: Tensor, place: str) -> Tensor:
        """The feature with the channels of a map in dimension 1, and without its prefix tokens.

        Args:
            feature: The feature as the layer returned it.
            place: The layer, for messages.

        Raises:
            ValueError: If it has another number of dimensions, or fewer tokens.
        """
        if self.layout is not None and feature.ndim < 4:
            remedy = "Leave out `layout`."
            got = f"shape {tuple(feature.shape)}"
            raise ValueError(checks.message(f"{place} to return a map for layout={self.layout!r}", got, remedy))
        if self.layout == "channels_last":
            feature = feature.movedim(-1, 1)
        if self.prefix_tokens is None:
            return feature
        if feature.ndim != 3 or feature.shape[1] <= self.prefix_tokens:
            expected = f"{place} to return more than {self.prefix_tokens} tokens, shape (N, L, D)"
            raise ValueError(checks.message(expected, f"shape {tuple(feature.shape)}", "Correct `prefix_tokens`."))
        return feature[:, self.prefix_tokens :]

    @property
    def spreads(self) -> bool:
        """Whether the tap stands for every tensor of a dict, list or tuple."""
        return (self.output[-1:] if isinstance(self.output, tuple) else (self.output,)) == ("*",)

    @classmethod
    def of(cls, layer: str | Tap) -> Tap:
        """The tap itself, or a tap on the output of the layer of that name."""
        return layer if isinstance(layer, Tap) else cls(layer)


def snapshot(value: Any, copy: bool) -> tuple[Any, Versions]:
    """A value with the versions of its tensors, which tell later whether one of them was changed in place.

    Args:
        value: The arguments or the output of a network.
        copy: Whether to copy the tensors, because their versions do not show changes.
    """
    # A compiled graph turns in-place changes into new tensors, so versions do not show them: take a copy, which the
    # compiler fuses. Inference tensors have no versions either.
    if copy or torch.compiler.is_compiling():
        return map_tensors(value, torch.clone), []
    if isinstance(value, Tensor) and not value.is_inference():  # the most common case
        return value, [(value, version_of(value))]
    return value, [(tensor, version_of(tensor)) for tensor in tensors_in(value) if not tensor.is_inference()]


def changed(versions: Versions, picked: Tensor | None = None) -> bool:
    """Whether a tensor was changed in place since its version was noted.

    Args:
        versions: The tensors and their versions.
        picked: The tensor that is read. If it is one of them, the others may change.
    """
    if picked is not None:
        for tensor, version in versions:
            if tensor is picked:
                return version_of(tensor) != version
    for tensor, version in versions:  # noqa: SIM110 - a generator would cost more than the loop
        if version_of(tensor) != version:
            return True
    return False


@dataclass(eq=False)
class Call:
    """One recorded forward pass of a network.

    Attributes:
        args: Positional arguments that the network was called with.
        kwargs: Keyword arguments that it was called with.
        output: Its output.
        who: ``"student"`` or ``"teacher"``, for messages.
        teacher: Which of several teachers answered, from 0.
        data_rows: Where a cached teacher answered: the rows of the examples in its data set.
        rows: Examples of the student's call that the teacher answered for, int64 indices; ``None`` is all of them.
        trains: Whether gradients must flow back into the call, so that reading a tensor without them is an error.
        read_logits: Picks the logits from the output.
        batch: The batch of the step, as the training or validation step received it; ``None`` where it is not known.
        top_k: The likeliest classes, where a cached teacher holds only those.
        held: Where a cached teacher holds sequences: the tokens that it has answers for, a bool tensor ``(B, T)``, by
            ``"output"`` and by layer and side. If it is empty, all positions have answers.
        own_text: Whether the batch is text of the student, whose labels are not a reference.
        label_place: Where the owner of the terms says that a batch keeps its labels.
        counted: For terms on tokens, by name, the number of tokens (or sequences) that count in the call.
        aligned: The teacher's tokens and the shared spans, if a term aligns two tokenizers.
        logged: Values to log beside the terms' losses, or in their place, by name.
        skipped: The call's skipped head and the loss made there, if a term skips heads.
        random_state: State of the generators before the call, if it may have to be made again.
        parameters: Names of the network's parameters, in order.
        network: The network; ``None`` for stored answers.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    who: str = "student"
    teacher: int = 0
    rows: Tensor | None = field(default=None, repr=False)
    data_rows: Any = field(default=None, repr=False)
    trains: bool = False
    read_logits: Callable[[Any], Tensor] | None = None
    batch: Any = field(default=None, repr=False)
    top_k: Any = None
    held: Mapping[Any, Tensor] = field(default_factory=dict, repr=False)
    label_place: Any = None
    own_text: bool = False
    counted: dict[str, Tensor] = field(default_factory=dict, repr=False)
    aligned: Any = field(default=None, repr=False)
    logged: dict[str, Tensor] = field(default_factory=dict, repr=False)
    skipped: Any = field(default=None, repr=False)
    random_state: Any = field(default=None, repr=False)
    parameters: tuple[str, ...] = field(default=(), repr=False)
    network: Any = field(default=None, repr=False)
    input_versions: Versions = field(default_factory=list, repr=False)
    output_versions: Versions = field(default_factory=list, repr=False)
    runs: dict[tuple[str, str], list[tuple[Any, Versions]]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_outputs(
        cls,
        output: Any = None,
        features: Mapping[tuple[str, str], Any] | None = None,
        *,
        who: str = "teacher",
        **attributes: Any,
    ) -> Call:
        """Make a call from known outputs, without recording it.

        Args:
            output: The network's output.
            features: Its layers' features, by layer and side, such as ``{("layer3", "output"): tensor}``.
            who: ``"student"`` or ``"teacher"``.
            **attributes: Further attributes of the call.

        Example:
            >>> Call.from_outputs(features={("body", "output"): torch.ones(2, 3)}).feature(Tap("body")).shape
            torch.Size([2, 3])
        """
        runs: dict[tuple[str, str], list[tuple[Any, Versions]]] = {
            place: [(feature, [])] for place, feature in (features or {}).items()
        }
        return cls((), {}, output=output, who=who, runs=runs, **attributes)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name; positional ones too, if the names of the network's parameters are known."""
        return {**dict(zip(self.parameters, self.args, strict=False)), **self.kwargs}

    @property
    def logits(self) -> Tensor:
        """The logits in the call's output.

        Raises:
            ValueError: If the output was changed in place since, holds no obvious logits, or carries no gradient.
        """
        return self.output_at(None)

    def output_at(self, output: int | str | tuple[int | str, ...] | Callable[[Any], Tensor] | None) -> Tensor:
        """One tensor of the call's output.

        Args:
            output: Which one, as in :class:`Tap`; ``None`` is the logits.

        Raises:
            ValueError: As for :attr:`logits`.
        """
        check_scores(self.output, self.who, self.network)
        if output is None and self.read_logits is not None:
            picked = self.read_logits(self.output)
        else:
            picked = select(self.output, output, f"the {self.who}'s output")
        if changed(self.output_versions, picked):
            raise ValueError(
                f"Expected the {self.who}'s output to stay as it was returned, but it was changed in place since."
                " Compute a new tensor from it."
            )
        return self._with_gradient(picked)

    def _with_gradient(self, tensor: Tensor, layer: str | None = None) -> Tensor:
        if self.trains and not tensor.requires_grad:
            place = "output" if layer is None else f"layer {layer!r}"
            raise ValueError(
                f"Expected the student's {place} to carry a gradient, but it does not: it is frozen, or runs inside"
                " reentrant activation checkpointing. Unfreeze it, pass use_reentrant=False, or tap another layer."
            )
        return tensor

    def levels(self, tap: Tap) -> list[Tap]:
        """The taps that a tap stands for: with ``output="*"`` one for each tensor at its place, else the tap itself.

        Raises:
            ValueError: If the layer did not run once, or there is not a dict, list or tuple of tensors.
        """
        if not tap.spreads:
            return [tap]
        value, place = self.recorded(tap), f"{self.who} layer {tap.layer!r}"
        outer = tap.output[:-1] if isinstance(tap.output, tuple) else ()
        inner = entry_at(value, outer)
        if isinstance(inner, Tensor):  # a pyramid of one level
            return [replace(tap, output=outer or None)]
        entries = entries_of(inner)
        if not entries or not all(isinstance(entry, Tensor) for entry in entries.values()):
            names = f" of {list(entries_of(value))}" if entries_of(value) else ""
            raise ValueError(
                f"Expected the {tap.where} of {place} to hold a dict, list or tuple of tensors for"
                f" output={tap.output!r}, but got {type(value).__name__}{names}. Pass the path to it, such as"
                " output=('feature_maps', '*'), or leave out `output`."
            )
        return [replace(tap, output=(*outer, key) if outer else key) for key in entries]

    def recorded(self, tap: Tap) -> Any:
        """All that a tapped layer returned, or was called with, whatever the tap's ``output`` is.

        Raises:
            ValueError: If the layer did not run, or ran more than once without a call index.
        """
        return self._run(tap)[0]

    def feature(self, tap: Tap) -> Tensor:
        """The tensor that a tap reads.

        Args:
            tap: The place; the recorder must have been made with it.

        Returns:
            The feature, with its graph.

        Raises:
            ValueError: If the layer did not run, ran more than once without a call index, was changed in place after
                it was read, gives no obvious tensor, or carries no gradient where the call needs one.
        """
        value, versions = self._run(tap)
        if tap.output is None and isinstance(value, Tensor) and not changed(versions):  # the most common case
            return self._arranged(self._with_gradient(value, tap.layer), tap)
        place = f"{self.who} layer {tap.layer!r}"
        picked = select(value, tap.output, f"the {tap.where} of {place}", first=tap.layer != "")
        if changed(versions, picked):
            raise ValueError(
                f"Expected {place} to keep the feature that was read from it, but a later layer changed it in place."
                " Tap that later layer, or build it with inplace=False."
            )
        return self._arranged(self._with_gradient(picked, tap.layer or None), tap)

    def _arranged(self, feature: Tensor, tap: Tap) -> Tensor:
        if tap.layout is None and tap.prefix_tokens is None:  # the most common case
            return feature
        return tap.arranged(feature, f"{self.who} layer {tap.layer!r}")

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images ``(N, C, H, W)`` that the network was called with; ``None`` without images."""
        for tensor in tensors_in((self.args, self.kwargs)):
            if tensor.ndim == 4 and tensor.is_floating_point():
                return (tensor.shape[2], tensor.shape[3])
        return None

    def _run(self, tap: Tap) -> tuple[Any, Versions]:
        runs = self.runs.get((tap.layer, tap.where), [])
        if not runs and tap.layer == "":
            whole = self.output if tap.where == "output" else inputs_of(self.args, self.kwargs)
            runs = [(whole, self.input_versions if tap.where == "input" else self.output_versions)]
        if len(runs) == 1 and not tap.call:  # the most common case
            return runs[0]
        place = f"{self.who} layer {tap.layer!r}"
        if not runs:
            raise ValueError(f"Expected {place} to run in the {self.who}'s forward pass, but it did not. Tap another.")
        if tap.call is None:
            raise ValueError(
                f"Expected {place} to run once in a forward pass, but it ran {len(runs)} times."
                f" Pass Tap({tap.layer!r}, call=0) to call={len(runs) - 1}."
            )
        if tap.call >= len(runs):
            raise ValueError(f"Expected `call` to be below {len(runs)}, the runs of {place}, but got call={tap.call}.")
        return runs[tap.call]

    def check_input(self) -> None:
        """Raise if the network's input was changed in place after the call, so that the teacher would get other values.

        Raises:
            ValueError: If the input was changed.
        """
        if changed(self.input_versions):
            raise ValueError(
                f"Expected the {self.who}'s input to stay as it was, but it was changed in place, so the teacher would"
                " get another input than the student. Build the first layer with inplace=False, and make a new tensor"
                " where the training step changes it."
            )


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a layer as one value: its only argument, or the tuple or dict of them."""
    if kwargs and not args:
        return kwargs
    return args[0] if len(args) == 1 else args
