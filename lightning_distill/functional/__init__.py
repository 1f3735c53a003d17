"""The mathematics: pure functions of two tensors, student first, that return one value per example."""

# ruff: noqa: F403 - every module names in its own __all__ what is public

from lightning_distill.functional import (
    activations,
    attention,
    classifiers,
    contrast,
    dense,
    detection,
    divergences,
    factors,
    features,
    fused_linear,
    learned,
    logit_relations,
    logits,
    margins,
    mixtures,
    normalized,
    pyramids,
    queues,
    relations,
    retrieval,
    targets,
    vocabularies,
)
from lightning_distill.functional.activations import *
from lightning_distill.functional.attention import *
from lightning_distill.functional.classifiers import *
from lightning_distill.functional.contrast import *
from lightning_distill.functional.dense import *
from lightning_distill.functional.detection import *
from lightning_distill.functional.divergences import *
from lightning_distill.functional.factors import *
from lightning_distill.functional.features import *
from lightning_distill.functional.fused_linear import *
from lightning_distill.functional.learned import *
from lightning_distill.functional.logit_relations import *
from lightning_distill.functional.logits import *
from lightning_distill.functional.margins import *
from lightning_distill.functional.mixtures import *
from lightning_distill.functional.normalized import *
from lightning_distill.functional.pyramids import *
from lightning_distill.functional.queues import *
from lightning_distill.functional.relations import *
from lightning_distill.functional.retrieval import *
from lightning_distill.functional.targets import *
from lightning_distill.functional.vocabularies import *

__all__: list[str] = []
__all__ += activations.__all__
__all__ += attention.__all__
__all__ += classifiers.__all__
__all__ += contrast.__all__
__all__ += dense.__all__
__all__ += detection.__all__
__all__ += divergences.__all__
__all__ += factors.__all__
__all__ += features.__all__
__all__ += fused_linear.__all__
__all__ += learned.__all__
__all__ += logit_relations.__all__
__all__ += logits.__all__
__all__ += margins.__all__
__all__ += mixtures.__all__
__all__ += normalized.__all__
__all__ += pyramids.__all__
__all__ += queues.__all__
__all__ += relations.__all__
__all__ += retrieval.__all__
__all__ += targets.__all__
__all__ += vocabularies.__all__
