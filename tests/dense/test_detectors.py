"""Detectors and DeepLab of torchvision as teacher and student: each term equals a computation by hand."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from plain_operators import has_torchvision
from scenes import KINDS, VOID, Scenes, Segmenter, Steps, close, listed, loader, stacked
from torch import Tensor, nn

from lightning_distill import (
    CrossHeadDistillation,
    DistillCallback,
    Distiller,
    FeatureDistillation,
    FocalGlobalLoss,
    LogitsDistillation,
    QualityFocalLoss,
    SoftTargetLoss,
    Tap,
)
from lightning_distill.functional import foreground_weights, quality_focal

if not has_torchvision():
    pytest.skip("torchvision is not installed; `make install` brings it", allow_module_level=True)

from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.segmentation import DeepLabV3
from torchvision.ops import MultiScaleRoIAlign

# The heads start many loops of the compiler's modules, some of which announce what they will change.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SIZE = {"min_size": 32, "max_size": 32}
PYRAMID, INTO_HEAD = Tap("backbone", output="*"), Tap("head", output="*", where="input")
images, targets = listed([*Scenes(2, 32)])


class Tiny(nn.Module):
    """A backbone with two maps, of strides 4 and 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels = width
        self.stem, self.fine, self.coarse = (nn.Conv2d(n, width, 3, stride=2, padding=1) for n in (3, width, width))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(self.stem(x).relu()).relu()
        return OrderedDict({"0": fine, "1": self.coarse(fine).relu()})


def seeded(make: Any, width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        return make(width)


def retinanet(width: int) -> nn.Module:
    anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    return seeded(lambda n: RetinaNet(Tiny(n), KINDS + 1, anchor_generator=anchors, **SIZE), width)


def faster_rcnn(width: int) -> nn.Module:
    def make(width: int) -> nn.Module:
        return FasterRCNN(
            Tiny(width),
            rpn_anchor_generator=AnchorGenerator(((8,), (16,)), ((1.0,),) * 2),
            box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=3, sampling_ratio=2),
            box_head=TwoMLPHead(width * 9, 2 * width),
            box_predictor=FastRCNNPredictor(2 * width, KINDS + 1),
            box_batch_size_per_image=8,
            rpn_post_nms_top_n_train=20,
            rpn_post_nms_top_n_test=20,
            **SIZE,
        )

    return seeded(make, width)


def ssd(width: int) -> nn.Module:
    def make(width: int) -> nn.Module:
        backbone = Tiny(width)
        backbone.out_channels = [width, width]
        return SSD(backbone, DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.5, 0.9]), (32, 32), KINDS + 1)

    return seeded(make, width)


def distiller_of(student: nn.Module, teacher: nn.Module, *terms: Any, **settings: Any) -> Distiller:
    return Distiller(student, teacher, [*terms], task_weight=0, **settings)


def total_of(distiller: Distiller) -> Tensor:
    with distiller.record():
        losses = distiller.student(images, targets)
    return distiller.total(sum(losses.values()), (images, targets))


def fit(module: LightningModule, distill: DistillCallback, collate: Any = listed) -> Trainer:
    trainer = Trainer(
        callbacks=[distill], max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, loader(collate))
    return trainer


def head_outputs(net: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The maps that go into the head of a one-stage detector, and its raw outputs."""
    inputs = net.transform(images, targets)[0].tensors
    maps = [*net.backbone(inputs).values()]
    return maps, net.head(maps)


@pytest.mark.parametrize("make", [retinanet, ssd])
def test_a_one_stage_detector_learns_from_the_raw_outputs_of_the_teacher_s_head(make: Any) -> None:
    student, teacher = make(4), make(8)
    scores = Tap("head.classification_head")
    terms = [
        FeatureDistillation(PYRAMID, PYRAMID),
        FeatureDistillation(scores, scores, QualityFocalLoss(), adapter=None, name="scores"),
        FeatureDistillation(Tap("head", output="bbox_regression"), Tap("head", output="bbox_regression"), "l1",
                            adapter=None, name="boxes"),
    ]  # fmt: skip
    distiller = distiller_of(student, teacher, *terms)

    total = total_of(distiller)

    (maps, outputs), (teacher_maps, answers) = head_outputs(student), head_outputs(teacher)
    adapters = distiller.terms[0].adapters
    pairs = zip(adapters, maps, teacher_maps, strict=True)
    expected = sum(F.mse_loss(adapter(m), t) for adapter, m, t in pairs) / 2
    expected += quality_focal(outputs["cls_logits"], answers["cls_logits"]).mean()
    expected += F.l1_loss(outputs["bbox_regression"], answers["bbox_regression"])
    close(total, expected)


@pytest.mark.parametrize("make", [retinanet, ssd])
def test_the_student_s_pyramid_runs_through_the_teacher_s_head(make: Any) -> None:
    student, teacher = make(4), make(8)
    distiller = distiller_of(
        student, teacher, CrossHeadDistillation(INTO_HEAD, Tap("head", output="cls_logits"), weight=2.0)
    )

    total = total_of(distiller)

    maps, _ = head_outputs(student)
    crossed = teacher.head([adapter(m) for adapter, m in zip(distiller.terms[0].adapters, maps, strict=True)])
    _, answers = head_outputs(teacher)
    close(total, 2 * quality_focal(crossed["cls_logits"], answers["cls_logits"]).mean())


def test_boxes_of_the_resized_images_weigh_the_pyramid() -> None:
    student, teacher = retinanet(4), retinanet(8)
    student.transform.min_size, teacher.transform.min_size = (48,), (48,)
    student.transform.max_size = teacher.transform.max_size = 48
    term = FeatureDistillation(PYRAMID, PYRAMID, FocalGlobalLoss(), boxes=Tap("transform"))
    distiller = distiller_of(student, teacher, term)

    total = total_of(distiller)

    (maps, _), (teacher_maps, _) = head_outputs(student), head_outputs(teacher)
    expected, owned = 0.0, distiller.terms[0]
    for adapter, loss, feature, target in zip(owned.adapters, owned.learned, maps, teacher_maps, strict=True):
        larger = [target["boxes"] * 48 / 32 for target in targets]  # the images are padded to 64 x 64
        expected += loss(adapter(feature), target, foreground_weights(larger, (64, 64), feature.shape[2:]))
    close(total, expected / 2)


class SharedProposals(DistillCallback):
    """The teacher's box head reads the student's proposals, so that both networks' answers are about the same boxes."""

    def teacher_forward(self, call: Any) -> Any:
        _, proposals, sizes = call.recorded(PROPOSALS)
        resized, _ = self.teacher.transform(call.args[0])
        maps, heads = self.teacher.backbone(resized.tensors), self.teacher.roi_heads
        return heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, proposals, sizes)))


PROPOSALS = Tap("roi_heads.box_roi_pool", where="input")


def predictor_terms() -> list[Any]:
    scores, boxes = (Tap("roi_heads.box_predictor", output=index) for index in range(2))
    terms = [
        FeatureDistillation(scores, scores, SoftTargetLoss(1.0), adapter=None, name="scores"),
        FeatureDistillation(boxes, boxes, "l1", adapter=None, name="boxes"),
    ]
    terms[0].student_values = [PROPOSALS]
    return terms


class SharedInALoop(Distiller):
    teacher_forward = SharedProposals.teacher_forward


def test_a_two_stage_detector_learns_about_its_own_proposals() -> None:
    student, teacher = faster_rcnn(4), faster_rcnn(8)
    seen: dict[str, Any] = {}
    student.roi_heads.box_roi_pool.register_forward_pre_hook(lambda module, args: seen.update(proposals=args[1]))
    student.roi_heads.box_predictor.register_forward_hook(lambda module, args, output: seen.update(student=output))
    distiller = SharedInALoop(student, teacher, predictor_terms(), task_weight=0)

    total = total_of(distiller)

    maps = teacher.backbone(teacher.transform(images)[0].tensors)
    pooled = teacher.roi_heads.box_roi_pool(maps, seen["proposals"], [(32, 32)] * 2)
    answers, corners = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))
    scores, boxes = seen["student"]
    assert len(scores) == len(answers) == sum(map(len, seen["proposals"]))
    close(total, SoftTargetLoss(1.0)(scores, answers) + F.l1_loss(boxes, corners))


def test_proposals_are_shared_under_a_trainer() -> None:
    trainer = fit(Steps(faster_rcnn(4)), SharedProposals(faster_rcnn(8), predictor_terms()))

    assert trainer.callback_metrics["distill/scores_loss"] > 0
    assert trainer.callback_metrics["distill/boxes_loss"] > 0


@pytest.mark.parametrize("make", [retinanet, ssd, faster_rcnn])
def test_a_detector_trains_under_a_trainer_and_leaves_the_teacher_as_it_was(make: Any) -> None:
    student, teacher = make(4), make(8)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    module, distill = Steps(student), DistillCallback(teacher, FeatureDistillation(PYRAMID, PYRAMID, weight=0.1))
    weight = student.backbone.fine.weight.clone()

    trainer = fit(module, distill)

    assert trainer.callback_metrics["distill/backbone_loss"] > 0
    assert not torch.equal(student.backbone.fine.weight, weight)
    assert teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("make", "losses", "layers"),
    [
        (retinanet, "'classification', 'bbox_regression'", "head.classification_head", ),
        (ssd, "'bbox_regression', 'classification'", "head.classification_head"),
        (faster_rcnn, "'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg'", "rpn.head"),
    ],
)  # fmt: skip
def test_losses_in_the_place_of_scores_name_the_layers_to_tap(make: Any, losses: str, layers: str) -> None:
    with pytest.raises(ValueError, match=r"Expected the student to return scores, but got its losses") as caught:
        total_of(distiller_of(make(4), make(8), LogitsDistillation()))

    assert losses in str(caught.value)
    assert f"Tap('{layers}')" in str(caught.value)
    assert "FeatureDistillation or CrossHeadDistillation" in str(caught.value)


def test_final_detections_in_the_place_of_scores_name_the_layers_to_tap() -> None:
    student = retinanet(4)
    student.register_forward_hook(lambda module, args, output: {"logits": output["classification"].reshape(1, 1)})
    distiller = distiller_of(student, retinanet(8), LogitsDistillation())
    with distiller.record():
        output = student(images, targets)

    with pytest.raises(ValueError, match=r"Expected the teacher to return scores, but got final detections \['boxes'"):
        distiller.total(output["logits"].sum())


# Segmentation ---------------------------------------------------------------------------------------------------------


class Labelled(nn.Module):
    """DeepLab with a tiny backbone and a small head: the class of torchvision, with its output {"out", "aux"}."""

    def __init__(self, width: int) -> None:
        super().__init__()

        class Backbone(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.maps = Tiny(width)

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                maps = self.maps(x)
                return OrderedDict(out=maps["1"], aux=maps["0"])

        head, aux = (nn.Conv2d(width, KINDS + 1, 1) for _ in range(2))
        self.net = DeepLabV3(Backbone(), head, aux)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.net(images)


class DeepLabSegmenter(Segmenter):
    def training_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        return sum(F.cross_entropy(scores[name], batch[1], ignore_index=VOID) for name in ("out", "aux"))


def test_deeplab_learns_the_probabilities_of_the_labelled_pixels() -> None:
    student, teacher = seeded(Labelled, 4), seeded(Labelled, 8)
    batch, masks = stacked([*Scenes(2, 32)])
    distiller = distiller_of(student, teacher, LogitsDistillation(output="out", ignore_index=VOID))
    with distiller.record():
        output = student(batch)

    total = distiller.total(output["out"].mean(), (batch, masks))

    logs, answers = (F.log_softmax(net(batch)["out"] / 4, 1) for net in (student, teacher))
    expected = 16 * (answers.exp() * (answers - logs)).sum(1)[masks != VOID].mean()
    close(total, expected)


def test_deeplab_trains_under_a_trainer() -> None:
    term = LogitsDistillation(output="out", ignore_index=VOID)
    trainer = fit(DeepLabSegmenter(seeded(Labelled, 4)), DistillCallback(seeded(Labelled, 8), term), stacked)

    assert trainer.callback_metrics["distill/logits_loss"] > 0


def test_two_outputs_of_deeplab_must_be_told_apart() -> None:
    student = seeded(Labelled, 4)
    distiller = distiller_of(student, seeded(Labelled, 8), LogitsDistillation())
    with distiller.record():
        output = student(stacked([*Scenes(2, 32)])[0])

    with pytest.raises(ValueError, match=r"Pass .*LogitsDistillation\(output=...\).* The tensors are: 'out': tensor"):
        distiller.total(output["out"].mean())
