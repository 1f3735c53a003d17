"""Text of the student in a training loop that is written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_distill.on_policy.batches import OnPolicyBatches


@dataclass
class _Returned:
    """A batch, whether it is text of the student, and whether its loss has been made."""

    batch: Any
    own_text: bool
    used: bool = False


class LoopTexts:
    """Counts the batches of a loop, and remembers which of them are text of the student.

    Args:
        batches: Continues batches.

    Attributes:
        count: Number of batches so far; a resumed training goes on with it.
    """

    def __init__(self, batches: OnPolicyBatches) -> None:
        self._batches, self.count = batches, 0
        self._returned: dict[int, _Returned] = {}  # by the batch's id, which is its own as long as it is kept

    def continued(self, batch: Any) -> Any:
        """The batch, continued by the student if that is drawn.

        Args:
            batch: The batch, on the student's device.
        """
        self._returned = {key: entry for key, entry in self._returned.items() if not entry.used}
        batch, own_text = self._batches.at((self.count,), batch)
        self.count += 1
        self._returned[id(batch)] = _Returned(batch, own_text)
        return batch

    def is_own(self, batch: Any, *, uses: bool = True) -> bool:
        """Whether a batch is text of the student.

        Args:
            batch: A batch that :meth:`continued` has returned.
            uses: Whether its loss is made now.

        Raises:
            ValueError: If it is another batch, while gradients are enabled.
        """
        entry = self._returned.get(id(batch))
        if entry is None and not torch.is_grad_enabled():
            return False  # a batch of an evaluation
        if entry is None:
            raise ValueError(
                "Expected the batch to be one that `continued` has returned, since on_policy is given, but got another."
                " Write batch = distiller.continued(batch) after the batch was moved to its device, and pass this batch"
                " on."
            )
        entry.used |= uses
        return entry.own_text
