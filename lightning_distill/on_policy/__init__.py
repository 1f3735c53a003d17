"""Training on text that the student has written itself."""

from lightning_distill.on_policy.batches import OnPolicyBatches
from lightning_distill.on_policy.loop import LoopTexts
from lightning_distill.on_policy.settings import OnPolicyDistillation, reverse_term

__all__ = ["LoopTexts", "OnPolicyBatches", "OnPolicyDistillation", "reverse_term"]
