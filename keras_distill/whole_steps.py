"""A Keras model whose steps on TensorFlow do nothing when the data have ended."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_distill import backends


@keras.saving.register_keras_serializable(package="keras_distill")
class ModelOfWholeSteps(keras.Model):
    """Base of the models of this package: a step without a batch changes nothing.

    Keras learns the length of a ``tf.data.Dataset`` of unknown size from a last execution, which fails when it reads
    the next batch. In a graph everything runs that does not read the batch: plain Keras models count an optimizer step
    more in each epoch, and divide their metrics by a batch too many if all batches have one known size.
    """

    jit_compile: Any

    def train_step(self, *args: Any) -> Any:
        """As in Keras, after the batch has been read."""
        with self.after(args):
            return super().train_step(*args)

    def test_step(self, *args: Any) -> Any:
        """As in Keras, after the batch has been read."""
        with self.after(args):
            return super().test_step(*args)

    def after(self, batch: Any) -> contextlib.AbstractContextManager[Any]:
        """A context in which everything waits for a batch; a step of XLA does that in any case.

        Args:
            batch: The arguments of the step.
        """
        # XLA could not move the creation of variables out of the step
        return contextlib.nullcontext() if self.jit_compile else backends.after(batch)
