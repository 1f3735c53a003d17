"""The parts of guidance together: a comparison's report has its remarks, its costs and the map of layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from plain_trainer import PLAIN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import LogitsDistillation, compare, pair_layers


class Recurrent(nn.Module):
    """A network whose operations hide in one operator on the CPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(4, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Recurrent(5)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        hits = self.net(batch[0]).argmax(1) == batch[1]
        self.log("accuracy", hits.float().mean() + 0.01 * torch.rand(()))  # an evaluation that is random

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Any:
    inputs = torch.randn(32, 6, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, torch.arange(32) % 3)
    return compare(
        module=Module,
        data=lambda: [DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=32)],
        teacher=Recurrent(7),
        methods={"soft targets": [LogitsDistillation()]},
        metric="accuracy",
        seeds=2,
        trainer={"max_epochs": 1, "accelerator": "cpu", **PLAIN},
        folder=tmp_path_factory.mktemp("results"),
        progress=False,
    )


def test_the_operations_of_a_recurrent_network_are_counted(comparison: Any) -> None:
    facts = json.loads((comparison.folder / "comparison.json").read_text())
    # 6 steps of 4 gates, and the head; each multiply-add is one of a matrix product
    assert facts["student"]["cost"]["multiply_adds"] == 6 * 4 * 5 * (4 + 5) + 3 * 5
    assert facts["teacher"]["cost"]["multiply_adds"] == 6 * 4 * 7 * (4 + 7) + 3 * 7


def test_the_report_of_a_comparison_shows_its_remarks_and_its_layers(comparison: Any) -> None:
    assert any("The evaluation is random" in remark for remark in comparison.remarks)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    pairs = pair_layers(plain, plain, [torch.randn(32, 4)])
    assert pairs.save(comparison.folder) == comparison.folder / "pairs.json"
    page = comparison.report().read_text(encoding="utf-8")
    assert "The evaluation is random" in page
    assert "No map of layers was made" not in page


def test_the_report_has_a_file_of_its_own_where_one_is_named(comparison: Any, tmp_path: Path) -> None:
    assert comparison.report(tmp_path / "other.html") == tmp_path / "other.html"
    assert (tmp_path / "other.html").is_file()


def test_pairs_by_depth_have_no_map_to_save(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="but got pairs by depth"):
        pair_layers(plain, plain, [torch.randn(8, 4)], by="uniform").save(tmp_path)
