"""The losses: a ``keras.losses.Loss`` for each formula, called with the teacher's tensor, then the student's."""

# ruff: noqa: F403 - every module names in its own __all__ what is public

from keras_distill.losses import (
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
from keras_distill.losses.activations import *
from keras_distill.losses.attention import *
from keras_distill.losses.base import *
from keras_distill.losses.classifiers import *
from keras_distill.losses.contrast import *
from keras_distill.losses.dense import *
from keras_distill.losses.detection import *
from keras_distill.losses.divergences import *
from keras_distill.losses.factors import *
from keras_distill.losses.features import *
from keras_distill.losses.learned import *
from keras_distill.losses.logit_relations import *
from keras_distill.losses.logits import *
from keras_distill.losses.margins import *
from keras_distill.losses.normalized import *
from keras_distill.losses.pyramids import *
from keras_distill.losses.queues import *
from keras_distill.losses.relations import *
from keras_distill.losses.retrieval import *
from keras_distill.losses.targets import *
from keras_distill.losses.vocabularies import *

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
