"""The formulas: tensors in, one loss per example out. The student's tensor always comes first, channels are last."""

# ruff: noqa: F403 - every module names in its own __all__ what is public

from keras_distill.functional import (
    activations,
    attention,
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
    mixtures,
    normalized,
    pyramids,
    queues,
    relations,
    retrieval,
    targets,
    vocabularies,
)
from keras_distill.functional.activations import *
from keras_distill.functional.attention import *
from keras_distill.functional.classifiers import *
from keras_distill.functional.contrast import *
from keras_distill.functional.dense import *
from keras_distill.functional.detection import *
from keras_distill.functional.divergences import *
from keras_distill.functional.factors import *
from keras_distill.functional.features import *
from keras_distill.functional.learned import *
from keras_distill.functional.logit_relations import *
from keras_distill.functional.logits import *
from keras_distill.functional.margins import *
from keras_distill.functional.mixtures import *
from keras_distill.functional.normalized import *
from keras_distill.functional.pyramids import *
from keras_distill.functional.queues import *
from keras_distill.functional.relations import *
from keras_distill.functional.retrieval import *
from keras_distill.functional.targets import *
from keras_distill.functional.vocabularies import *

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
