"""What the terms learn: made from a first call, restored, trained, saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill.adapters import FollowerOptimizer, OptimizerCallable, bare, world_size
from lightning_distill.taps import Call
from lightning_distill.terms import DistillationTerm


class AdapterTrainer:
    """What the terms learn: made from a first call, restored, trained by a follower or by the user, saved.

    Args:
        terms: The terms; what an earlier run made in them is dropped.

    Attributes:
        follower: The adapters' own optimizer, once there are adapters and a leader.
        factory: Makes the adapters' optimizer; ``None`` clones the leader.
        allowed: Whether there may be adapters at all.
        awaits_leader: Whether an optimizer to follow may still come, so that there is none yet is no error.
    """

    def __init__(self, terms: Sequence[DistillationTerm]) -> None:
        self.terms = terms
        self.follower: FollowerOptimizer | None = None
        self._leader: Optimizer | None = None
        self.factory: OptimizerCallable | None = None
        self.allowed, self.awaits_leader = True, False
        self._scaler: torch.amp.GradScaler | None = None
        self._built = self._learns = self._handed_over = False
        # what was loaded and waits for the first batch
        self._saved_adapters: dict[str, Any] | None = None
        self._saved_optimizer: dict[str, Any] | None = None
        for term in terms:
            term.reset()

    @property
    def leaderless(self) -> bool:
        """Whether neither an optimizer to follow nor one of the user's own is known."""
        return self._leader is None and not self._handed_over

    @property
    def leader(self) -> Optimizer | None:
        """The optimizer that the adapters' follows, without its wrapper."""
        return None if self._leader is None else bare(self._leader)

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make the adapters of all terms, restore them, and give them their optimizer; further calls do nothing."""
        if self._built:
            return
        for index, term in enumerate(self.terms):
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                # the seed is read, not drawn: the global random state stays as it is
                torch.default_generator.manual_seed((torch.initial_seed() + index) % 2**63)
                term.build(student, teachers)
        tensors = [tensor for term in self.terms for tensor in term.state_dict().values()]
        self._learns = bool(self._trained())
        if self._learns and not self.allowed:
            raise ValueError(
                "Expected the terms to need no adapters under DeepSpeed, whose engine steps only the parameters it was"
                f" given, but got {len(self._trained())} adapter parameters. Distil logits only, or use DDP or FSDP2."
            )
        if world_size() > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)
        if self._saved_adapters is not None:
            for term in self.terms:
                self._restore(term, self._saved_adapters.get(term.name, {}))
        self._built, self._saved_adapters = True, None
        self._make_follower()

    def check_trained(self) -> None:
        """Raise if the adapters of an earlier step have been given to no optimizer.

        Raises:
            ValueError: If so; they would stay as they were drawn.
        """
        if self._learns and self.follower is None and not self._handed_over and not self.awaits_leader:
            raise ValueError(
                "Expected an optimizer for the adapters, but none has been given. Call distiller.follow(optimizer), or"
                " give distiller.parameters() to the student's optimizer."
            )

    def hand_over(self) -> list[nn.Parameter]:
        """The parameters, for an optimizer of the user's own."""
        if not self._built and any(term.student_taps for term in self.terms):
            raise ValueError(
                "Expected a first call of `total` before `parameters`, since adapters take their shapes from the first"
                " batch, but got none. Call it first, or use distiller.follow(optimizer), which needs no batch."
            )
        self._handed_over = True
        return self._trained()

    def follow(self, leader: Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        """Step with this optimizer from now on."""
        self.unfollow()
        self._leader, self._scaler = leader, scaler
        self._make_follower()

    def unfollow(self) -> None:
        """Let the leader go; the follower's state is kept for the next one."""
        if self.follower is not None:
            self._saved_optimizer = self.follower.optimizer.state_dict()
            self.follower.close()
        self.follower = self._leader = None

    def forget_optimizer(self) -> None:
        """Begin a new run with the adapters as they are and a fresh optimizer, as the student's is."""
        self.unfollow()
        self._saved_optimizer = None

    def state_dict(self) -> dict[str, Any]:
        """The adapters by term and their optimizer's state; empty where there are none."""
        adapters = self._saved_adapters
        if self._built:
            adapters = {term.name: state for term in self.terms if (state := dict(term.state_dict()))}
        optimizer = self._saved_optimizer if self.follower is None else self.follower.optimizer.state_dict()
        return {"adapters": adapters, "optimizer": optimizer} if adapters else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start over, from a saved state when the next batch has shown the shapes; an empty one starts fresh."""
        if self.follower is not None:
            self.follower.close()
        self.follower = None
        for term in self.terms:
            term.reset()
        self._built = self._learns = self._handed_over = False
        self._saved_adapters, self._saved_optimizer = state.get("adapters"), state.get("optimizer")

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for term in self.terms for parameter in term.parameters() if parameter.requires_grad]

    def _make_follower(self) -> None:
        if self._built and self._leader is not None and (trained := self._trained()):
            self.follower = FollowerOptimizer(trained, self._leader, self.factory, self._scaler)
            if self._saved_optimizer is not None:
                self.follower.optimizer.load_state_dict(self._saved_optimizer)
            self._saved_optimizer = None

    def _restore(self, term: DistillationTerm, state: dict[str, Tensor]) -> None:
        try:
            term.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"Expected the saved adapters to fit term {term.name!r}, but got {reason}. Resume with the terms that"
                " were saved, or start from the student's weights alone."
            ) from None
