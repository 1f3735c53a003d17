"""The parts of a distiller that the launcher's loop reaches into, all in one place."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from lightning_distill.distiller import Distiller
from lightning_distill.outputs import first_tensor
from lightning_distill.taps import Call, find_layer


class LastCall(list[Call]):
    """The student's last call alone: a graph is held for one call, however often the student is called."""

    def __init__(self) -> None:
        super().__init__()
        self._earlier: list[weakref.ref[Tensor]] = []

    def append(self, call: Call) -> None:
        """Take a call in place of the last one, of which a weak reference to the output stays."""
        for last in self:
            tensor = _tensor_of(last.output)
            self._earlier = [ref for ref in self._earlier if ref() is not None]
            self._earlier += [] if tensor is None else [weakref.ref(tensor)]
        self[:] = [call]

    def clear(self) -> None:
        """Forget every call."""
        super().clear()
        self._earlier.clear()

    def replaced(self, output: Any) -> bool:
        """Whether an output is that of an earlier call, which is not kept."""
        tensor = _tensor_of(output)
        return tensor is not None and any(ref() is tensor for ref in self._earlier)


def _tensor_of(output: Any) -> Tensor | None:
    try:
        return first_tensor(output)
    except ValueError:  # it holds none
        return None


def has_layer(model: nn.Module, layer: str) -> bool:
    """Whether a model has a layer of a name."""
    return find_layer(model, layer) is not None


def keep_last_call(distiller: Distiller) -> LastCall:
    """Let a recording distiller keep the student's last call alone."""
    recorder: Any = distiller._recorder
    recorder.calls = LastCall()
    calls: LastCall = recorder.calls
    return calls


def given_call(output: Any, features: dict[str, Any], read_logits: Any) -> Call:
    """A call of the teacher that was made elsewhere."""
    call = Call((), {}, output=output, who="teacher", read_logits=read_logits)
    call._runs.update({(layer, "output"): [(feature, [])] for layer, feature in features.items()})
    return call


def total_of(distiller: Distiller, calls: LastCall, call: Call, output: Any, student_loss: Tensor) -> Tensor:
    """The total loss of one call, which returned an output, or from which the loop made it."""
    call.output, call._output_versions = output, []
    calls[:] = [call]
    return distiller.total(student_loss)
