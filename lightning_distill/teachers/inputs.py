"""The teacher's inputs: the student's, or others that the user names, and the arguments that terms ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_distill.recording import Call
from lightning_distill.recording.batches import as_arguments
from lightning_distill.recording.calls import inputs_of

Place = str | int | Callable[[Any], Any] | None


class TeacherInputs:
    """Makes the call that a teacher gets from a call of the student.

    Args:
        place: ``None`` for the student's inputs; a function from the student's inputs (its only argument, the tuple of
            its arguments, or the dict of its keyword arguments) to the teacher's, in the same forms; or the key or
            index of the teacher's inputs in the batch.
        arguments: Keyword arguments for every network whose forward has a parameter of that name.

    Raises:
        TypeError: If ``place`` is neither a function, a key nor an index.
    """

    def __init__(self, place: Place, arguments: Mapping[str, Any]) -> None:
        if place is not None and not callable(place) and (isinstance(place, bool) or not isinstance(place, (str, int))):
            raise TypeError(
                f"Expected `teacher_inputs` to be a function, a key or an index, but got teacher_inputs={place!r}."
            )
        self.place, self._arguments = place, dict(arguments)
        self._accepted: dict[str, Any] = {}

    def look_at(self, networks: Iterable[nn.Module]) -> None:
        """Find the arguments that all networks take."""
        names = [_parameters(network) for network in networks]
        self._accepted = {key: value for key, value in self._arguments.items() if all(key in each for each in names)}

    def of(self, call: Call) -> Call:
        """The student's call, as the teacher gets it.

        Raises:
            ValueError: If the batch has no entry at ``place``.
        """
        if self.place is not None:
            args, kwargs = as_arguments(self._other(call))
            call = replace(call, args=args, kwargs=kwargs)
        return replace(call, kwargs={**call.kwargs, **self._accepted}) if self._accepted else call

    def _other(self, call: Call) -> Any:
        if callable(self.place):
            return self.place(inputs_of(call.args, call.kwargs))
        batch: Any = call.batch
        place: Any = self.place
        try:
            return batch[place] if isinstance(batch, (Mapping, tuple, list)) else getattr(batch, str(place))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(
                f"Expected `teacher_inputs` to say where a batch keeps the teacher's inputs, but got"
                f" teacher_inputs={place!r} and a batch of {type(batch).__name__}. Pass a key or an index that each"
                " batch has, or a function of the student's inputs."
            ) from None


def _parameters(network: nn.Module) -> set[str]:
    try:
        return set(inspect.signature(network.forward).parameters)
    except (TypeError, ValueError):  # a TorchScript program
        return set()
