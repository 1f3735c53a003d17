"""The parameters of the terms in a run: adapters, and the parameters of learned losses."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill.adapters.follower import Follower, OptimizerCallable, bare
from lightning_distill.adapters.memories import exchange
from lightning_distill.adapters.shapes import Learner, Shapes, calls_of, describe
from lightning_distill.losses.memories import RememberingLoss
from lightning_distill.processes import world_size
from lightning_distill.recording import Call


class LearnedParts:
    """The trained parts of the terms, from the first call to the checkpoint, the same in all processes.

    Making them is local: the shapes are equal in all processes and so is the seed. A part is made when its term first
    has work to do. This may happen at different steps in different processes, because of a weight of 0 or a batch
    without targets. The processes agree at the student's next optimizer step: a process that lacks a part makes it from
    the shapes.

    Args:
        terms: The terms, owned by the callback, module or distiller that trains these parts.
        factory: Makes their optimizer; ``None`` clones the student's.

    Attributes:
        allowed: Whether there may be such parts at all.
        awaits_leader: If True, a missing optimizer is not an error yet: one may still step.
        seed: Seed of the first values; ``None`` takes the seed of torch's generator.
    """

    def __init__(self, terms: Sequence[Learner], factory: OptimizerCallable | None = None) -> None:
        self.terms, self.factory = terms, factory
        self.allowed, self.awaits_leader = True, False
        self.seed: int | None = None
        self._follower: Follower | None = None
        self._leader: Optimizer | None = None
        self._scaler: torch.amp.GradScaler | None = None
        self._handed_over = False
        self._start()

    def _start(self) -> None:
        self._unmade = {term.name for term in self.terms if term.makes_parts}  # not made in this process
        shared = {term.name for term in self.terms if trained_by(term) or remembering(term)}
        self._open = self._unmade | shared  # not agreed on by all
        self._shapes: dict[str, Shapes] = {}
        self._saved: dict[str, Any] = {}  # waits for the calls that show device and shapes

    # Making them -----------------------------------------------------------------------------------------------------

    def build(self, active: Sequence[Learner], student: Call, teachers: Sequence[Call]) -> None:
        """Make the parts of the active terms that are not made yet.

        Args:
            active: The terms that have work to do.
            student: A recorded call of the student.
            teachers: The answer of each teacher to it.

        Raises:
            ValueError: If saved values do not fit, or the strategy allows no such parts.
        """
        if not self._unmade or not any(term.name in self._unmade for term in active):
            return
        for term in active:
            if term.name in self._unmade:
                read = teachers if term.needs_teacher else teachers[:1]  # which stands for all, or for none
                self._shapes[term.name] = describe(term, student, read)
                self._make(term, student, read)
        self._train()

    def _make(self, term: Learner, student: Call, teachers: Sequence[Call]) -> None:
        index = next(position for position, other in enumerate(self.terms) if other is term)
        seed = torch.initial_seed() if self.seed is None else self.seed
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            # the seed is read, not drawn: the global random state stays as it is
            torch.default_generator.manual_seed((seed + index) % 2**63)
            term.remake(term.build, student, teachers)
        self._unmade.discard(term.name)
        self._collect()
        if not self.allowed and (trained := trained_by(term)):
            raise ValueError(
                "Expected terms without adapters under DeepSpeed, whose engine only trains the module's own parameters,"
                f" but got {len(trained)} adapter parameters. Distil logits only, or use DDP or FSDP2."
            )
        saved = self._saved.get("adapters", {})
        known = (self._saved.get("optimizer") or {}).get("terms", saved)
        if term.name in saved or (saved and term.name not in known and trained_by(term)):
            _restore(term, saved.get(term.name, {}))

    def meet(self, device: torch.device) -> None:
        """Agree on the parts that exist, and exchange what they remember; called by all processes at the same place.

        Args:
            device: Device of the student's parameters.
        """
        self.agree(device)
        exchange([loss for term in self._agreed() for loss in remembering(term)], device)

    def _collect(self) -> None:
        """Let the losses that remember examples wait for the other processes, if there are any."""
        for term in self.terms:
            for loss in remembering(term):
                loss.collect(world_size() > 1)

    def agree(self, device: torch.device) -> None:
        """Make the parts that any process has made in every process; called by all of them at the same place.

        A small reduction each time, until all parts exist everywhere.

        Raises:
            ValueError: If the shapes differ between processes; in all of them.
        """
        if not self._open:
            return
        candidates = [term for term in self.terms if term.name in self._open]
        marks = torch.tensor([self._marks(term) for term in candidates], device=device)
        torch.distributed.all_reduce(marks, torch.distributed.ReduceOp.MAX)
        fresh, lacking = [], False
        for term, (made, unmade, largest, smallest) in zip(candidates, marks.tolist(), strict=True):
            if not made:
                continue
            if largest != -smallest:
                raise ValueError(
                    f"Expected the adapters of term {term.name!r} to have the same shapes in all processes, but got"
                    f" different ones, here {_sizes(term)}. Build the same networks in all processes."
                )
            fresh.append(term)
            lacking = lacking or bool(unmade)
        if lacking:
            known: list[Any] = [None] * world_size()
            torch.distributed.all_gather_object(known, self._shapes)
            for term in fresh:
                if not self.made(term):
                    self._shapes[term.name] = next(shapes[term.name] for shapes in known if term.name in shapes)
                    self._make(term, *calls_of(term, self._shapes[term.name], device))
        if not fresh:
            return
        for term in fresh:  # a factory may draw values from another generator in each process
            for tensor in term.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        self._open -= {term.name for term in fresh}
        self._train()

    def _marks(self, term: Learner) -> tuple[int, int, int, int]:
        """Four numbers that compare a term's parts over all processes: made, not made, and a digest of shapes twice.

        The maxima over all processes show whether any process has the parts, whether any lacks them, and whether the
        shapes are equal: the maxima of a digest and of its negative then add up to 0.
        """
        if not self.made(term):
            return 0, 1, -(2**32), -(2**32)
        shapes = zlib.crc32(repr(_sizes(term)).encode())
        return 1, 0, shapes, -shapes

    # Training them ---------------------------------------------------------------------------------------------------

    @property
    def leader(self) -> Optimizer | None:
        """The optimizer that the parts' own follows, without its wrapper."""
        return None if self._leader is None else bare(self._leader)

    @property
    def follower(self) -> Follower | None:
        """The optimizer of the parts; ``None`` without a leader."""
        return self._follower

    @property
    def leaderless(self) -> bool:
        """Whether no optimizer trains the parts: neither a followed one nor the user's."""
        return self._leader is None and not self._handed_over

    def check_trained(self) -> None:
        """Raise if no optimizer trains the parts that were made in an earlier step.

        Raises:
            ValueError: If so; they would keep their first values. Also if the processes would not meet.
        """
        if self._leader is None and not self._handed_over and not self.awaits_leader and self._trained():
            raise ValueError(
                "Expected an optimizer for the adapters, but got none. In a loop of your own call"
                " distiller.follow(optimizer), or pass distiller.parameters() to the student's optimizer. Under a"
                " Trainer one of its optimizers must hold the student's parameters."
            )
        if world_size() == 1:
            return
        modules = (module for term in self.terms for module in term.modules())
        losses = [type(module).__name__ for module in modules if isinstance(module, RememberingLoss)]
        if losses and self._leader is None and not self.awaits_leader:
            raise ValueError(
                f"Expected an optimizer to follow, since {losses[0]} remembers the examples of all processes, which"
                " exchange them at the optimizer's step, but got none. Call distiller.follow(optimizer)."
            )
        self._collect()

    def begin(self, student: nn.Module) -> None:
        """Before a loss is made: check that an optimizer trains the parts, and drop gradients of a step not taken.

        Args:
            student: The student.
        """
        self.check_trained()
        if self._follower is not None:
            self._follower.begin(student)

    def hand_over(self) -> list[nn.Parameter]:
        """The parameters, for a user's own optimizer.

        Raises:
            ValueError: If a term reads layers whose shapes are unknown before the first batch.
        """
        if any(term.student_taps or trained_by(term) for term in self.terms if term.name in self._unmade):
            raise ValueError(
                "Expected `total` to be called before `parameters`, since adapters take their shapes from the first"
                " batch, but it was not. Call it first, or use distiller.follow(optimizer), which needs no batch."
            )
        self._handed_over = True
        return self._trained()

    def follow(self, leader: Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        """Step with this optimizer from now on."""
        self.unfollow()
        self._leader, self._scaler = leader, scaler
        if any(term.makes_parts or trained_by(term) or remembering(term) for term in self.terms):
            self._follower = Follower(self.meet, leader, self.factory, scaler)
            self._train()

    def unfollow(self) -> None:
        """Stop following the leader; the optimizer's state is kept for the next one."""
        if self._follower is not None:
            kept = {key: value for key, value in self.state_dict().items() if key != "adapters"}
            self._follower.close()
            self._follower = None
            self._saved = {**self._saved, **kept}
        self._leader = None

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """A context with the parts in eval mode, as the student is in validation; everywhere else they train."""
        modes = [(module, module.training) for term in self.terms for module in term.modules()]
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def made(self, term: Learner) -> bool:
        """Whether a term's parts exist, so that it can be called."""
        return term.name not in self._unmade

    def waits(self, term: Learner) -> bool:
        """Whether a term's saved values wait for the parts to be made."""
        return term.name in self._unmade and term.name in self._saved.get("adapters", {})

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for term in self._agreed() for parameter in trained_by(term)]

    def _agreed(self) -> list[Learner]:
        missing = self._open if world_size() > 1 else self._unmade
        return [term for term in self.terms if term.name not in missing]

    def _train(self) -> None:
        """Give the follower's optimizer the parts that exist now, with the state that they have."""
        follower = self._follower
        parameters = self._trained()
        if follower is None or not parameters or len(parameters) == len(follower._parameters):
            return
        saved = self._saved_states()
        state = []
        for term in self._agreed():
            entries = saved.get(term.name, [])
            for index, parameter in enumerate(trained_by(term)):
                state.append(follower.state_of(parameter) or (entries[index] if index < len(entries) else {}))
        groups = (self._saved.get("optimizer") or {}).get("param_groups", [])
        follower.adopt(parameters, state, follower.groups() or groups)

    # Saving them -----------------------------------------------------------------------------------------------------

    def _saved_states(self) -> dict[str, list[dict[str, Any]]]:
        """The saved state of the optimizer for the parameters of each term."""
        saved: dict[str, Any] = self._saved.get("optimizer") or {}
        state, start, states = saved.get("state", {}), 0, {}
        for name, size in saved.get("terms", {}).items():
            states[name] = [state.get(index, {}) for index in range(start, start + size)]
            start += size
        return states

    def state_dict(self) -> dict[str, Any]:
        """The values by term and their optimizer's state; empty if nothing is learned.

        ``optimizer`` has the form of ``torch.optim.Optimizer.state_dict``, and the number of parameters of each term.
        """
        waiting = self._saved.get("adapters", {})
        made = [term for term in self.terms if term.name not in self._unmade]
        adapters = {**waiting, **{term.name: values for term in made if (values := dict(term.state_dict()))}}
        if not adapters:
            return {}
        follower, saved = self._follower, self._saved_states()
        trained = {term.name for term in self._agreed()} if follower and follower.optimizer else set()
        states: dict[str, list[dict[str, Any]]] = {}
        for term in self.terms:
            fresh: list[dict[str, Any]] = [{} for _ in trained_by(term)]
            states[term.name] = saved.get(term.name) or fresh
            if term.name in trained and follower is not None:
                states[term.name] = [follower.state_of(parameter) for parameter in trained_by(term)]
        entries = [entry for term in self.terms for entry in states[term.name]]
        groups = (follower.groups() if follower else []) or (self._saved.get("optimizer") or {}).get("param_groups", [])
        optimizer = {
            "state": {index: entry for index, entry in enumerate(entries) if entry},
            "param_groups": [{**group, "params": list(range(len(entries)))} for group in groups[:1]],
            "terms": {name: len(each) for name, each in states.items()},
        }
        return {"adapters": adapters, "optimizer": optimizer if groups else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start over, from saved values or, if the state is empty, from fresh ones."""
        saved = state.get("adapters") or {}
        if self._follower is not None:
            self._follower.close()
            self._follower = None
        leader = self._leader
        for term in self.terms:
            term.remake(term.reset)
        self._start()
        self._handed_over = False
        self._saved = {key: value for key, value in state.items() if value}
        for term in self.terms:
            if term.name in saved and term.name not in self._unmade:  # parts of a user's own term, made by itself
                _restore(term, saved[term.name])
        self._leader = None
        if leader is not None:
            self.follow(leader, self._scaler)


def trained_by(term: Learner) -> list[nn.Parameter]:
    """The parameters of a term that are trained."""
    return [parameter for parameter in term.parameters() if parameter.requires_grad]


def remembering(term: Learner) -> list[RememberingLoss]:
    """The losses of a term that remember examples, once they are built."""
    losses = (module for module in term.modules() if isinstance(module, RememberingLoss))
    return [loss for loss in losses if any(True for _ in loss.buffers())]


def _sizes(term: Learner) -> dict[str, list[int]]:
    return {name: list(values.shape) for name, values in term.state_dict().items()}


def _restore(term: Learner, values: dict[str, Tensor]) -> None:
    try:
        term.load_state_dict(values)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"Expected the saved adapters to fit term {term.name!r}, but got {reason}. Resume with the terms that"
            " were saved, or start from the student's weights alone."
        ) from None
