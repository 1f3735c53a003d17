"""Where the tokens of an image lie: grids, prefix tokens, layouts, and errors in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import make
from torch import Tensor, nn

from distill_core.grids import Grid, find_grid, smoothing_matrix
from lightning_distill import Call, Distiller, FeatureDistillation, Tap, TeacherCache
from lightning_distill.adapters.shapes import calls_of, describe
from lightning_distill.losses import AttentionTransferLoss, SimilarityPreservingLoss, VariationalInformationLoss
from lightning_distill.recording import Recorder, Recording


class Patches(nn.Module):
    """A ViT without attention: ``tokens`` returns prefix tokens, then patches of 4 x 4 pixels."""

    def __init__(self, prefix: int = 1, width: int = 6) -> None:
        super().__init__()
        self.embed, self.prefix = nn.Conv2d(3, width, 4, stride=4), nn.Parameter(torch.randn(1, prefix, width))
        self.tokens = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        return self.tokens(torch.cat([self.prefix.expand(len(images), -1, -1), patches], 1)).mean(1)


class Convolutions(nn.Module):
    """``maps`` returns a map of half the height and width, ``pool`` one of a single position."""

    def __init__(self, channels: int = 5) -> None:
        super().__init__()
        self.maps, self.pool = nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.maps(images)).flatten(1)


def loss_of(student: nn.Module, teacher: Any, term: FeatureDistillation, images: Tensor) -> tuple[Tensor, Any]:
    distiller = Distiller(student, teacher, term, task_weight=0)
    with distiller.record():
        student(images)
    return distiller.loss(), distiller


@pytest.mark.parametrize(
    ("tokens", "image", "prefix", "grid"),
    [
        (197, (224, 224), None, Grid(1, 14, 14)),  # ViT
        (198, (224, 224), None, Grid(2, 14, 14)),  # DeiT
        (201, (224, 224), None, Grid(5, 14, 14)),  # DINO with registers
        (1370, (518, 518), None, Grid(1, 37, 37)),  # DINOv2
        (49, (224, 224), None, Grid(0, 7, 7)),  # Swin
        (33, (16, 32), None, Grid(1, 4, 8)),  # the proportions of the image
        (50, None, None, Grid(1, 7, 7)),
        (9, (36, 36), 0, Grid(0, 3, 3)),
        (81, (64, 64), 17, Grid(17, 8, 8)),
        (26, (22, 23), 1, Grid(1, 5, 5)),  # a rest at the edges
    ],
)
def test_the_grid_is_found_by_number_and_proportions(tokens: int, image: Any, prefix: Any, grid: Grid) -> None:
    assert find_grid(tokens, image, prefix, "feature 'x'") == grid


@pytest.mark.parametrize(
    ("tokens", "image", "prefix", "words"),
    [
        (9, (36, 36), None, r"several grids .* 3 x 3 after 0 tokens and 2 x 2 after 5 .* prefix_tokens=<number of"),
        (81, (64, 64), None, r"81 tokens of feature 'x' .* no grid .* 64 x 64 pixels\. Pass Tap\(layer, prefix_tokens"),
        (26, (22, 23), None, "after 0 to 5 class and register tokens, but got no grid"),
        (197, (224, 224), 3, r"after 3 prefix tokens, but got no grid .* Correct `prefix_tokens`"),
        (33, None, None, "proportions of an input of unknown size"),
        (1, (32, 32), 1, "after 1 prefix token, but got no grid"),
    ],
)
def test_a_grid_that_is_not_certain_is_refused_in_words(tokens: int, image: Any, prefix: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_grid(tokens, image, prefix, "feature 'x'")


@pytest.mark.parametrize(("size", "smaller"), [(4, 2), (7, 3), (16, 7), (37, 16), (5, 5), (9, 1)])
def test_the_matrix_resizes_as_torch_does(size: int, smaller: int) -> None:
    line = torch.eye(size, dtype=torch.float64)[None, None]
    resized = F.interpolate(line, (smaller, size), mode="bilinear", antialias=True)[0, 0]
    torch.testing.assert_close(torch.from_numpy(smoothing_matrix(size, smaller)), resized, rtol=0, atol=1e-12)


@pytest.mark.parametrize("swapped", [False, True], ids=["map to tokens", "tokens to map"])
def test_images_that_are_not_square_keep_their_proportions(swapped: bool) -> None:
    images = make(torch.randn, 3, 2, 3, 8, 16).double()
    vit, cnn = make(Patches, 1, 3).double(), make(Convolutions, 2).double()
    student, teacher = (vit, cnn) if swapped else (cnn, vit)
    layers = ("tokens", "maps") if swapped else ("maps", "tokens")
    loss, distiller = loss_of(student, teacher, FeatureDistillation(*layers), images)
    embedded = vit.embed(images).flatten(2).transpose(1, 2)
    patches = vit.tokens(embedded).reshape(2, 2, 4, 6).permute(0, 3, 1, 2)
    small = F.interpolate(cnn.maps(images), (2, 4), mode="bilinear", antialias=True)
    adapter = distiller.terms[0].adapters[0]
    mapped = (adapter(patches), small) if swapped else (adapter(small), patches)
    torch.testing.assert_close(loss, F.mse_loss(*mapped))
    own = (student.tokens if swapped else student.maps).weight
    (gradient,) = torch.autograd.grad(loss, own)
    student.zero_grad()
    expected = F.mse_loss(mapped[0], mapped[1].detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, own)[0], rtol=1e-9, atol=0)


def test_prefix_tokens_of_a_tap_are_left_out_wherever_it_is_read() -> None:
    vit, images = Patches(3), torch.randn(2, 3, 8, 8)
    taps = [Tap("tokens"), Tap("tokens", prefix_tokens=3)]
    recorder = Recorder(vit, taps, "student")
    with Recording([recorder]):
        vit(images)
    whole, patches = (recorder.calls[0].feature(tap) for tap in taps)
    torch.testing.assert_close(patches, whole[:, 3:])


def test_more_prefix_tokens_than_are_tried_are_named() -> None:
    cnn, vit, images = Convolutions(), Patches(9), torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"teacher feature 'tokens' .* Pass Tap\(layer, prefix_tokens"):
        loss_of(cnn, vit, FeatureDistillation("maps", "tokens"), images)
    loss, _ = loss_of(cnn, vit, FeatureDistillation("maps", Tap("tokens", prefix_tokens=9)), images)
    assert loss > 0


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"prefix_tokens": -1}, ValueError, "`prefix_tokens` to be at least 0"),
        ({"prefix_tokens": 1.0}, TypeError, "`prefix_tokens` to be an int"),
        ({"layout": "NHWC"}, ValueError, "`layout` to be one of 'channels_last', 'channels_first'"),
    ],
)
def test_a_tap_checks_its_settings(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Tap("layer", **settings)


@pytest.mark.parametrize(
    ("tap", "words"),
    [
        (Tap("maps", prefix_tokens=1), r"layer 'maps' to return more than 1 tokens, .* Correct `prefix_tokens`"),
        (Tap("", layout="channels_last"), r"to return a map for layout='channels_last', .* Leave out `layout`"),
    ],
)
def test_a_tap_that_does_not_fit_its_feature_says_so(tap: Tap, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loss_of(Convolutions(), Convolutions(), FeatureDistillation(tap, tap), torch.randn(2, 3, 8, 8))


def test_a_pooled_map_of_one_position_is_a_vector() -> None:
    cnn, vit, images = Convolutions(), Patches(), torch.randn(2, 3, 8, 8)
    loss, distiller = loss_of(cnn, vit, FeatureDistillation("pool", ""), images)
    adapter = distiller.terms[0].adapters[0]
    torch.testing.assert_close(loss, F.mse_loss(adapter(cnn(images)), vit(images)))


def test_tokens_of_texts_of_two_lengths_are_not_taken_for_images() -> None:
    term = FeatureDistillation("layer", "layer")
    student, teacher = (Call.from_outputs(features={("layer", "output"): torch.ones(2, n, 3)}) for n in (9, 16))
    term.build(student, [teacher])
    with pytest.raises(ValueError, match=r"to have equal shapes, but got \(2, 9, 3\) and \(2, 16, 3\)"):
        term(student, teacher)


@pytest.mark.parametrize("loss", [AttentionTransferLoss, VariationalInformationLoss, SimilarityPreservingLoss])
def test_losses_with_other_requirements_train_between_tokens_and_maps(loss: Any) -> None:
    images = torch.randn(4, 3, 16, 16)
    for student, teacher, layers in [
        (Convolutions(), Patches(), ("maps", "tokens")),
        (Patches(), Convolutions(), ("tokens", "maps")),
    ]:
        value, _ = loss_of(student, teacher, FeatureDistillation(*layers, loss()), images)
        value.backward()
        assert getattr(student, layers[0]).weight.grad.abs().sum() > 0


def test_a_cache_keeps_tokens_and_serves_them_as_a_map(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4))
    vit, cnn, images = Patches(), Convolutions(), data.tensors[0]
    tap = Tap("tokens", prefix_tokens=1)
    cache = TeacherCache.build(vit, data, tmp_path, layers=[tap], dtype="float32", progress=False)
    expected, distiller = loss_of(cnn, vit, FeatureDistillation("maps", tap), images)
    adapter = distiller.terms[0].adapters[0]
    assert cache.read([0])["feature0"].shape == (1, 5, 6)
    cached = Distiller(cnn, cache, FeatureDistillation("maps", tap), task_weight=0)
    batch = next(iter(torch.utils.data.DataLoader(cache.attach(data), batch_size=4)))
    with cached.record():
        cnn(images)
    cached.loss(batch)
    cached.parameters()  # an plain optimizer would train them
    cached.terms[0].adapters[0].load_state_dict(adapter.state_dict())
    with cached.record():
        cnn(images)
    torch.testing.assert_close(cached.loss(batch), expected)


@pytest.mark.parametrize("image", [(16, 16), (8, 32)])
def test_a_process_without_a_batch_makes_its_parts_from_the_shapes_and_the_size_of_the_images(image: Any) -> None:
    cnn, vit, images = Convolutions(), Patches(), torch.randn(2, 3, *image)
    term = FeatureDistillation("maps", "tokens", VariationalInformationLoss())
    distiller = Distiller(cnn, vit, term, task_weight=0)
    with distiller.record():
        cnn(images)
    (student,) = distiller._step.student.find()
    answers = distiller._step.answers(student)
    owned = distiller.terms[0]
    distiller.loss()
    expected = {name: value.shape for name, value in owned.state_dict().items()}
    owned.remake(owned.reset)
    shapes = describe(owned, student, answers)
    owned.remake(owned.build, *calls_of(owned, shapes, torch.device("cpu")))
    assert expected
    assert {name: value.shape for name, value in owned.state_dict().items()} == expected


def test_half_precision_is_resized_in_float32() -> None:
    cnn, vit = make(Convolutions, 1), make(Patches, 2)
    images = make(torch.randn, 3, 2, 3, 16, 16)
    term = FeatureDistillation("maps", "tokens")
    plain, distiller = loss_of(cnn, vit, term, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, other = loss_of(cnn, vit, term, images)
    assert torch.equal(distiller.terms[0].adapters[0].weight, other.terms[0].adapters[0].weight)
    torch.testing.assert_close(half, plain, rtol=2e-2, atol=0)
