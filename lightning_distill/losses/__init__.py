"""Losses: small modules with checked settings, called with the student's tensor, then the teacher's."""

# ruff: noqa: F403 - every module names in its own __all__ what is public

from lightning_distill.losses import (
    activations,
    attention,
    base,
    classifiers,
    contrast,
    dense,
    detection,
    divergences,
    factors,
    features,
    learned,
    logit_relations,
    logits,
    margins,
    normalized,
    pyramids,
    queues,
    relations,
    retrieval,
    targets,
    vocabularies,
)
from lightning_distill.losses.activations import *
from lightning_distill.losses.attention import *
from lightning_distill.losses.base import *
from lightning_distill.losses.classifiers import *
from lightning_distill.losses.contrast import *
from lightning_distill.losses.dense import *
from lightning_distill.losses.detection import *
from lightning_distill.losses.divergences import *
from lightning_distill.losses.factors import *
from lightning_distill.losses.features import *
from lightning_distill.losses.learned import *
from lightning_distill.losses.logit_relations import *
from lightning_distill.losses.logits import *
from lightning_distill.losses.margins import *
from lightning_distill.losses.normalized import *
from lightning_distill.losses.pyramids import *
from lightning_distill.losses.queues import *
from lightning_distill.losses.relations import *
from lightning_distill.losses.retrieval import *
from lightning_distill.losses.targets import *
from lightning_distill.losses.vocabularies import *

__all__: list[str] = []
__all__ += activations.__all__
__all__ += attention.__all__
__all__ += base.__all__
__all__ += classifiers.__all__
__all__ += contrast.__all__
__all__ += dense.__all__
__all__ += detection.__all__
__all__ += divergences.__all__
__all__ += factors.__all__
__all__ += features.__all__
__all__ += learned.__all__
__all__ += logit_relations.__all__
__all__ += logits.__all__
__all__ += margins.__all__
__all__ += normalized.__all__
__all__ += pyramids.__all__
__all__ += queues.__all__
__all__ += relations.__all__
__all__ += retrieval.__all__
__all__ += targets.__all__
__all__ += vocabularies.__all__
