"""Principal components of features, as the start of a projection."""

from __future__ import annotations

from typing import Any

import numpy as np


class PrincipalComponents:
    """Mean and principal components of features.

    The sign of a component makes its largest number positive, so that it does not depend on the machine.

    Args:
        features: The features, ``(N, D)``.

    Attributes:
        mean: Their mean, ``(D,)``, float32.
        components: The components, ``(min(D, N - 1), D)``, orthonormal, of falling variance, float32.

    Raises:
        ValueError: If ``features`` is not of that shape, has fewer than two rows, or is not finite.

    Example:
        >>> principal = PrincipalComponents(np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]))
        >>> principal.mean.tolist(), principal.weights(1, 2).tolist()
        ([2.0, 1.0], [[1.0, 0.0]])
    """

    def __init__(self, features: Any) -> None:
        rows = np.asarray(features, "float64")
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(
                f"Expected `features` to have the shape (N, D) with two rows or more, but got {rows.shape}. Pass a row"
                " for each item."
            )
        if not np.isfinite(rows).all():
            raise ValueError("Expected `features` to be finite, but got NaN or infinite numbers.")
        mean = rows.mean(0)
        _, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean))  # of rising variance
        components = vectors.T[::-1][: len(rows) - 1]
        largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
        self.mean = mean.astype("float32")
        self.components = (components * np.sign(largest)).astype("float32")

    def weights(self, student: int, teacher: int) -> np.ndarray:
        """The first components, one for each of the student's dimensions.

        Args:
            student: Number of the student's dimensions.
            teacher: Number of the teacher's dimensions.

        Returns:
            Shape ``(student, teacher)``; rows beyond the teacher's dimensions are zeros.

        Raises:
            ValueError: If the features had other dimensions, or too few rows.
        """
        number, width = self.components.shape
        if width != teacher:
            raise ValueError(
                f"Expected `features` to have the {teacher} dimensions of the teacher's layer, but got {width}. Pass"
                " features of that layer."
            )
        if number < min(student, width):
            raise ValueError(
                f"Expected `features` to have more than {min(student, width)} rows for as many components, but got"
                f" {number + 1}. Pass the teacher's features of more items."
            )
        return np.pad(self.components[:student], [(0, max(student - number, 0)), (0, 0)])
