"""Drawn scenes with boxes and masks, small networks for them, and what measures those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import QUIET
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

KINDS, SIZE, VOID = 3, 64, 255  # discs, diamonds and rings on an image of 64 x 64 pixels
STRIDES = {"fine": 4, "coarse": 8}
Scene = dict[str, Tensor]


def draw(count: int, seed: int) -> list[Scene]:
    """Scenes of one to four objects: images, boxes in pixels, labels from 0, and masks (0 is the background)."""
    generator = torch.Generator().manual_seed(seed)
    return [_drawn(generator) for _ in range(count)]


def _drawn(generator: torch.Generator) -> Scene:
    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    image, mask = torch.rand(3, 1, 1, generator=generator).expand(3, SIZE, SIZE), torch.zeros(SIZE, SIZE).long()
    boxes, labels = [], []
    for _ in range(number(1, 5)):
        radius, kind = number(5, 13), number(0, KINDS)
        x, y = number(radius, SIZE - radius), number(radius, SIZE - radius)
        down, right = (torch.arange(SIZE) + 0.5 - centre for centre in (y, x))
        apart = (down[:, None].square() + right.square()).sqrt()
        diamond = down[:, None].abs() + right.abs()
        inside = [apart < radius, diamond < radius, (apart < radius) & (apart > radius / 2)][kind]
        image = torch.where(inside, torch.rand(3, 1, 1, generator=generator), image)
        edge = (apart - radius).abs() < 1 if kind != 1 else (diamond - radius).abs() < 1
        mask = torch.where(inside, kind + 1, mask).masked_fill(edge, VOID)
        boxes.append([x - radius, y - radius, x + radius, y + radius])
        labels.append(kind)
    image = image + 0.1 * torch.randn(3, SIZE, SIZE, generator=generator)
    return {"images": image, "boxes": torch.tensor(boxes).float(), "kinds": torch.tensor(labels), "labels": mask}


def loader(scenes: list[Scene], shuffle: bool = True, batch_size: int = 16) -> DataLoader[Any]:
    """Batches of stacked images and masks, and of lists of boxes and kinds."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(scenes, batch_size, shuffle, collate_fn=_collated, generator=generator)


def _collated(scenes: list[Scene]) -> dict[str, Any]:
    stacked = {name: torch.stack([scene[name] for scene in scenes]) for name in ("images", "labels")}
    return stacked | {name: [scene[name] for scene in scenes] for name in ("boxes", "kinds")}


class Neck(nn.Module):
    """Images to a feature pyramid of strides 4 and 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, width, 2), _block(width, width, 2), _block(width, width))
        self.deep = nn.Sequential(_block(width, 2 * width, 2), _block(2 * width, 2 * width))
        self.across = nn.Conv2d(2 * width, width, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps by name."""
        fine = self.stem(images)
        coarse = self.across(self.deep(fine))
        return {"fine": fine + F.interpolate(coarse, scale_factor=2.0), "coarse": coarse}


class Head(nn.Module):
    """Class scores before a sigmoid, and the logarithm of the distances to the edges of a box, at each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower, self.scores, self.edges = _block(width, width), nn.Conv2d(width, KINDS, 1), nn.Conv2d(width, 4, 1)
        nn.init.constant_(self.scores.bias, -3.0)  # most positions have no object

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """Rows (N, positions of all levels, numbers)."""
        towers = [self.tower(each) for each in maps]
        layers = {"scores": self.scores, "edges": self.edges}
        return {name: torch.cat([layer(t).flatten(2).mT for t in towers], 1) for name, layer in layers.items()}


class Detector(nn.Module):
    """An anchor-free detector with one head for all levels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.neck, self.head = Neck(width), Head(width)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs of the head."""
        return self.head([*self.neck(images).values()])


class Segmenter(nn.Module):
    """Class scores at a quarter of the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.neck, self.head = Neck(width), nn.Conv2d(width, KINDS + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, classes, H / 4, W / 4)."""
        scores: Tensor = self.head(self.neck(images)["fine"])
        return scores


def _block(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU())


def detection_loss(output: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    """Focal loss of the scores, and the overlap of the boxes at the positions that have an object."""
    places, strides = positions()
    total = output["scores"].new_zeros(())
    for scores, edges, boxes, kinds in zip(
        output["scores"], output["edges"], batch["boxes"], batch["kinds"], strict=True
    ):
        centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        near = (places[:, None] - centres).abs().amax(2) < 1.5 * strides[:, None]
        level = (sizes.amax(1) > 16) == (strides[:, None] > STRIDES["fine"])
        area = torch.where(near & level, sizes.prod(1), torch.inf)
        owner, owned = area.argmin(1), area.amin(1) < torch.inf
        target = F.one_hot(kinds[owner], KINDS) * owned[:, None]
        entropy = F.binary_cross_entropy_with_logits(scores, target.float(), reduction="none")
        focal = ((target - scores.sigmoid()).abs().square() * entropy).sum()
        overlaps = iou(decoded(places, strides, edges)[owned], boxes[owner[owned]], pairs=True)
        total = total + (focal + (1 - overlaps).sum()) / owned.sum().clamp(min=1)
    return total / len(batch["boxes"])


def positions() -> tuple[Tensor, Tensor]:
    """The centres (x, y) of the positions of all levels, and their strides."""
    places, strides = [], []
    for stride in STRIDES.values():
        steps = (torch.arange(SIZE // stride) + 0.5) * stride
        places.append(torch.cartesian_prod(steps, steps).flip(1))
        strides.append(torch.full((len(places[-1]),), float(stride)))
    return torch.cat(places), torch.cat(strides)


def decoded(places: Tensor, strides: Tensor, edges: Tensor) -> Tensor:
    """Boxes from the logarithms of the distances to their edges."""
    apart = strides[:, None] * edges.clamp(max=4).exp()
    return torch.cat([places - apart[:, :2], places + apart[:, 2:]], 1)


def iou(first: Tensor, second: Tensor, pairs: bool = False) -> Tensor:
    """Area of the intersection over that of the union, of each with each, or with ``pairs`` row by row."""
    first = first if pairs else first[:, None]
    sides = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(
        min=0
    )
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second)]
    common = sides.prod(-1)
    return common / (areas[0] + areas[1] - common)


def segmentation_loss(scores: Tensor, batch: dict[str, Any]) -> Tensor:
    """Cross entropy of the labelled pixels."""
    larger = F.interpolate(scores, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return F.cross_entropy(larger, batch["labels"], ignore_index=VOID)


@torch.no_grad()
def average_precision(model: Callable[[Tensor], dict[str, Tensor]], batches: DataLoader[Any]) -> float:
    """Mean over the classes of the area below the curve of precision over recall, at an overlap of 0.5.

    The boxes of `detected` are matched from the best score on, each with the object of its class that it overlaps most,
    if that is free.
    """
    answers: list[list[tuple[float, bool]]] = [[] for _ in range(KINDS)]
    objects = [0] * KINDS
    for batch in batches:
        for image, boxes, kinds in zip(detected(model(batch["images"])), batch["boxes"], batch["kinds"], strict=True):
            for kind in range(KINDS):
                truth, own = boxes[kinds == kind], image["labels"] == kind
                objects[kind] += len(truth)
                nearest = iou(image["boxes"][own], truth).max(1) if len(truth) else None
                taken: set[int] = set()
                for index, score in enumerate(image["scores"][own].tolist()):
                    owner = -1 if nearest is None or nearest.values[index] <= 0.5 else int(nearest.indices[index])
                    answers[kind].append((score, owner >= 0 and owner not in taken))
                    taken.add(owner)
    return sum(_area(answers[kind], objects[kind]) for kind in range(KINDS)) / KINDS


@torch.no_grad()
def detected(output: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The boxes, scores and labels of each image, by class and from the best score on.

    The 50 best boxes of a class are thinned to those that no better box of the class overlaps by half.
    """
    images = []
    for scores, edges in zip(output["scores"].sigmoid(), output["edges"], strict=True):
        parts = []
        for kind in range(KINDS):
            best = scores[:, kind].topk(50)
            corners = decoded(*(each[best.indices] for each in (*positions(), edges)))
            overlaps = (iou(corners, corners) > 0.5).tolist()
            kept: list[int] = []
            for index, row in enumerate(overlaps):
                if not any(row[other] for other in kept):
                    kept.append(index)
            parts.append((corners[kept], best.values[kept], torch.full((len(kept),), kind)))
        boxes, values, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        images.append({"boxes": boxes, "scores": values, "labels": labels})
    return images


def _area(answers: list[tuple[float, bool]], objects: int) -> float:
    hits = torch.tensor([hit for _, hit in sorted(answers, key=lambda pair: -pair[0])]).float()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)  # the best precision at this recall or a higher one
    return float((best * hits).sum() / max(objects, 1))


@torch.no_grad()
def mean_iou(model: Callable[[Tensor], Tensor], batches: DataLoader[Any]) -> float:
    """Mean over the classes of the shared pixels over those of either; void pixels do not count."""
    shared, either = torch.zeros(KINDS + 1), torch.zeros(KINDS + 1)
    for batch in batches:
        scores = F.interpolate(model(batch["images"]), (SIZE, SIZE), mode="bilinear", align_corners=False)
        guess, labels = scores.argmax(1), batch["labels"]
        for kind in range(KINDS + 1):
            own, right = (guess == kind) & (labels != VOID), labels == kind
            shared[kind] += (own & right).sum()
            either[kind] += (own | right).sum()
    return float((shared / either.clamp(min=1)).mean())


class Module(LightningModule):
    """A network of this file and its loss; it knows nothing of distillation."""

    def __init__(self, network: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = network, loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.loss(self.net(batch["images"]), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(
    make: Callable[[int], nn.Module],
    loss: Callable[[Any, Any], Tensor],
    width: int,
    scenes: list[Scene],
    epochs: int,
    *callbacks: Callback,
) -> nn.Module:
    """A network of that width after a training by Lightning; callbacks know it as ``net``."""
    torch.manual_seed(0)
    module = Module(make(width), loss)
    Trainer(max_epochs=epochs, callbacks=[*callbacks], **QUIET).fit(module, loader(scenes))
    return module.net.eval()
