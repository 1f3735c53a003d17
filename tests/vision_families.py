"""Small networks of the families that people distil, with random weights, and the place of each one's feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    EfficientNetConfig,
    EfficientNetModel,
    MobileNetV2Config,
    MobileNetV2Model,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from lightning_distill import Tap

PIXELS = 32  # height and width of the images


@dataclass(frozen=True)
class Family:
    """A network, and how to read its feature by hand.

    Args:
        make: Makes the network.
        tap: The place of its feature.
        grid: Height and width of the feature; () for a vector.
        by_hand: From the output of the tapped layer to the feature (N, C, H, W), or to the vector.
    """

    make: Callable[[], nn.Module]
    tap: str | Tap
    grid: tuple[int, ...]
    by_hand: Callable[[Any], Tensor]

    @property
    def layer(self) -> str:
        return Tap.of(self.tap).layer


def patches(prefix: int, side: int) -> Callable[[Any], Tensor]:
    """The tokens after a prefix as a map, one patch after the other."""

    def read(output: Any) -> Tensor:
        tokens = output if isinstance(output, Tensor) else output[0]
        rows = [torch.stack([tokens[:, prefix + row * side + i] for i in range(side)], -1) for row in range(side)]
        return torch.stack(rows, -2)

    return read


def as_it_is(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class UNet(nn.Module):
    """Two resolutions and a way back: ``down``, ``middle``, ``up``, ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Tanh())
        self.middle = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Tanh())
        self.up = nn.Sequential(nn.Conv2d(14, 6, 3, padding=1), nn.Tanh())
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        fine = self.down(pixel_values)
        coarse = nn.functional.interpolate(self.middle(fine), scale_factor=2)
        return self.head(self.up(torch.cat([fine, coarse], 1)))


class ChannelsLast(nn.Module):
    """Maps (N, H, W, C) inside, as in the Swin transformers of some libraries: ``embed``, ``norm``, ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(3, 5, 8, stride=8), nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(pixel_values).movedim(1, -1)).mean((1, 2)))


class Embedder(nn.Module):
    """An embedding without a map: ``embedding``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, 9)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.embedding(pixel_values.mean((2, 3)))


_ENCODER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
_IMAGE = {"image_size": PIXELS, "patch_size": 8}


def vit() -> nn.Module:
    return ViTModel(ViTConfig(**_ENCODER, **_IMAGE), add_pooling_layer=False)


def dino() -> nn.Module:
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1}
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings, **_IMAGE, num_register_tokens=4))


def clip() -> nn.Module:
    return CLIPVisionModel(CLIPVisionConfig(**_ENCODER, image_size=PIXELS, patch_size=4))


def swin() -> nn.Module:
    return SwinModel(
        SwinConfig(image_size=PIXELS, patch_size=4, embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=4)
    )


def convnext() -> nn.Module:
    return ConvNextModel(ConvNextConfig(hidden_sizes=[4, 6], depths=[1, 1], num_stages=2))


def resnet() -> nn.Module:
    settings = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    return ResNetModel(ResNetConfig(**settings))


def mobilenet() -> nn.Module:
    return MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.1, finegrained_output=False))


def efficientnet() -> nn.Module:
    stages = {"in_channels": [32, 8], "out_channels": [8, 8], "kernel_sizes": [3, 3], "strides": [1, 2]}
    stages |= {"expand_ratios": [1, 2], "num_block_repeats": [1, 1], "depthwise_padding": []}
    return EfficientNetModel(
        EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, depth_divisor=8, hidden_dim=1280, **stages)
    )


FAMILIES = {
    "vit": Family(vit, "layernorm", (4, 4), patches(1, 4)),
    "dino": Family(dino, "layernorm", (4, 4), patches(5, 4)),
    "clip": Family(clip, "encoder.layers.0", (8, 8), patches(1, 8)),
    "swin": Family(swin, "layernorm", (4, 4), patches(0, 4)),
    "convnext": Family(convnext, "encoder.stages.1", (4, 4), as_it_is),
    "resnet": Family(resnet, "encoder.stages.0", (8, 8), as_it_is),
    "mobilenet": Family(mobilenet, "layer.3", (4, 4), as_it_is),
    "efficientnet": Family(efficientnet, "encoder.blocks.1", (8, 8), as_it_is),
    "unet": Family(UNet, "up", (16, 16), as_it_is),
    "channels_last": Family(
        ChannelsLast, Tap("norm", layout="channels_last"), (4, 4), lambda output: output.permute(0, 3, 1, 2)
    ),
    "embedding": Family(Embedder, "embedding", (), as_it_is),
}
