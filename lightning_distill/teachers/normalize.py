"""Images that are normalised for the student, made into the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_core.normalization import Normalization
from lightning_distill import checks


class Normalize(Normalization):
    """Subtracts a mean from images ``(N, C, H, W)``, divides by a standard deviation, and resizes them.

    For ``teacher_inputs``: ``Normalize.between(student=(mean, std), teacher=(mean, std), size=224)`` undoes the
    student's normalisation and applies the teacher's. Sizes change bilinearly with antialiasing. The images may be the
    only input, the first of several, or an entry ``"pixel_values"`` of a dict.

    Args:
        mean: The means that are subtracted, one for each channel.
        std: The standard deviations that are divided by, as many.
        size: Height and width of the result: a number for both, a pair, or None to leave the size as it is.

    Raises:
        TypeError: If a setting has another type.
        ValueError: If the lengths differ, a standard deviation is not greater than 0, or a size is not a whole number
            of pixels.

    Example:
        >>> student, teacher = ([0.5, 0.5], [0.5, 0.25]), ([0.5, 0.25], [0.25, 0.25])
        >>> Normalize.between(student, teacher)(torch.ones(1, 2, 1, 1)).flatten()
        tensor([2., 2.])
    """

    def _channel_axis(self) -> int:
        return 1

    def _changed(self, images: Tensor) -> Tensor:
        checks.floating("images", images)
        dtype = torch.promote_types(images.dtype, torch.float32)
        mean, std = (
            torch.tensor(values, dtype=dtype, device=images.device)[:, None, None] for values in (self.mean, self.std)
        )
        changed = (images.to(dtype) - mean) / std
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            changed = F.interpolate(changed, self.size, mode="bilinear", antialias=True)
        return changed.to(images.dtype)
