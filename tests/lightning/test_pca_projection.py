"""Projections of embeddings, and their start in the teacher's principal components (V21)."""

from __future__ import annotations

import copy

import nets
import numpy as np
import pytest
import torch
from published import check, entries, leaves
from sklearn.decomposition import PCA
from torch import Tensor

from distill_core.principal import PrincipalComponents
from lightning_distill import Distiller, FeatureDistillation, PCAProjection
from lightning_distill.losses import FeatureDistance


def embeddings(rows: int = 60, width: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scales = torch.linspace(3, 0.1, width)
    return torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator) * scales + 2


@entries("embed_distill")
def test_a_projection_with_mse_equals_the_published_implementation(entry: dict) -> None:
    tensors = leaves(entry)
    weight, bias = (tensors[f"param_projection.{name}"].requires_grad_() for name in ("weight", "bias"))
    projected = torch.nn.functional.linear(tensors["student_embeddings"], weight, bias)

    check(FeatureDistance("mse")(projected, tensors["teacher_embeddings"]), entry, tensors)

    torch.testing.assert_close(weight.grad, tensors["gradp_projection.weight"])
    torch.testing.assert_close(bias.grad, tensors["gradp_projection.bias"])


def test_the_coordinates_of_the_components_are_mapped_to_the_best_reconstruction() -> None:
    features = embeddings()
    pca = PCA(4, svd_solver="full").fit(features.numpy())
    components = PrincipalComponents(features.numpy()).components[:4]
    coordinates = (features - features.mean(0)) @ torch.from_numpy(components.T)

    adapter = PCAProjection(features)(torch.Size((60, 4)), torch.Size((60, 9)))

    best = pca.inverse_transform(pca.transform(features.numpy()))
    np.testing.assert_allclose(adapter(coordinates).detach(), best, atol=1e-4)
    np.testing.assert_allclose(np.abs(components), np.abs(pca.components_), atol=1e-4)


def test_a_wider_student_gets_all_components_and_zeros() -> None:
    adapter = PCAProjection(embeddings())(torch.Size((60, 12)), torch.Size((60, 9)))

    assert adapter.weight.shape == (9, 12)
    torch.testing.assert_close(adapter.weight @ adapter.weight.T, torch.eye(9), atol=1e-5, rtol=0)
    assert not adapter.weight[:, 9:].any()


def test_a_terms_adapter_starts_there() -> None:
    teacher, student, (x, y) = nets.teacher(), nets.student(), nets.digits()
    with torch.no_grad():
        features = torch.tanh(teacher.layer1(x.flatten(1)))
    projection = PCAProjection(features)
    term = FeatureDistillation("layer1", "layer1", adapter=projection)
    distiller = Distiller(student, teacher, [term])

    with distiller.record():
        output = student(x)
    distiller.total(torch.nn.functional.cross_entropy(output, y))

    weight, bias = distiller.parameters()
    start = projection(torch.Size((24, 6)), torch.Size((24, 10)))
    torch.testing.assert_close(weight, start.weight)
    torch.testing.assert_close(bias, start.bias)
    expected = (
        (student.layer1(x.flatten(1)) @ start.weight.T + start.bias - teacher.layer1(x.flatten(1))).square().mean()
    )
    torch.testing.assert_close(distiller.parts["layer1_loss"], expected)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (torch.ones(5), r"to have the shape \(N, D\) with two rows or more, but got \(5,\)"),
        (torch.ones(1, 5), r"with two rows or more, but got \(1, 5\)"),
        (torch.full((3, 5), torch.nan), "to be finite, but got NaN"),
    ],
)
def test_features_that_have_no_components_are_refused(features: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PCAProjection(features)


def test_features_of_another_layer_or_of_too_few_items_are_refused_when_the_adapter_is_made() -> None:
    with pytest.raises(ValueError, match="to have the 7 dimensions of the teacher's layer, but got 9"):
        PCAProjection(embeddings())(torch.Size((2, 3)), torch.Size((2, 7)))
    with pytest.raises(ValueError, match="to have more than 4 rows for as many components, but got 4"):
        PCAProjection(embeddings(4))(torch.Size((2, 4)), torch.Size((2, 9)))


def test_something_else_than_a_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="Expected `features` to be a tensor, but got a list"):
        PCAProjection([[1.0, 2.0]])  # type: ignore[arg-type]


def test_a_copy_starts_alike() -> None:
    projection = PCAProjection(embeddings())
    shapes = torch.Size((2, 3)), torch.Size((2, 9))
    torch.testing.assert_close(copy.deepcopy(projection)(*shapes).weight, projection(*shapes).weight)
