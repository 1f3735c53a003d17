"""The heads of language models: their matrices, and forward passes that skip them.

Nothing in this package knows a Trainer.
"""

from lightning_distill.heads.matrices import Matrix, matrix_of
from lightning_distill.heads.placeholder import NoLogitsError, Recipe, Trace, carrier_in, placeholder
from lightning_distill.heads.skipping import ForwardSwap

__all__ = ["ForwardSwap", "Matrix", "NoLogitsError", "Recipe", "Trace", "carrier_in", "matrix_of", "placeholder"]
