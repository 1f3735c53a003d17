"""Segmentation: void pixels in every dense term, labels and teachers of other heights and widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from scenes import VOID, Net, Scenes, Segmenter, close, loader, stacked
from torch import Tensor, nn

from lightning_distill import (
    AttentionTransferLoss,
    Call,
    ChannelWiseLoss,
    DistillCallback,
    Distiller,
    FeatureDistance,
    FeatureDistillation,
    LogitsDistillation,
    NormalizedKDLoss,
    PixelRelationLoss,
    SimilarityPreservingLoss,
    SoftTargetLoss,
    functional,
)
from lightning_distill.terms.maps import resized_mask

images, masks = stacked([*Scenes(2, 16)])
images = 20 * images  # so that the scores of the pixels differ


def coarse() -> Net:
    """A network whose logits have a quarter of the height and width."""
    return Net(3, 0, stride=4)


def value(term: Any, student: Net, teacher: Net, labels: Tensor = masks) -> Tensor:
    distiller = Distiller(student, teacher, term, task_weight=0)
    with distiller.record():
        output = student(images)
    return distiller.total(output.mean(), (images, labels))


def kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """The divergence of each pixel."""
    logs, targets = (F.log_softmax(scores / temperature, 1) for scores in (student, teacher))
    return temperature**2 * (targets.exp() * (targets - logs)).sum(1)


def test_void_pixels_do_not_count_in_the_divergence_of_the_logits() -> None:
    student, teacher = Net(3, 0), Net(4, 1)

    total = value(LogitsDistillation(ignore_index=VOID), student, teacher)

    assert (masks == VOID).any()
    close(total, kl(student(images), teacher(images))[masks != VOID].mean())


def test_a_mask_counts_beside_the_void_pixels_and_must_have_their_size() -> None:
    student, teacher = Net(3, 0), Net(4, 1)
    columns = torch.arange(16) < 8

    total = value(LogitsDistillation(mask=lambda batch: columns.expand(2, 1, 16), ignore_index=VOID), student, teacher)

    close(total, kl(student(images), teacher(images))[(masks != VOID) & columns].mean())
    for mask in (torch.ones(2, 4, 4), torch.ones(16)):
        with pytest.raises(
            ValueError, match=r"to have the shape of the labels where ignore_index is given, \(2, 16, 16\)"
        ):
            value(LogitsDistillation(mask=lambda batch, mask=mask: mask, ignore_index=VOID), student, teacher)


def test_a_teacher_with_larger_logits_is_averaged_down() -> None:
    teacher = Net(4, 1)

    total = value(LogitsDistillation(), coarse(), teacher)

    smaller = F.avg_pool2d(teacher(images), 4)
    close(total, kl(coarse()(images), smaller).mean())


def test_a_teacher_with_smaller_logits_is_interpolated() -> None:
    student = Net(3, 0)

    total = value(LogitsDistillation(ignore_index=VOID), student, coarse())

    larger = F.interpolate(coarse()(images), (16, 16), mode="bilinear", align_corners=False)
    close(total, kl(student(images), larger)[masks != VOID].mean())


def test_a_coarse_position_counts_if_half_of_its_pixels_are_labelled() -> None:
    teacher = Net(4, 1, stride=4)

    total = value(LogitsDistillation(ignore_index=VOID), coarse(), teacher)

    labelled = torch.stack(
        [
            torch.stack([(masks[:, i : i + 4, j : j + 4] != VOID).sum((1, 2)) >= 8 for j in range(0, 16, 4)], 1)
            for i in range(0, 16, 4)
        ],
        1,
    )
    assert not labelled.all()
    close(total, kl(coarse()(images), teacher(images))[labelled].mean())


# The teacher's map that each term reads, and the term.
DENSE_TERMS = {
    "logits": ("", lambda **settings: LogitsDistillation(**settings)),
    "sharp logits": ("", lambda **settings: LogitsDistillation(SoftTargetLoss(1.0), **settings)),
    "channels of the logits": ("", lambda **settings: LogitsDistillation(ChannelWiseLoss(), **settings)),
    "pixels of the logits": ("", lambda **settings: FeatureDistillation("", "", PixelRelationLoss(), **settings)),
    "mse": ("neck.fine", lambda **settings: feature("neck.fine", "mse", **settings)),
    "kl": ("neck.fine", lambda **settings: feature("neck.fine", "kl", **settings)),
    "attention": ("neck.fine", lambda **settings: feature("neck.fine", AttentionTransferLoss(), **settings)),
    "channels of a feature": ("neck.fine", lambda **settings: feature("neck.fine", ChannelWiseLoss(), **settings)),
    "pixels of a feature": ("neck.coarse", lambda **settings: feature("neck.coarse", PixelRelationLoss(), **settings)),
}


def feature(layer: str, loss: Any, **settings: Any) -> FeatureDistillation:
    return FeatureDistillation(layer, layer, loss, adapter=None, **settings)


@pytest.mark.parametrize("name", DENSE_TERMS)
def test_a_teacher_that_changes_at_void_positions_alone_changes_nothing(name: str) -> None:
    student, teacher = Net(3, 0), Net(3, 1)
    layer, term = DENSE_TERMS[name]
    labels = masks.clone()
    labels[:, :8] = VOID  # the upper half: whole positions of every map

    def changed(module: Any, args: Any, output: Tensor) -> Tensor:
        upper, lower = output.chunk(2, dim=2)
        return torch.cat([torch.full_like(upper, 1e4), lower], 2)

    expected = value(term(ignore_index=VOID), student, teacher, labels)
    everywhere = value(term(), student, teacher, labels)
    teacher.get_submodule(layer).register_forward_hook(changed)

    close(value(term(ignore_index=VOID), student, teacher, labels), expected)
    assert not torch.allclose(value(term(), student, teacher, labels), everywhere)


@pytest.mark.parametrize("name", DENSE_TERMS)
def test_an_image_that_is_void_altogether_counts_for_nothing(name: str) -> None:
    student, teacher = Net(3, 0), Net(3, 1)

    total = value(DENSE_TERMS[name][1](ignore_index=VOID), student, teacher, torch.full_like(masks, VOID))

    assert total.item() == 0
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("name", DENSE_TERMS)
def test_every_dense_term_trains_with_void_pixels_and_a_larger_teacher(name: str) -> None:
    student, teacher = Net(3, 0, stride=4), Net(3, 1)

    total = value(DENSE_TERMS[name][1](ignore_index=VOID), student, teacher)
    total.backward()

    assert torch.isfinite(total)
    assert total > 0
    assert student.neck.fine.weight.grad.any()


def test_a_loss_with_labels_leaves_out_void_pixels() -> None:
    student, teacher = Net(3, 0), Net(4, 1)

    total = value(LogitsDistillation(NormalizedKDLoss(), ignore_index=VOID), student, teacher)

    labels = torch.where(masks == VOID, -100, masks)
    expected = functional.normalized_kd(student(images), teacher(images), labels, reduction="mean")
    close(total, expected)


def test_a_loss_that_compares_images_takes_the_labelled_pixels_alone() -> None:
    term = FeatureDistillation("neck.coarse", "neck.coarse", SimilarityPreservingLoss(), ignore_index=VOID)

    assert value(term, Net(3, 0), Net(4, 1)) > 0


def test_a_mask_of_other_dimensions_is_left_to_the_loss() -> None:
    examples = torch.tensor([True, False])

    assert resized_mask(examples, torch.ones(2, 3, 4, 4)) is examples
    assert resized_mask(None, torch.ones(2, 3, 4, 4)) is None


def test_a_mask_of_a_larger_map_repeats_its_positions() -> None:
    mask = torch.tensor([[[True, False], [False, True]]])

    larger = resized_mask(mask, torch.ones(1, 3, 4, 4))

    assert torch.equal(larger, mask.repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.parametrize("term", [FeatureDistillation("", "", mask="used"), LogitsDistillation(mask="used")])
def test_a_mask_of_pixels_whose_shape_is_that_of_channels_and_rows_is_one_of_pixels(term: Any) -> None:
    """The maps of images of 16 x 8 pixels have 16 channels and 8 rows."""
    images, used = torch.randn(2, 3, 16, 8), torch.zeros(2, 16, 8).bool()
    used[:, :6] = True
    networks = [nn.Conv2d(3, 16, 3, stride=2, padding=1) for _ in "st"]
    totals = []
    for mask in (used, used[:, ::2, ::2]):
        with Distiller(*networks, term) as distiller:
            with distiller.record():
                networks[0](images)
            totals.append(distiller.total(torch.zeros(()), {"used": mask}))
    torch.testing.assert_close(*totals)


@pytest.mark.parametrize("mask", [torch.ones(2, 5).bool(), torch.ones(2, 4, 4).bool()])
def test_a_mask_of_positions_is_refused_where_the_means_over_all_are_compared(mask: Tensor) -> None:
    term = FeatureDistillation("", "", adapter="pool", mask="used")
    student, teacher = (Call.from_outputs(maps, {("", "output"): maps}) for maps in torch.randn(2, 2, 3, 4, 4))
    student.batch = {"used": mask}
    term.build(student, [teacher])
    with pytest.raises(ValueError, match=r"one of whole examples, \(N,\), since adapter='pool' .*: adapter='auto'"):
        term(student, teacher)
    student.batch = {"used": torch.tensor([True, False])}
    expected = (student.output.mean((2, 3)) - teacher.output.mean((2, 3))).square().mean(1)[0]
    torch.testing.assert_close(term(student, teacher), expected)


def last(shape: tuple[int, ...], mask: Tensor | None = None) -> tuple[Call, Call]:
    """Calls whose outputs have their channels last, 6 of the student and as many as in the shape of the teacher."""
    outputs = torch.randn(2, 7, 7, 6), torch.randn(2, *shape)
    student, teacher = (Call.from_outputs(output, {("a", "output"): output}) for output in outputs)
    student.batch = {"used": mask}
    return student, teacher


@pytest.mark.parametrize("loss", [SoftTargetLoss(class_dim=-1), FeatureDistance("cosine", channel_dim=-1)])
def test_channels_that_are_last_are_not_resized_as_a_width(loss: Any) -> None:
    term = FeatureDistillation("a", "a", loss, adapter=None)
    student, teacher = last((7, 7, 12))
    term.build(student, [teacher])
    with pytest.raises(ValueError, match=r"equal shapes, but got \(2, 7, 7, 6\) and \(2, 7, 7, 12\)"):
        term(student, teacher)


def test_a_mask_of_more_pixels_is_not_resized_to_the_channels() -> None:
    term = FeatureDistillation("a", "a", SoftTargetLoss(class_dim=-1), adapter=None, mask="used")
    student, teacher = last((7, 7, 6), torch.ones(2, 14, 14).bool())
    term.build(student, [teacher])
    with pytest.raises(ValueError, match=r"`mask` to have the shape \(2, 7, 7\), .* but got shape \(2, 14, 14\)"):
        term(student, teacher)


def test_maps_that_look_as_if_their_channels_were_last_are_named() -> None:
    term = FeatureDistillation("a", "a", "mse")
    student, teacher = last((7, 7, 12))
    with pytest.warns(UserWarning, match=r"look like maps with their channels last. Pass Tap\('a', layout='channels_l"):
        term.build(student, [teacher])


class Validated(Segmenter):
    def validation_step(self, batch, batch_idx):
        self.net(batch[0])


def test_agreement_is_measured_over_labelled_pixels_at_the_students_resolution() -> None:
    student, teacher = Net(3, 0, stride=4), Net(4, 1)
    distill = DistillCallback(teacher, LogitsDistillation(ignore_index=VOID))
    trainer = Trainer(callbacks=[distill], logger=False, enable_progress_bar=False, accelerator="cpu")

    (logged,) = trainer.validate(Validated(student), loader(stacked, count=2, size=16), verbose=False)

    batch, labels = stacked([*Scenes(2, 16)])
    agree = student(batch).argmax(1) == F.avg_pool2d(teacher(batch), 4).argmax(1)
    counted = resized_mask(labels != VOID, student(batch))
    assert logged["distill/val_teacher_agreement"] == pytest.approx(agree[counted].float().mean().item())
