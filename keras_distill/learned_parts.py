"""A Keras model whose terms make weights in the first batch, before the optimizer counts the weights that it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_distill import checks, compat
from keras_distill.first_labels import first_rows
from keras_distill.targets import split_targets
from keras_distill.untracked import ModelWithTeacher


@keras.saving.register_keras_serializable(package="keras_distill")
class ModelWithLearnedParts(ModelWithTeacher):
    """Base of :class:`keras_distill.DistillModel`, which lets its optimizer wait for adapters and learned losses.

    An optimizer trains the weights that it was built with. If the teacher's outputs come with the data, the shapes of
    adapters are known in the first batch of a training, and the optimizer must not be built before.
    """

    optimizer: Any
    jit_compile: Any
    built: bool

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """As in Keras; but the terms are built first, and the optimizer is left unbuilt as long as they are."""
        built_before = self.step.built  # the lines below may build it
        if built_before:
            super()._symbolic_build(iterator, data_batch)
            return
        if data_batch is not None or keras.backend.backend() == "jax" or self.jit_compile is True:
            # a compiled step cannot create variables; otherwise the first step creates them
            data_batch = data_batch or compat.first_batch(iterator)
            inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data_batch)
            self.step.build(inputs, split_targets(targets)[1])
        with self._unoptimized():
            super()._symbolic_build(iterator, data_batch)
        if self.step.built:
            self.build_optimizer()

    def build_from_data(self, data: Any, targets: Any) -> bool:
        """Build the terms for data that hold the teacher's outputs, before callbacks such as ``BackupAndRestore``.

        These need a model whose weights are all there. Data that cannot be read twice are left to the first step.

        Args:
            data: The ``x`` argument of ``fit``.
            targets: The ``y`` argument.

        Returns:
            Whether a first step may have to make adapters: not if the data are labels alone.
        """
        if self.step.built:
            return False
        rows = first_rows(data, targets)
        inputs, answers, _ = keras.utils.unpack_x_y_sample_weight(rows or (None, None))
        stored = split_targets(answers)[1]
        if stored is not None:
            strategy = getattr(self, "distribute_strategy", None)
            with contextlib.nullcontext() if strategy is None else strategy.scope():
                self.step.build(inputs, stored)
            self.built = self.step.built
        return rows is None or stored is not None

    @contextlib.contextmanager
    def _unoptimized(self) -> Iterator[None]:
        """A context in which the model has no optimizer that Keras could build."""
        optimizer = self.__dict__.get("optimizer")
        self.__dict__["optimizer"] = None
        try:
            yield
        finally:
            self.__dict__["optimizer"] = optimizer

    def build_optimizer(self) -> None:
        """Build the optimizer for the weights that there are; one that is built already must know them.

        Raises:
            ValueError: If it does not.
        """
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        self.check_optimizer()

    def check_optimizer(self) -> None:
        """Check that the optimizer trains the weights of all terms.

        Raises:
            ValueError: If it was built before some of them were made.
        """
        unknown = compat.unknown_variables(self.optimizer, self.step.trainable_variables)
        if unknown:
            owners = [term.name for term in self.step.terms if any(v is unknown[0] for v in term.trainable_variables)]
            expected = f"the optimizer to train the weights of term {owners[0]!r}"
            received = "an optimizer of an earlier training, which was built before the term made these weights"
            remedy = "Compile with a new optimizer; in the launcher, set a new `optimizer` before each `fit`."
            raise ValueError(checks.message(expected, received, remedy))
