"""The search for the student inside a LightningModule, where the user did not name it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from lightning_distill.taps import Call, Recorder, Tap


class StudentFinder:
    """Recorders on a module and on its children, of which the first step shows which one is the student.

    The student is the module itself where its forward is called; else the one child with trainable parameters and all
    the tapped layers that is called. Offers what a :class:`Recorder` offers.

    Args:
        module: The LightningModule.
        taps: Layers to read, named from the module (``"model.layer3"``) or from the child (``"layer3"``).
    """

    def __init__(self, module: nn.Module, taps: Sequence[Tap]) -> None:
        self._module, self._taps = module, taps
        self._found: Recorder | None = None
        self._candidates: dict[str, Recorder] = {}

    def check(self, terms: Iterable[tuple[str, Tap]]) -> None:
        """Raise if no candidate has the tapped layers.

        Raises:
            ValueError: With the closest names.
        """
        best = min(self._recorders().values(), key=lambda recorder: len(recorder.unknown()))
        best.check(terms)

    def _recorders(self) -> dict[str, Recorder]:
        recorders = {"": Recorder(self._module, self._taps)}
        for name, child in _children(self._module):
            if any(True for _ in child.parameters()):  # losses and metrics are called too, and are no students
                recorders[name] = Recorder(child, self._taps, prefix=f"{name}.")
        return recorders

    @property
    def root(self) -> nn.Module:
        """The student, once it is found; the whole module before."""
        return self._module if self._found is None else self._found.root

    @property
    def calls(self) -> list[Call]:
        """What the student was called with; looking finds the student.

        Raises:
            ValueError: If several children were called.
        """
        if self._found is None:
            called = {name: recorder for name, recorder in self._candidates.items() if recorder.calls}
            if "" in called:
                called = {"": called[""]}
            if len(called) > 1:
                raise ValueError(
                    "Expected one student to be called in `training_step`, but several modules were:"
                    f" {', '.join(map(repr, called))}. Pass student=<one of them>, or call them in one forward."
                )
            for name, recorder in called.items():
                self._found = recorder
                for other in [one for key, one in self._candidates.items() if key != name]:
                    other.detach()
                self._candidates = {}
        return [] if self._found is None else self._found.calls

    @property
    def watched(self) -> list[Recorder]:
        """The recorders to switch on for a step: the student's, or those of all candidates."""
        if self._found is not None:
            return [self._found]
        if not self._candidates:
            self._candidates = {name: one for name, one in self._recorders().items() if not one.unknown()}
        return [*self._candidates.values()]

    def clear(self) -> None:
        """Release what was recorded."""
        for recorder in self.watched:
            recorder.clear()

    def detach(self) -> None:
        """Remove the hooks and forget the student."""
        for recorder in [self._found] if self._found else self._candidates.values():
            recorder.detach()
        self._found, self._candidates = None, {}


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # containers are never called themselves
            yield from ((f"{name}.{key}", inner) for key, inner in child.named_children())
        else:
            yield name, child
