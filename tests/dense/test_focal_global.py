"""Boxes in terms on feature maps: their weights, focal and global distillation, where batches keep them."""

from __future__ import annotations

from typing import Any

import oracle_learned
import pytest
import torch
import torch.nn.functional as F
from learned_golden import focal_global_parameters, focal_global_settings, published_weights
from lightning.pytorch import Trainer
from loss_case import golden_arrays, golden_index
from scenes import Net, Scenes, Segmenter, close, loader, with_boxes
from torch import Tensor, nn

from lightning_distill import DistillCallback, Distiller, FeatureDistillation, FocalGlobalLoss, SolutionFlowLoss, Tap
from lightning_distill.functional import focal_global, foreground_weights

ALL = Tap("neck", output="*")
BATCH = with_boxes([*Scenes(2, 16)])


def weights_by_hand(boxes: Tensor, image_size: tuple[int, int], map_size: tuple[int, int]) -> Tensor:
    """Cell by cell: 1 over the number of cells that a box overlaps, the largest of all boxes."""
    weights = torch.zeros(map_size)
    high, wide = image_size[0] / map_size[0], image_size[1] / map_size[1]
    for left, top, right, bottom in boxes.tolist():
        cells = [
            (i, j)
            for i in range(map_size[0])
            for j in range(map_size[1])
            if min(right, (j + 1) * wide) > max(left, j * wide) and min(bottom, (i + 1) * high) > max(top, i * high)
        ]
        for i, j in cells:
            weights[i, j] = max(weights[i, j], 1 / len(cells))
    return weights


@pytest.mark.parametrize("map_size", [(4, 4), (3, 5), (16, 16), (1, 1)])
def test_weights_equal_a_count_of_the_cells_of_each_box(map_size: tuple[int, int]) -> None:
    boxes = [
        torch.tensor([[1.0, 2, 9, 5], [3, 3, 4, 4], [0, 0, 20, 12]]),
        torch.zeros(0, 4),
        torch.tensor([[4.0, 4, 8, 8]]),
    ]

    weights = foreground_weights(boxes, (12, 20), map_size)

    close(weights, torch.stack([weights_by_hand(each, (12, 20), map_size) for each in boxes]))


def test_boxes_without_an_area_do_not_count() -> None:
    padded = torch.tensor([[[0.0, 0, 4, 4], [-1, -1, -1, -1], [2, 2, 2, 8]]])

    assert torch.equal(foreground_weights(padded, (8, 8), (2, 2)), torch.tensor([[[1.0, 0], [0, 0]]]))


def test_boxes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `boxes` to have left, top, right and bottom of each box, shape"):
        foreground_weights([torch.zeros(4)], (8, 8), (2, 2))


@pytest.mark.parametrize("entry", golden_index("fgd"), ids=lambda entry: entry["case"])
def test_the_loss_equals_the_published_implementation(entry: dict[str, Any]) -> None:
    """Its boxes cover one more position at the right and at the bottom than the paper's."""
    arrays, tolerance = golden_arrays(entry), entry["tolerance_suggested"]["float64"]
    student = torch.as_tensor(arrays["student_feat"]).requires_grad_()
    aligned = student
    if "param_align.weight" in arrays:  # the term's adapter
        aligned = F.conv2d(student, *(torch.as_tensor(arrays[f"param_align.{name}"]) for name in ("weight", "bias")))
    teacher = torch.as_tensor(arrays["teacher_feat"])
    loss = FocalGlobalLoss(**focal_global_settings(entry["hyperparameters"]))
    loss.build(teacher.shape, teacher.shape)
    loss.double().load_state_dict({k: torch.as_tensor(v) for k, v in focal_global_parameters(arrays).items()})

    value = loss(aligned, teacher, published_weights(arrays))
    value.backward()

    torch.testing.assert_close(value.detach(), torch.as_tensor(arrays["loss"]), **tolerance)
    torch.testing.assert_close(student.grad, torch.as_tensor(arrays["grad_student_feat"]), **tolerance)
    for name, gradient in focal_global_parameters(arrays, "gradp").items():
        torch.testing.assert_close(loss.get_parameter(name).grad, torch.as_tensor(gradient), **tolerance)


def test_nothing_is_added_to_a_map_before_the_contexts_have_learned() -> None:
    feature = torch.randn(2, 4, 3, 3)
    loss = FocalGlobalLoss()
    loss.build(feature.shape, feature.shape)

    assert torch.equal(loss.student_context(feature), feature)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)), r"Expected `student` to be a map \(N, C, H, W\)"),
        (
            (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(2, 4)),
            r"Expected `foreground` to have a weight for each position, shape \(2, 4, 4\), but got shape \(2, 4\)\.",
        ),
    ],
)
def test_other_shapes_are_refused(arguments: Any, words: str) -> None:
    same = {f"{who}_context": lambda feature, positions: feature for who in ("student", "teacher")}
    with pytest.raises(ValueError, match=words):
        focal_global(*arguments, **same)


def test_a_loss_of_vectors_cannot_be_built() -> None:
    with pytest.raises(ValueError, match=r"Expected `student` and `teacher` to be maps \(N, C, H, W\), but got shapes"):
        FocalGlobalLoss().build(torch.Size((2, 3)), torch.Size((2, 3)))


# In terms -------------------------------------------------------------------------------------------------------------


def value(term: Any, student: nn.Module, teacher: nn.Module, batch: Any = BATCH) -> tuple[Tensor, Distiller]:
    distiller = Distiller(student, teacher, term, task_weight=0)
    with distiller.record():
        output = student(BATCH["images"])
    return distiller.total(output.mean(), batch), distiller


@pytest.mark.parametrize(
    "place", ["boxes", lambda batch: [{"boxes": boxes} for boxes in batch["boxes"]]], ids=["key", "targets"]
)
def test_each_level_of_a_pyramid_has_its_own_weights_of_the_batch_s_boxes(place: Any) -> None:
    student, teacher = Net(3, 0), Net(4, 1)

    total, distiller = value(FeatureDistillation(ALL, ALL, FocalGlobalLoss(), boxes=place), student, teacher)

    (term,) = distiller.terms
    expected = []
    for level, (feature, target) in enumerate(
        zip(student.neck(BATCH["images"]).values(), teacher.neck(BATCH["images"]).values(), strict=True)
    ):
        weights = torch.stack([weights_by_hand(boxes, (16, 16), feature.shape[2:]) for boxes in BATCH["boxes"]])
        parameters = {name: p.detach().double().numpy() for name, p in term.learned[level].named_parameters()}
        adapted = term.adapters[level](feature)
        arrays = [tensor.detach().double().numpy() for tensor in (adapted, target)]
        expected.append(
            oracle_learned.focal_global(*arrays, parameters=parameters, foreground=weights.double().numpy())
        )
    assert total.item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_other_losses_count_the_positions_in_boxes_alone() -> None:
    student, teacher = Net(3, 0), Net(3, 1)

    total, _ = value(FeatureDistillation(ALL, ALL, "mse", boxes="boxes"), student, teacher)

    expected = []
    for name, feature in student.neck(BATCH["images"]).items():
        inside = torch.stack([weights_by_hand(boxes, (16, 16), feature.shape[2:]) for boxes in BATCH["boxes"]]) > 0
        apart = (feature - teacher.neck(BATCH["images"])[name]).square().mean(1)
        expected.append(apart[inside].mean())
    close(total, sum(expected) / 2)


def test_boxes_and_a_mask_of_images_count_together() -> None:
    student, teacher = Net(3, 0), Net(3, 1)
    batch = {**BATCH, "used": torch.tensor([True, False])}

    total, _ = value(FeatureDistillation("neck.fine", "neck.fine", boxes="boxes", mask="used"), student, teacher, batch)

    inside = weights_by_hand(BATCH["boxes"][0], (16, 16), (8, 8)) > 0
    apart = (student.neck.fine(BATCH["images"]) - teacher.neck.fine(BATCH["images"])).square().mean(1)
    close(total, apart[0][inside].mean())


def test_a_mask_of_channels_beside_boxes_is_refused() -> None:
    student, images = Net(8, 0), BATCH["images"][:, :, :8]  # maps of 8 channels and 4 x 8 positions
    batch = {"boxes": [torch.tensor([[1.0, 1.0, 7.0, 7.0]])] * 2, "used": torch.rand(2, 8, 4) < 0.5}
    term = FeatureDistillation("neck.fine", "neck.fine", boxes="boxes", mask="used")
    with Distiller(student, Net(8, 1), term) as distiller:
        with distiller.record():
            output = student(images)
        with pytest.raises(ValueError, match=r"Expected `mask` to have the shape \(2, 4, 8\)"):
            distiller.total(output.mean(), batch)


class Resizing(nn.Module):
    """A network that gets a list of images and resizes them itself, as the detectors of torchvision."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.transform, self.net = Halved(), Net(3, seed)

    def forward(self, images: list[Tensor], targets: Any = None) -> Tensor:
        return self.net(self.transform(images, targets)[0])


class Halved(nn.Module):
    def forward(self, images: list[Tensor], targets: Any) -> tuple[Tensor, Any]:
        smaller = F.pad(F.avg_pool2d(torch.stack(images), 2), (0, 8))  # padded at the right
        return smaller, targets and [{**target, "boxes": target["boxes"] / 2} for target in targets]


def test_boxes_of_images_that_the_network_resizes_are_read_by_a_tap() -> None:
    student, teacher = Resizing(0), Resizing(1)
    images, targets = [*BATCH["images"]], [{"boxes": boxes} for boxes in BATCH["boxes"]]
    distiller = Distiller(
        student, teacher, FeatureDistillation("net.neck.fine", "net.neck.fine", boxes=Tap("transform")), task_weight=0
    )
    with distiller.record():
        output = student(images, targets)

    total = distiller.total(output.mean(), (images, targets))

    inputs = student.transform(images, None)[0]
    apart = (student.net.neck.fine(inputs) - teacher.net.neck.fine(inputs)).square().mean(1)
    inside = torch.stack([weights_by_hand(boxes / 2, (8, 16), (4, 8)) for boxes in BATCH["boxes"]]) > 0
    close(total, apart[inside].mean())


def test_a_list_of_images_needs_a_tap() -> None:
    student = Resizing(0)
    distiller = Distiller(
        student, Resizing(1), FeatureDistillation("net.neck.fine", "net.neck.fine", boxes=lambda batch: batch[1])
    )
    with distiller.record():
        output = student([*BATCH["images"]])

    with pytest.raises(
        ValueError,
        match=r"Expected the student to be called with images \(N, C, H, W\) for boxes=.*, but got another input\. Pass"
        r" boxes=Tap\(\"transform\"\)",
    ):
        distiller.total(output.mean(), (None, BATCH["boxes"]))


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        (None, r"Expected the batch to hold boxes \(M, 4\) for each of 2 images at boxes='boxes', but got NoneType\."),
        (BATCH["boxes"][:1], r"for each of 2 images at boxes='boxes', but got 1\. Pass a key, an index, or a function"),
        ([boxes / 16 for boxes in BATCH["boxes"]], r"in pixels of the student's input, but got shares of the image"),
        (
            [boxes[:, [2, 3, 0, 1]] for boxes in BATCH["boxes"]],
            r"but got a right edge left of the left one, or a bottom",
        ),
        (
            [boxes * 2 for boxes in BATCH["boxes"]],
            r"but got an edge beyond the image of 16 x 16 pixels\. Pass a function",
        ),
        ([boxes * torch.nan for boxes in BATCH["boxes"]], r"but got a number that is not finite\. Pass a function"),
    ],
    ids=["missing", "too few", "shares", "swapped", "of larger images", "not numbers"],
)
def test_wrong_boxes_are_refused_before_the_first_backward(boxes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        value(FeatureDistillation(ALL, ALL, boxes="boxes"), Net(3, 0), Net(3, 1), {**BATCH, "boxes": boxes})


@pytest.mark.parametrize("padding", [0.0, -1.0])
def test_a_first_batch_of_images_without_objects_may_be_padded(padding: float) -> None:
    boxes = torch.full((2, 3, 4), padding)
    loss, _ = value(FeatureDistillation(ALL, ALL, boxes="boxes"), Net(3, 0), Net(3, 1), {**BATCH, "boxes": boxes})
    assert loss.item() == 0


def test_boxes_need_a_batch() -> None:
    with pytest.raises(ValueError, match=r"Expected a batch for boxes='boxes', but got none\. Call distiller\.total"):
        value(FeatureDistillation(ALL, ALL, boxes="boxes"), Net(3, 0), Net(3, 1), None)


def test_a_tap_on_boxes_must_return_images_and_targets() -> None:
    with pytest.raises(
        ValueError, match=r"Expected student layer 'neck' to return images and their targets for boxes="
    ):
        value(FeatureDistillation("neck.fine", "neck.fine", boxes=Tap("neck")), Net(3, 0), Net(3, 1))


def test_an_unknown_layer_of_boxes_is_named_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match=r"to name a module of the student, but got 'transfrom'"):
        Distiller(
            Resizing(0), Resizing(1), FeatureDistillation("net.neck.fine", "net.neck.fine", boxes=Tap("transfrom"))
        )


def test_boxes_need_maps() -> None:
    student, teacher = Net(3, 0), Net(3, 1)
    flat = Tap("neck.fine", output=lambda feature: feature.flatten(2).mT)

    with pytest.raises(
        ValueError, match=r"Expected term 'neck.fine' to compare maps \(N, C, H, W\), since it has boxes"
    ):
        value(FeatureDistillation(flat, flat, boxes="boxes"), student, teacher)


def test_a_loss_that_needs_boxes_says_so_when_the_term_is_made() -> None:
    with pytest.raises(
        ValueError, match=r"Expected `boxes` to say where a batch keeps its boxes, which FocalGlobalLoss"
    ):
        FeatureDistillation("neck", "neck", FocalGlobalLoss())


def test_a_loss_over_several_layers_has_no_boxes() -> None:
    with pytest.raises(ValueError, match=r"Expected `boxes` to be None for SolutionFlowLoss, which compares several"):
        FeatureDistillation(["a", "b"], ["a", "b"], SolutionFlowLoss(), boxes="boxes")


def test_a_trainer_trains_the_contexts_of_each_level_and_a_checkpoint_holds_them(tmp_path: Any) -> None:
    def trainer(epochs: int) -> tuple[Trainer, DistillCallback]:
        distill = DistillCallback(Net(4, 1), FeatureDistillation(ALL, ALL, FocalGlobalLoss(), boxes="boxes"))
        settings = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        made = Trainer(callbacks=[distill], max_epochs=epochs, logger=False, enable_checkpointing=False, **settings)
        return made, distill

    straight, whole = trainer(2)
    module = Segmenter(Net(3, 0))
    straight.fit(module, loader(with_boxes))
    first, _ = trainer(1)
    first.fit(Segmenter(Net(3, 0)), loader(with_boxes))
    first.save_checkpoint(tmp_path / "last.ckpt")
    second, resumed = trainer(2)
    again = Segmenter(Net(3, 0))
    second.fit(again, loader(with_boxes), ckpt_path=tmp_path / "last.ckpt")

    assert {name.split(".")[0] for name in whole.terms[0].state_dict()} == {"adapters", "learned"}
    for name, tensor in whole.terms[0].state_dict().items():
        assert torch.equal(tensor, resumed.terms[0].state_dict()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
