"""The two gloo processes of test_built_in.py: ``fit`` of the launcher under DDP."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from tiny import Mlp, dataset
from torch.utils.data import DataLoader

from lightning_distill import Distillation, IntermediateLayersKnowledgeDistillationLoss

ROWS, GLOBAL_BATCH, EPOCHS = 32, 8, 2


def settings(processes: int) -> dict:
    trainer = {
        "accelerator": "cpu",
        "devices": processes,
        "strategy": "ddp" if processes > 1 else "auto",
        "enable_progress_bar": False,
    }
    train = {"end_epoch": EPOCHS, "optimizer": {"SGD": {"learning_rate": 0.1, "momentum": 0.9}}, "trainer": trainer}
    return {"distillation": {"train": train}, "tuning": {"random_seed": 7}}


class InOrder(torch.utils.data.Sampler):
    """Every second row on each process, in order: together the batches of one process."""

    def __init__(self, rank: int, processes: int) -> None:
        self.indices = list(range(rank, ROWS, processes))

    def __iter__(self):
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def trained(rank: int, processes: int) -> dict:
    """The student, the score and the teacher after a training."""
    distiller = Distillation(settings(processes))
    distiller.conf.distillation.train.trainer["use_distributed_sampler"] = False
    teacher = Mlp(7, seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller.student_model, distiller.teacher_model = Mlp(5), teacher
    distiller.criterion = IntermediateLayersKnowledgeDistillationLoss(["head"], add_origin_loss=True)
    distiller.eval_func = lambda model: float(model.head.bias.square().sum())
    distiller.train_dataloader = DataLoader(dataset(ROWS), GLOBAL_BATCH // processes, sampler=InOrder(rank, processes))
    student = distiller.fit()
    return {
        "student": {name: value.tolist() for name, value in student.state_dict().items()},
        "best": distiller.best_score,
        "teacher_same": all(torch.equal(before[name], value) for name, value in teacher.state_dict().items()),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(trained(rank, 2)))
    torch.distributed.destroy_process_group()  # its threads would outlive the interpreter, which aborts then
