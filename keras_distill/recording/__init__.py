"""Recording a forward pass: taps, the recorder, the calls that terms read, and facts about the tensors."""

from keras_distill.recording.calls import Call
from keras_distill.recording.facts import Facts, looks_like
from keras_distill.recording.probe import probed, symbolic
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
    "symbolic",
]
