"""Small networks of timm with random weights, if it is installed, as rows beside those of ``vision_families``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from plain_operators import has_timm
from torch import Tensor, nn
from vision_families import PIXELS, Family, as_it_is, patches

from lightning_distill import Tap


class Called(nn.Module):
    """A network that is called as those of transformers are: ``network``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.network(pixel_values)


def _maker(module: str, name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return Called(getattr(importlib.import_module(f"timm.models.{module}"), name)(num_classes=3, **settings))

    return make


def _mobile(module: str, name: str) -> Callable[[], nn.Module]:
    """A network of two blocks with squeeze and excitation, of strides 1 and 2, after a stem of stride 2."""

    def make() -> nn.Module:
        decoded = importlib.import_module("timm.models._efficientnet_builder").decode_arch_def(
            [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r1_k3_s2_e2_c8_se0.25"]]
        )
        return _maker(module, name, block_args=decoded, stem_size=4, num_features=8)()

    return make


_TOKENS = {"img_size": PIXELS, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1}
_WINDOWS = {
    "img_size": PIXELS,
    "patch_size": 4,
    "embed_dim": 4,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "drop_path_rate": 0.0,
}
_VIT, _SWIN = ("vision_transformer", "VisionTransformer"), ("swin_transformer", "SwinTransformer")
_CONVNEXT = _maker("convnext", "ConvNeXt", depths=(1, 1, 1, 1), dims=(4, 6, 6, 6))
TIMM = {
    "timm vit": Family(_maker(*_VIT, **_TOKENS, patch_size=4), "network.norm", (8, 8), patches(1, 8)),
    "timm registers": Family(
        _maker(*_VIT, **_TOKENS, patch_size=8, reg_tokens=4), "network.norm", (4, 4), patches(5, 4)
    ),
    "timm swin": Family(
        _maker(*_SWIN, **_WINDOWS, window_size=4),
        Tap("network.norm", layout="channels_last"),
        (4, 4),
        lambda output: output.permute(0, 3, 1, 2),
    ),
    "timm convnext": Family(_CONVNEXT, "network.stages.1", (4, 4), as_it_is),
    "timm mobilenet": Family(_mobile("mobilenetv3", "MobileNetV3"), "network.blocks.1", (8, 8), as_it_is),
    "timm efficientnet": Family(_mobile("efficientnet", "EfficientNet"), "network.blocks.1", (8, 8), as_it_is),
}
if not has_timm():
    TIMM = {}
