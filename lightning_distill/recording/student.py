"""The search for the student inside a LightningModule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_distill.checks import closest
from lightning_distill.recording.calls import Call, Tap
from lightning_distill.recording.recorder import LayerPath, Recorder, Recording, find_layer


class StudentFinder:
    """Finds the network that a training step calls, and records it.

    The student is the module itself where its forward is called; else the one child with trainable parameters and all
    the tapped layers that is called. A path names it; several paths name networks that are called one after the other,
    as in ``self.head(self.backbone(x))``: together they are the student. It may be replaced: a network that is put at
    its path is the student from then on. One that was found at several paths is then looked for again.

    Args:
        module: The LightningModule.
        taps: Layers to read, named from the module (``"model.layer3"``) or from the student (``"layer3"``).
        student: Path of the student, paths of its parts, or ``None`` to find it.

    """

    def __init__(self, module: nn.Module, taps: Sequence[Tap], student: str | Sequence[str] | None = None) -> None:
        self._module, self._taps, self._student = module, taps, student
        self._recorders: dict[str, Recorder] | None = None
        self._student_recorder: Recorder | None = None
        self._places: list[str] = []  # paths of the student that was found, or of its parts
        self._paths: list[LayerPath] = []

    @property
    def named(self) -> bool:
        """Whether the user has named the student."""
        return self._student is not None

    @property
    def in_parts(self) -> bool:
        """Whether the student consists of several networks that are called one after the other."""
        return not (self._student is None or isinstance(self._student, str) or len(self._student) == 1)

    @property
    def is_known(self) -> bool:
        """Whether the student is known: named, or seen in a step."""
        return self.named or self._student_recorder is not None

    def _named(self) -> Recorder:
        paths = [self._student] if isinstance(self._student, str) else list(self._student or [])
        modules = []
        for path in paths:
            network = find_layer(self._module, path)
            if network is None:
                names = [name for name, _ in self._module.named_modules() if name]
                raise ValueError(
                    f"Expected `student` to name a module of the LightningModule, but got student={path!r}."
                    f" {closest(path, names)}"
                )
            modules.append(network)
        if not modules:
            raise ValueError("Expected `student` to name a module, but got an empty sequence. Pass None to find it.")
        if len(modules) == 1:
            return Recorder(modules[0], self._taps, prefix=f"{paths[0]}." if paths[0] else "")
        return Recorder(self._module, self._taps, first=modules[0], last=modules[-1])

    def check(self, terms: Iterable[tuple[str, Tap]]) -> None:
        """Raise if no candidate has the tapped layers.

        Raises:
            ValueError: With the closest names.
        """
        candidates = list(self._candidates().values())
        min(candidates, key=lambda recorder: len(recorder.unknown())).check(terms)

    def _candidates(self) -> dict[str, Recorder]:
        if self._student is not None:
            return {"": self._named()}
        recorders = {"": Recorder(self._module, self._taps)}
        for name, child in _trained(self._module):
            recorders[name] = Recorder(child, self._taps, prefix=f"{name}.")
        return recorders

    @property
    def root(self) -> nn.Module:
        """The student if it is named or found already, else the whole module."""
        if self._student_recorder is None and self._student is not None:
            return self._named().root
        return self._module if self._student_recorder is None else self._student_recorder.root

    def recording(self, needs_grad: bool, features: bool, arguments: Mapping[str, Any] | None = None) -> Recording:
        """A context that records the student, or every candidate until a step has shown which one it is.

        Args:
            needs_grad: Whether to leave out calls made with gradients disabled.
            features: Whether to keep the features at the tapped layers.
            arguments: Keyword arguments to add to each recorded call.
        """
        if not all(path.holds for path in self._paths):  # the user has put another network into a place of it
            self._replaced()
        if self._student_recorder is None and self._student is not None:
            # not earlier: a hook of the module may build the student
            self._follow(self._named(), [self._student] if isinstance(self._student, str) else [*self._student])
        if self._student_recorder is not None:
            return Recording([self._student_recorder], needs_grad, features, arguments)
        if self._recorders is None:
            known = {name: recorder for name, recorder in self._candidates().items() if not recorder.unknown()}
            first = {id(recorder.root): name for name, recorder in reversed(known.items())}
            self._recorders = {name: known[name] for name in known if first[id(known[name].root)] == name}
        return Recording(list(self._recorders.values()), needs_grad, features, arguments)

    def find(self) -> list[Call]:
        """Find the student among the candidates that were called, and return its recorded calls.

        Raises:
            ValueError: If several children were called.
        """
        if self._student_recorder is None:
            called = {name: recorder for name, recorder in (self._recorders or {}).items() if recorder.calls}
            if "" in called:
                called = {"": called[""]}
            if len(called) > 1:
                raise ValueError(
                    "Expected one student to be called in `training_step`, but several modules were:"
                    f" {', '.join(map(repr, called))}. Pass student=<one of them>, or student={[*called]} if they are"
                    " called one after the other and are the student together."
                )
            for place, recorder in called.items():
                for other in (self._recorders or {}).values():
                    if other is not recorder:
                        other.close()
                        other.clear()  # it has recorded the student's calls, or calls inside them
                networks = _trained(self._module)
                self._follow(recorder, [place, *(path for path, other in networks if other is recorder.root)])
                self._recorders = None
        return [] if self._student_recorder is None else self._student_recorder.calls

    def _follow(self, recorder: Recorder, places: Sequence[str]) -> None:
        """Record this student from now on."""
        self._student_recorder, self._places = recorder, [*dict.fromkeys(places)]
        self._paths = [LayerPath(self._module, place) for place in self._places if place]

    def _replaced(self) -> None:
        """Record the network that is at the student's place now, or look for it if there were several places."""
        self.close()
        self._student_recorder, self._paths = None, []
        networks = {place: find_layer(self._module, place) for place in self._places}
        for place, network in networks.items():
            if network is None:
                raise ValueError(
                    f"Expected the student {place!r} to stay in the module, but it was removed. Keep it there."
                )
            if not self.named and len(networks) == 1:
                self._follow(Recorder(network, self._taps, prefix=f"{place}."), [place])

    def _recording(self) -> list[Recorder]:
        return [self._student_recorder] if self._student_recorder else list((self._recorders or {}).values())

    def layer(self, name: str) -> nn.Module:
        """The module of that name below the student.

        Raises:
            ValueError: If it has no such layer.
        """
        recorders = self._recording() or list(self._candidates().values())
        module = next((module for recorder in recorders if (module := recorder.find(name)) is not None), None)
        if module is None:
            raise ValueError(f"Expected the student to have a layer {name!r}, but it does not.")
        return module

    def open_call(self) -> Call | None:
        """The call of the student that is under way, of the outermost network that may be the student."""
        return next((recorder.open[0] for recorder in self._recording() if recorder.open), None)

    def keep_random_state(self, keep: bool) -> None:
        """Let calls keep the state of the generators, so that :meth:`rerun` can make them again."""
        for recorder in self._recording():
            recorder.keeps_random_state = keep

    def rerun(self, call: Call) -> Call:
        """Make a recorded call once more; see :meth:`Recorder.rerun`."""
        return next(recorder for recorder in self._recording() if call in recorder.calls).rerun(call)

    def keep(self, calls: list[Call]) -> None:
        """Keep the calls of a named student in this list, which may drop some. Call it after recording."""
        if self._student_recorder is not None:
            self._student_recorder.calls = calls

    def never_called(self) -> str:
        """The error message where no call was recorded."""
        if self._student is not None:
            place = f"the student {self._student!r}"
        else:
            place = "the LightningModule or one child that has the tapped layers"
        return (
            f"Expected {place} to be called with gradients in `training_step`, but it was not. Call it as a module,"
            " self.model(x) and not self.model.forward(x), or name the submodule that is called: student=<its path>."
            " Networks that are called one after the other are named together: student=['backbone', 'head']."
        )

    def close(self) -> None:
        """Leave nothing on the networks' layers."""
        for recorder in self._recording():
            recorder.close()

    def clear(self) -> None:
        """Release what was recorded."""
        for recorder in self._recording():
            recorder.clear()


def possible_students(module: nn.Module) -> dict[str, nn.Module]:
    """The children with trainable parameters: losses, metrics and frozen networks are called too, but not trained.

    Args:
        module: The LightningModule.

    Returns:
        The children by path, each under the first of its paths.
    """
    paths = {id(child): path for path, child in reversed([*_trained(module)])}
    return {path: child for path, child in _trained(module) if paths[id(child)] == path}


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children with trainable parameters, under each of their paths."""
    for name, child in _children(module):
        if any(parameter.requires_grad for parameter in child.parameters()):
            yield name, child


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in _entries(module):
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # containers are never called themselves
            yield from ((f"{name}.{key}", inner) for key, inner in _entries(child))
        else:
            yield name, child


def _entries(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children by name; ``named_children`` leaves out the second name of a child."""
    entries: dict[str, nn.Module | None] = module._modules
    return ((name, child) for name, child in entries.items() if child is not None)
