"""Small things that the engine does and that nothing else would notice if it stopped doing them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from nets import InnerModule, loader, student, teacher
from torch import nn

from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation


class Every(Callback):
    """Calls a function before each training batch, with its index."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.function(batch_idx)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def test_an_adapter_that_is_made_later_leaves_the_optimizer_state_of_the_earlier_one(trainer):
    later = FeatureDistillation("layer2", "layer2", weight=0.0)
    callback = DistillCallback(teacher(), [FeatureDistillation("layer1", "layer1"), later])

    def wake(batch_idx: int) -> None:
        later.weight = float(batch_idx >= 2)

    trainer(callbacks=[callback, Every(wake)], max_steps=3).fit(InnerModule(student(), adam), loader())
    state = callback.adapter_state()["optimizer"]["state"]
    assert [int(state[index]["step"]) for index in range(4)] == [3, 3, 1, 1]


def test_adapters_of_equal_shapes_start_from_different_values(trainer):
    terms = [FeatureDistillation("layer1", "layer1"), FeatureDistillation("layer2", "layer2")]
    callback = DistillCallback(teacher(), terms, adapter_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.0))
    trainer(callbacks=callback).fit(InnerModule(student()), loader())
    first, second = (values["adapters.0.weight"] for values in callback.adapter_state()["adapters"].values())
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_weights_written_into_a_converted_teacher_stay_in_the_original(trainer):
    network = teacher()
    untouched, halved = network.layer1.weight.clone(), network.head.weight.clone() / 2

    def halve(batch_idx: int) -> None:
        if batch_idx == 1:
            with torch.no_grad():
                network.head.weight.div_(2)

    callback = DistillCallback(network, teacher_dtype="bfloat16")
    trainer(callbacks=[callback, Every(halve)]).fit(InnerModule(student()), loader())
    assert network.head.weight.dtype == torch.float32
    assert torch.equal(network.head.weight, halved.bfloat16().float())
    assert torch.equal(network.layer1.weight, untouched)  # not rounded


def test_a_teacher_that_somebody_sets_to_train_answers_in_eval_mode(trainer):
    network = nn.Sequential(nn.Dropout(0.5), teacher())
    modes: list[bool] = []
    network[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    callback = DistillCallback(network, LogitsDistillation())
    trainer(callbacks=[callback, Every(lambda _: network.train())]).fit(InnerModule(student()), loader())
    assert modes == [False, False]
