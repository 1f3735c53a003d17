"""The teacher's inputs: the student's, or others that the user names, and the arguments that terms ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_distill.recording import Call
from lightning_distill.recording.arguments import takes, with_arguments
from lightning_distill.recording.batches import as_arguments
from lightning_distill.recording.calls import inputs_of

Place = str | int | Callable[[Any], Any] | None


class TeacherInputs:
    """Makes the call that a teacher gets from a call of the student.

    Args:
        place: ``None`` for the student's inputs; a function from the student's inputs (its only argument, the tuple of
            its arguments, or the dict of its keyword arguments) to the teacher's, in the same forms; or the key or
            index of the teacher's inputs in the batch.
        arguments: Keyword arguments to add where every network takes them.
        makers: Methods of terms that make the teacher's call from the student's and the networks, or return ``None``.
        chosen: Whether the caller of the teacher may change its inputs further, in a method of a user's.

    Raises:
        TypeError: If ``place`` is neither a function, a key nor an index.
    """

    def __init__(
        self,
        place: Place,
        arguments: Mapping[str, Any],
        makers: Sequence[Callable[[Call, Sequence[nn.Module]], Call | None]] = (),
        chosen: bool = False,
    ) -> None:
        if place is not None and not callable(place) and (isinstance(place, bool) or not isinstance(place, (str, int))):
            raise TypeError(
                f"Expected `teacher_inputs` to be a function, a key or an index, but got teacher_inputs={place!r}."
            )
        self.place, self._arguments, self._makers, self.chosen = place, dict(arguments), makers, chosen
        self._accepted: dict[str, Any] = {}
        self._networks: list[nn.Module] = []

    @property
    def differ(self) -> bool:
        """Whether the teacher may get other inputs than the student."""
        return self.place is not None or bool(self._makers) or self.chosen

    def look_at(self, networks: Iterable[nn.Module]) -> None:
        """Find the arguments that all networks take."""
        self._networks = list(networks)
        self._accepted = {
            key: value
            for key, value in self._arguments.items()
            if all(takes(network, key) for network in self._networks)
        }

    def of(self, call: Call) -> Call:
        """The student's call, as the teacher gets it.

        Raises:
            ValueError: If the batch has no entry at ``place``, or several places or terms make the inputs.
        """
        made = [own for own in (make(call, self._networks) for make in self._makers) if own is not None]
        if len(made) + (self.place is not None) > 1 and made:
            raise ValueError(
                "Expected one maker of the teacher's inputs, but got several: terms between two tokenizers, or such a"
                " term and `teacher_inputs`. Leave out `teacher_inputs`, and use one such term."
            )
        if made:
            taken = {
                name: value
                for name, value in made[0].kwargs.items()
                if all(takes(network, name) for network in self._networks)
            }
            call = replace(made[0], kwargs=taken)
        elif self.place is not None:
            args, kwargs = as_arguments(self._other(call))
            call = replace(call, args=args, kwargs=kwargs)
        if not self._accepted:
            return call
        args, kwargs = with_arguments(self._networks[0], call.args, call.kwargs, self._accepted)
        return replace(call, args=args, kwargs=kwargs)

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
