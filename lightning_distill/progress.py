"""How much of a Trainer's training is done."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, Timer


def fraction_done(trainer: Trainer) -> float | None:
    """How much of the training is done, from 0 to 1; ``None`` where it has no end that is known.

    It is the largest used-up share of any limit: steps, epochs or time. Shares need no total number of steps, so a
    reload with another number of batches does not move the past, and nothing is kept. To be read within a step: between
    epochs the index of the batch is still the old epoch's.

    Args:
        trainer: The Trainer, in a training step.
    """
    shares = []
    if trainer.max_steps >= 0:
        shares.append(trainer.global_step / max(trainer.max_steps, 1))
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epochs = trainer.max_epochs - sum(  # it appends an epoch to measure BatchNorm's statistics, without a step
            isinstance(callback, StochasticWeightAveraging)
            and callback.pl_module_contains_batch_norm(trainer.lightning_module)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        )
        batches, within = trainer.num_training_batches, 0.0
        if 0 < batches < math.inf:  # else the place is known at the ends of epochs only
            window = trainer.accumulate_grad_batches  # the place is constant between optimizer steps
            within = min(trainer.fit_loop.batch_idx // window / math.ceil(batches / window), 1.0)
        shares.append((trainer.current_epoch + within) / max(epochs, 1))
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    left = [(timer.time_elapsed(), timer.time_remaining()) for timer in timers]
    shares += [elapsed / max(elapsed + remaining, 1e-9) for elapsed, remaining in left if remaining is not None]
    return min(max(shares), 1.0) if shares else None
