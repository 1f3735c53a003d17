"""Teachers that are not plain networks: programs, sessions, estimators, half precision. The last rows of the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pairs.by_hand import soft_targets
from pairs.lightning_table import FEATURES, Feature, first_teacher
from torch import nn

from lightning_distill import CallableTeacher

__all__ = ["FEATURES"]
# Those in which a run begins, stops or goes on.
SITUATIONS = (
    "plain",
    "callback_finds_the_learning_rate",
    "loaders_are_made_again",
    "resumed_from_the_middle_of_an_epoch",
    "exception_in_a_step_and_a_second_fit",
    "another_module_with_the_same_callback",
    "manual_optimization",
    "accumulation",
    "validation",
)


def traced() -> Any:
    network = first_teacher()
    return torch.jit.trace(network, torch.randn(2, network.body.in_features))


def exported() -> nn.Module:
    network, rows = first_teacher(), torch.export.Dim("rows")
    inputs = torch.randn(2, network.body.in_features)
    return torch.export.export(network, (inputs,), dynamic_shapes=({0: rows},)).module()


class Session:
    """An ``onnxruntime.InferenceSession`` of the first teacher."""

    class Input:
        name = "x"

    def get_inputs(self) -> list[Any]:
        return [self.Input()]

    def run(self, outputs: Any, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [first_teacher()(torch.from_numpy(feed["x"])).detach().numpy()]


class Estimator:
    """A classifier with the methods of scikit-learn, which computes in float64."""

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        return first_teacher().double()(torch.from_numpy(x).double()).softmax(-1).detach().numpy()


def _in_half(result, ask, batch, place, learned):
    return soft_targets(result["logits"], ask(first_teacher(), torch.float16)["logits"], 4.0)


def _row(teacher: Any, formula: Any = FEATURES["logits"].formula) -> Feature:
    return Feature(lambda: None, formula, teacher=teacher, situations=SITUATIONS)


OTHER_TEACHERS = {
    "TorchScript": _row(traced),
    "exported program": _row(exported),
    "session": _row(lambda: CallableTeacher(Session())),
    "estimator": _row(lambda: CallableTeacher(Estimator())),
    "teacher in float16": _row(lambda: first_teacher().half(), _in_half),
}
FEATURES.update(OTHER_TEACHERS)
