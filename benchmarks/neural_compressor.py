"""Both versions of Neural Compressor's Distillation beside this package: the same lines, and how numbers differ.

Version 2.6 still has both. Install it into a folder of its own, with a setuptools that has ``pkg_resources``, and name
this folder::

    pip install --no-deps --target FOLDER neural-compressor==2.6 setuptools==75.8.0 schema prettytable py-cpuinfo \
deprecated wrapt pandas pytz python-dateutil six tzdata wcwidth psutil opencv-python-headless pycocotools
    python -m benchmarks.neural_compressor FOLDER
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

OLD, NEW = "neural_compressor", "lightning_distill"
_MODULES = ("config", "training")
FILE = """
model: {name: student, framework: pytorch}
distillation:
  train:
    start_epoch: 0
    end_epoch: 12
    iteration: 100
    frequency: 1
    optimizer: {SGD: {learning_rate: 0.3}}
    criterion:
      KnowledgeDistillationLoss: {temperature: 2.0, loss_types: [CE, CE], loss_weights: [0.5, 0.5]}
evaluation:
  accuracy: {metric: {topk: 1}}
"""
LAYERS = "IntermediateLayersKnowledgeDistillationLossConfig"
OUTPUTS = "KnowledgeDistillationLossConfig"
# Name, criterion, arguments, and those with which this package computes the old number.
LOOPS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("defaults", OUTPUTS, {}, {}),
    (
        "KL",
        OUTPUTS,
        {"temperature": 2.0, "loss_types": ["CE", "KL"], "loss_weights": [0.3, 0.7]},
        {"reference_reduction": True},
    ),
    ("teacher alone", OUTPUTS, {"temperature": 4.0, "loss_types": ["CE", "CE"], "loss_weights": [0.0, 1.0]}, {}),
    (
        "two layers and the labels",
        LAYERS,
        {
            "layer_mappings": [["0", "0"], ["2", "2"]],
            "loss_types": ["MSE", "KL"],
            "loss_weights": [0.4, 0.6],
            "add_origin_loss": True,
        },
        {"reference_reduction": True},
    ),
    (
        "one layer alone",
        LAYERS,
        {"layer_mappings": [["2", "2"]], "loss_types": ["L1"], "loss_weights": [1.0], "add_origin_loss": False},
        {},
    ),
]


def start() -> tuple[nn.Module, nn.Module, DataLoader[Any]]:
    """A student, a teacher and batches, the same in each process."""
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)) for _ in range(2)
    )
    inputs = torch.randn(64, 20)
    classes = (inputs @ torch.randn(20, 10)).argmax(1)
    return student, teacher, DataLoader(TensorDataset(inputs, classes), batch_size=16)


def weights(model: Any) -> Tensor:
    """All weights of a model; the older library returns it in a wrapper."""
    return torch.cat([parameter.detach().flatten() for parameter in getattr(model, "model", model).parameters()])


def by_file(package: str) -> list[float]:
    """The weights of the student after the first version's launcher."""
    student, teacher, batches = start()
    module = importlib.import_module(f"{OLD}.experimental" if package == OLD else package)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "distill.yaml"
        path.write_text(FILE)
        distiller = module.Distillation(str(path))
        distiller.student_model, distiller.teacher_model = student, teacher
        distiller.train_dataloader = distiller.eval_dataloader = batches
        return weights(distiller.fit()).tolist()


def by_loop(package: str, criterion: str, arguments: dict[str, Any]) -> list[float]:
    """The losses of two epochs of the second version's loop, and then the student's weights."""
    student, teacher, batches = start()
    config, training = (importlib.import_module(f"{OLD}.{name}" if package == OLD else NEW) for name in _MODULES)
    settings = config.DistillationConfig(teacher_model=teacher, criterion=getattr(config, criterion)(**arguments))
    manager = training.prepare_compression(student, settings)
    manager.callbacks.on_train_begin()
    model, losses = manager.model, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(2):
        manager.callbacks.on_epoch_begin(epoch)
        for step, (inputs, labels) in enumerate(batches):
            manager.callbacks.on_step_begin(step)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs, labels)
            loss = manager.callbacks.on_after_compute_loss(inputs, outputs, loss)
            loss.backward()
            optimizer.step()
            manager.callbacks.on_step_end()
            losses.append(float(loss))
        manager.callbacks.on_epoch_end()
    manager.callbacks.on_train_end()
    return losses + weights(model).tolist()


def numbers(package: str) -> dict[str, list[float]]:
    """The numbers of each case."""
    new = package == NEW
    loops = {
        name: by_loop(package, criterion, {**arguments, **(as_before if new else {})})
        for name, criterion, arguments, as_before in LOOPS
    }
    return {"the launcher with a file": by_file(package), **loops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where Neural Compressor is installed")
    parser.add_argument("--old", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.old:
        sys.modules["tensorflow"] = None  # type: ignore[assignment] # it would be imported too, and crash some machines
        sys.path.insert(0, options.folder)
        print(json.dumps(numbers(OLD)))
        return
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.neural_compressor", "--old", options.folder]
    environment = {**os.environ, "PYTHONPATH": options.folder}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    old, new = json.loads(printed[printed.index("{") :]), numbers(NEW)  # the older library prints dots before
    for name in old:
        difference = max(abs(a - b) for a, b in zip(old[name], new[name], strict=True))
        print(f"{name}: largest difference {difference:.1e} of numbers up to {max(map(abs, old[name])):.3g}")


if __name__ == "__main__":
    main()
