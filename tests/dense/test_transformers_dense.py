"""A DETR and a SegFormer of transformers as teacher and student: each term equals a computation by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from scenes import KINDS, VOID, Scenes, close, with_boxes
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from lightning_distill import (
    CrossHeadDistillation,
    DistillCallback,
    Distiller,
    FeatureDistillation,
    LogitsDistillation,
    QualityFocalLoss,
    SoftTargetLoss,
    Tap,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SCENES = [*Scenes(4, 32)]


def seeded(make: Any, width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        return make(width)


def segformer(width: int) -> nn.Module:
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[width, 2 * width], patch_sizes=[3, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=width, num_labels=KINDS + 1,
        semantic_loss_ignore_index=VOID, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )  # fmt: skip
    return seeded(lambda width: SegformerForSemanticSegmentation(config), width)


def detr(width: int) -> nn.Module:
    backbone = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=width,
        num_queries=5, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8, num_labels=KINDS,
        encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return seeded(lambda width: DetrForObjectDetection(config), width)


def segmented(samples: list[Any]) -> dict[str, Tensor]:
    batch = with_boxes(samples)
    return {"pixel_values": batch["images"], "labels": batch["labels"]}


def detected(samples: list[Any]) -> dict[str, Any]:
    """Boxes as DETR reads them: centres and sizes as shares of the image."""
    labels = []
    for image, target in samples:
        low, high = target["boxes"][:, :2], target["boxes"][:, 2:]
        boxes = torch.cat([(low + high) / 2, high - low], 1) / image.shape[-1]
        labels.append({"class_labels": target["labels"] - 1, "boxes": boxes})
    return {"pixel_values": torch.stack([image for image, _ in samples]), "labels": labels}


def corners(batch: dict[str, Any]) -> list[Tensor]:
    """The boxes in pixels, as terms read them."""
    boxes = [label["boxes"] * batch["pixel_values"].shape[-1] for label in batch["labels"]]
    return [torch.cat([each[:, :2] - each[:, 2:] / 2, each[:, :2] + each[:, 2:] / 2], 1) for each in boxes]


class Module(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(module: Module, distill: DistillCallback, collate: Any) -> Trainer:
    trainer = Trainer(
        callbacks=[distill], max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, DataLoader(SCENES, batch_size=2, collate_fn=collate))
    return trainer


def total_of(student: nn.Module, teacher: nn.Module, term: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
    distiller = Distiller(student, teacher, term, task_weight=0)
    with distiller.record():
        loss = student(**batch).loss
    return distiller.total(loss, batch), distiller.terms[0]


def test_segformer_learns_at_the_resolution_of_its_scores_from_the_labelled_pixels() -> None:
    student, teacher, batch = segformer(4), segformer(8), segmented(SCENES)

    total, _ = total_of(student, teacher, LogitsDistillation(SoftTargetLoss(1.0), ignore_index=VOID), batch)

    logs, answers = (F.log_softmax(net(batch["pixel_values"]).logits, 1) for net in (student, teacher.eval()))
    counted = F.avg_pool2d((batch["labels"] != VOID).float(), 4) >= 0.5
    assert logs.shape[2:] == (8, 8)
    close(total, (answers.exp() * (answers - logs)).sum(1)[counted].mean())


def test_the_states_of_segformer_s_encoder_are_a_pyramid() -> None:
    student, teacher, batch = segformer(4), segformer(8), segmented(SCENES)
    states = Tap("decode_head", output="*", where="input")

    total, term = total_of(student, teacher, FeatureDistillation(states, states), batch)

    assert len(term.adapters) == 2
    maps = [net.segformer(batch["pixel_values"], output_hidden_states=True).hidden_states for net in (student, teacher)]
    losses = [F.mse_loss(adapter(s), t) for adapter, s, t in zip(term.adapters, *maps, strict=True)]
    close(total, sum(losses) / 2)


def test_segformer_s_features_run_through_the_teacher_s_decoder() -> None:
    student, teacher, batch = segformer(4), segformer(8), segmented(SCENES)
    states = Tap("decode_head", output="*", where="input")
    term = CrossHeadDistillation(states, "decode_head", SoftTargetLoss(1.0), ignore_index=VOID)

    total, owned = total_of(student, teacher, term, batch)

    maps = student.segformer(batch["pixel_values"], output_hidden_states=True).hidden_states
    crossed = teacher.eval().decode_head(tuple(a(m) for a, m in zip(owned.adapters, maps, strict=True)))
    answers = teacher(batch["pixel_values"]).logits
    logs, targets = F.log_softmax(crossed, 1), F.log_softmax(answers, 1)
    counted = F.avg_pool2d((batch["labels"] != VOID).float(), 4) >= 0.5
    expected = (targets.exp() * (targets - logs)).sum(1)[counted].mean()
    close(total, expected)


def test_segformer_trains_under_a_trainer() -> None:
    trainer = fit(Module(segformer(4)), DistillCallback(segformer(8), LogitsDistillation(ignore_index=VOID)), segmented)

    assert trainer.callback_metrics["distill/logits_loss"] > 0


def test_the_map_of_detr_s_backbone_is_compared_where_objects_are() -> None:
    student, teacher, batch = detr(4), detr(8), detected(SCENES)
    layer = "model.input_projection" if hasattr(student.model, "input_projection") else "model.backbone"

    total, term = total_of(student, teacher, FeatureDistillation(layer, layer, boxes=corners), batch)

    assert [tuple(adapter.weight.shape) for adapter in term.adapters] == [(8, 4, 1, 1)]
    assert total > 0


def test_the_scores_of_detr_s_queries_are_those_of_both_heads() -> None:
    """Row by row; the two networks' rows need not be about the same objects."""
    student, teacher, batch = detr(4), detr(8), detected(SCENES)

    total, _ = total_of(student, teacher, LogitsDistillation(QualityFocalLoss()), batch)

    scores, answers = (net(batch["pixel_values"]).logits for net in (student, teacher.eval()))
    close(total, QualityFocalLoss()(scores, answers))


def test_detr_trains_under_a_trainer() -> None:
    scores = LogitsDistillation(SoftTargetLoss(1.0))
    trainer = fit(Module(detr(4)), DistillCallback(detr(8), scores), detected)

    assert trainer.callback_metrics["distill/logits_loss"] > 0
