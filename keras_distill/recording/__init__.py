"""What is read of a forward pass: taps, the recorder, the calls that the terms see, and what layers say of tensors."""

from keras_distill.recording.calls import Call
from keras_distill.recording.facts import Facts, looks_like
from keras_distill.recording.probe import probed
from keras_distill.recording.recorder import Record, Recorder, Recording, recorded
from keras_distill.recording.taps import LAYOUTS, Place, Tap, find_layer, select, sublayers

__all__ = [
    "LAYOUTS",
    "Call",
    "Facts",
    "Place",
    "Record",
    "Recorder",
    "Recording",
    "Tap",
    "find_layer",
    "looks_like",
    "probed",
    "recorded",
    "select",
    "sublayers",
]
