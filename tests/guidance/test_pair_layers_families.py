"""Networks of the families that people distil: their layers pair, and the terms train as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from language_models import language_model
from nets import make
from plain_operators import has_torchvision
from torch import Tensor, nn
from vision_families import FAMILIES, PIXELS

from lightning_distill import Distiller, pair_layers
from lightning_distill.recording.batches import call_with

IMAGES = [
    {"pixel_values": torch.randn(8, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(i))} for i in (0, 1)
]
NAMES = [*FAMILIES]


def trains(pairs: Any, student: nn.Module, teacher: nn.Module, inputs: Any) -> bool:
    scope: dict[str, Any] = {}
    exec(pairs.code("cosine"), scope)
    with Distiller(student, teacher, scope["terms"], task_weight=0) as distiller:
        with distiller.record():
            call_with(student, inputs)
        loss = distiller.loss()
        loss.backward()
    return bool(loss > 0)


def named(pairs: Any) -> list[tuple[str, str]]:
    return [(pair.student.name, pair.teacher.name) for pair in pairs]


@pytest.mark.parametrize(("first", "second"), list(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)))
def test_each_family_learns_from_another_by_the_pairs(first: str, second: str) -> None:
    student, teacher = make(FAMILIES[first].make, 0), make(FAMILIES[second].make, 1)
    pairs = pair_layers(student, teacher, IMAGES)
    assert 0 < len(pairs) <= 4
    assert trains(pairs, student, teacher, IMAGES[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "embedding"])
def test_a_twin_of_the_same_weights_is_paired_layer_by_layer(name: str) -> None:
    student, teacher = make(FAMILIES[name].make, 0), make(FAMILIES[name].make, 0)
    pairs = pair_layers(student, teacher, IMAGES)
    assert [pair.student for pair in pairs] == [pair.teacher for pair in pairs]
    assert [pair.similarity for pair in pairs] == pytest.approx([1.0] * len(pairs), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("gpt2", ["transformer.h.0", "transformer.h.1", "transformer.ln_f"]),
        ("llama", ["model.layers.0", "model.layers.1", "model.norm"]),
        ("gemma2", ["model.layers.0", "model.layers.1", "model.norm"]),
        ("t5", ["encoder", "decoder"]),
    ],
)
def test_language_models_are_paired_by_their_layers(name: str, expected: list[str]) -> None:
    student, teacher = language_model(name, 16, 0).float(), language_model(name, 32, 1).float()
    tokens = torch.randint(3, 200, (8, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens, "source": ["a"] * 8}
    pairs = pair_layers(student, teacher, [batch], count=len(expected))
    assert named(pairs) == [(layer, layer) for layer in expected]
    del batch["source"]
    assert trains(pairs, student, teacher, batch)


def test_networks_of_torchvision_are_paired_by_their_stages() -> None:
    if not has_torchvision():
        pytest.skip("torchvision is not installed; `make install` brings it")
    from torchvision import models

    images: Tensor = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    student, teacher = make(models.resnet18, 0), make(models.wide_resnet50_2, 1)
    stages = [layer for layer in pair_layers(student, teacher, [images]) if layer.student.name.startswith("layer")]
    assert [pair.student.name.split(".")[0] for pair in stages] == [f"layer{number}" for number in range(1, 5)]
    mobile = make(models.mobilenet_v2, 2)
    pairs = pair_layers(mobile, student, [images])
    assert [pair.student.positions for pair in pairs] == [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]
    swin = make(models.swin_t, 3)
    pairs = pair_layers(student, swin, [images])
    assert {pair.teacher.layout for pair in pairs} == {"channels_last"}
    assert trains(pairs, student, swin, images)
