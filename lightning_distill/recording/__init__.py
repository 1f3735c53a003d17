"""Recording of a step: the calls of a network, the features at the tapped layers, the labels of the batch.

Nothing in this package knows a Trainer.
"""

from lightning_distill.recording.calls import Call, Tap
from lightning_distill.recording.labels import LABEL_NAMES, find_labels
from lightning_distill.recording.outputs import first_tensor, map_tensors, select
from lightning_distill.recording.recorder import Recorder, Recording, find_layer

__all__ = [
    "LABEL_NAMES",
    "Call",
    "Recorder",
    "Recording",
    "Tap",
    "find_labels",
    "find_layer",
    "first_tensor",
    "map_tensors",
    "select",
]
