"""A projection that starts in the principal components of the teacher's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill_core.principal import PrincipalComponents


class PCAProjection:
    """An adapter whose output starts as the teacher's mean plus its principal components, weighted by the student.

    The student's numbers are then the coordinates of the teacher's features in their principal components, which is the
    best start that a student with fewer dimensions has. The adapter is trained like any other.

    Args:
        features: Features of the teacher for some items, ``(N, D)``, with more rows than the student has dimensions.

    Raises:
        TypeError: If ``features`` is not a tensor.
        ValueError: If it has another shape, or numbers that are not finite. When the adapter is made, if it has too few
            rows or other dimensions than the teacher's layer.

    Example:
        >>> from lightning_distill import FeatureDistillation
        >>> embeddings = torch.randn(100, 8)  # of the teacher
        >>> term = FeatureDistillation("pooler", "pooler", adapter=PCAProjection(embeddings))
        >>> PCAProjection(embeddings)(torch.Size((2, 3)), torch.Size((2, 8)))
        Linear(in_features=3, out_features=8, bias=True)

    References:
        Kim et al. 2023, arXiv:2301.12005 (projection of the student's embeddings); deviation: the start.
    """

    def __init__(self, features: Tensor) -> None:
        if not isinstance(features, Tensor):
            raise TypeError(f"Expected `features` to be a tensor, but got a {type(features).__name__}.")
        self._principal = PrincipalComponents(features.detach().double().cpu().numpy())

    def __call__(self, student: torch.Size, teacher: torch.Size) -> nn.Linear:
        """The adapter between vectors ``(N, D)`` or tokens ``(N, L, D)`` of these shapes."""
        weights = self._principal.weights(student[-1], teacher[-1])
        adapter = nn.Linear(student[-1], teacher[-1])
        with torch.no_grad():
            adapter.weight.copy_(torch.from_numpy(weights.T))
            adapter.bias.copy_(torch.from_numpy(self._principal.mean))
        return adapter
