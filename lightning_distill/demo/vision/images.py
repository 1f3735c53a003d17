"""The demonstration's images: handwritten digits in front of crops of two photos, both part of scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

SIZE, CLASSES = 24, 10


@dataclass(frozen=True)
class Images:
    """Images with the classes of their digits.

    Args:
        train: Images ``(N, 3, 24, 24)`` from 0 to 1, and classes ``(N,)``.
        test: As many of other digits, in front of other parts of the photos.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def few(self, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
        """So many images of each class, drawn from those to train on; more labels continue fewer."""
        images, classes = self.train
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([order[classes[order] == number][:per_class] for number in range(CLASSES)])
        return images[rows], classes[rows]


def load_images(copies: int = 3, digits: int | None = None) -> Images:
    """The images, the same in every call.

    Args:
        copies: Number of images of each digit, each in front of another crop.
        digits: Number of digits; ``None`` takes all.

    Returns:
        The images. Three quarters of the digits are to train on, with crops from the left of the photos; the others
        are to test, with crops from the right.
    """
    generator = torch.Generator().manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator)[:digits]
    shapes = torch.from_numpy(data.images).float()[order, None] / 16
    shapes = F.interpolate(shapes, (SIZE, SIZE), mode="bilinear")
    classes = torch.from_numpy(data.target).long()[order]
    photos = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2) / 255
    edge, held = photos.shape[-1] * 3 // 4, len(classes) // 4
    return Images(
        train=_drawn(shapes[held:], classes[held:], photos[..., :edge], copies, generator),
        test=_drawn(shapes[:held], classes[:held], photos[..., edge:], 1, generator),
    )


def _drawn(
    shapes: Tensor, classes: Tensor, photos: Tensor, copies: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each digit in front of some crops: the crop's colours are inverted where the digit is."""
    shapes, classes = shapes.repeat(copies, 1, 1, 1), classes.repeat(copies)
    count, (height, width) = len(shapes), photos.shape[-2:]
    which = torch.randint(len(photos), (count,), generator=generator).tolist()
    tops = torch.randint(height - 2 * SIZE, (count,), generator=generator).tolist()
    lefts = torch.randint(width - 2 * SIZE, (count,), generator=generator).tolist()
    crops = torch.stack(
        [
            photos[photo, :, top : top + 2 * SIZE : 2, left : left + 2 * SIZE : 2]
            for photo, top, left in zip(which, tops, lefts, strict=True)
        ]
    )
    return (crops - shapes).abs(), classes
