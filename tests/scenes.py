"""Small drawn scenes with boxes and masks, and the smallest networks that read them."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

# Losses of untrained networks are small: an absolute tolerance would hide a difference.
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-9)
KINDS = 3  # classes of objects; the background is class 0
VOID = 255


class Scenes(Dataset):
    """Images (3, H, W) of coloured rectangles, with a target of boxes, labels and a mask for each.

    The mask has the class of each pixel, 0 for the background, and VOID along the edges of the objects.
    """

    def __init__(self, count: int = 4, size: int = 32, seed: int = 0, objects: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.scenes = [self._drawn(generator, size, objects) for _ in range(count)]

    @staticmethod
    def _drawn(generator: torch.Generator, size: int, objects: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = 0.3 * torch.rand(3, size, size, generator=generator)
        mask = torch.zeros(size, size, dtype=torch.int64)
        boxes, labels = [], []
        for _ in range(objects):
            label = int(torch.randint(1, KINDS + 1, (), generator=generator))
            wide, high = (int(n) for n in torch.randint(size // 4, size // 2, (2,), generator=generator))
            left = int(torch.randint(0, size - wide, (), generator=generator))
            top = int(torch.randint(0, size - high, (), generator=generator))
            image[:, top : top + high, left : left + wide] *= 0.2
            image[label - 1, top : top + high, left : left + wide] += 0.7
            mask[top : top + high, left : left + wide] = VOID
            mask[top + 1 : top + high - 1, left + 1 : left + wide - 1] = label
            boxes.append([left, top, left + wide, top + high])
            labels.append(label)
        return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels), "mask": mask}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.scenes[index]


def listed(samples: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch as detectors of torchvision read it: a list of images and a list of targets."""
    return [image for image, _ in samples], [target for _, target in samples]


def stacked(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """A batch for segmentation: images (N, 3, H, W) and masks (N, H, W)."""
    return torch.stack([image for image, _ in samples]), torch.stack([target["mask"] for _, target in samples])


def with_boxes(samples: list[Any]) -> dict[str, Any]:
    """A batch with images, masks, and a list of boxes."""
    images, masks = stacked(samples)
    return {"images": images, "labels": masks, "boxes": [target["boxes"] for _, target in samples]}


def loader(collate: Any, count: int = 4, size: int = 32, batch_size: int = 2, seed: int = 0) -> DataLoader:
    return DataLoader(Scenes(count, size, seed), batch_size=batch_size, collate_fn=collate)


class Pyramid(nn.Module):
    """Images (N, 3, H, W) to two maps, as a dict or a list: strides 2 and 4."""

    def __init__(self, width: int, kind: type = OrderedDict, names: tuple[str, ...] = ("fine", "coarse")) -> None:
        super().__init__()
        self.fine, self.coarse = (nn.Conv2d(n, width, 3, stride=2, padding=1) for n in (3, width))
        self.kind, self.names = kind, names

    def forward(self, images: Tensor) -> Any:
        fine = self.fine(images)
        maps = [fine, self.coarse(fine.tanh())]
        return self.kind(zip(self.names, maps, strict=True)) if self.kind in (dict, OrderedDict) else self.kind(maps)


class Net(nn.Module):
    """A pyramid with a head at every level: class scores of each level, or of the first alone, enlarged."""

    def __init__(self, width: int, seed: int, stride: int = 1, **settings: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.neck, self.head = Pyramid(width, **settings), Head(width)
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        maps = self.neck(images)
        scores = self.head([*maps.values()] if isinstance(maps, dict) else [*maps])
        size = [side // self.stride for side in images.shape[-2:]]
        return F.interpolate(scores[0], size, mode="bilinear", align_corners=False)


class Head(nn.Module):
    """Scores (N, KINDS + 1, H, W) of each map of a list, by one convolution before and one after a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower, self.scores = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, KINDS + 1, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.scores(self.tower(each).relu()) for each in maps]


class Segmenter(LightningModule):
    """Trains a network on batches of images and masks, whose void pixels do not count."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        images, masks = (batch["images"], batch["labels"]) if isinstance(batch, dict) else batch
        scores = self.net(images)
        scores = F.interpolate(scores, masks.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(scores, masks, ignore_index=VOID)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Steps(LightningModule):
    """Trains a detector of torchvision, which returns its losses."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return sum(self.net(*batch).values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)
