"""The same distillation with other libraries: ``python -m benchmarks.quality.peers [NAMES] [--seeds 5]``.

Every program below minimises half the cross entropy with the labels plus half of the soft targets' loss, T² times the
KL divergence at T = 4, with Adam on scikit-learn's digits. Each seed runs in a process of its own, which trains twice:
the first time imports and warms up. The second is a line of ``results/peers/runs.jsonl``: accuracy, seconds of
training, the most memory of the process, and lines of the program. The programs for language models are in
``peers_language``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from benchmarks.quality import data, peers_language
from distill_core.guidance.machine import machine

RESULTS = Path(__file__).parent / "results" / "peers"
EPOCHS, BATCH, LR, TEMPERATURE = 15, 100, 1e-2, 4.0
TEACHER = RESULTS / "teacher.pt"
Network = Any
Program = Callable[[Network, Network, Any], None]


def plain_pytorch(student: Network, teacher: Network, examples: Any) -> None:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    optimizer = torch.optim.Adam(student.parameters(), LR)
    teacher.eval()
    for _ in range(EPOCHS):
        for images, labels in DataLoader(examples, BATCH, shuffle=True):
            with torch.no_grad():
                targets = F.log_softmax(teacher(images) / TEMPERATURE, 1)
            logits = student(images)
            soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), targets, reduction="batchmean", log_target=True)
            loss = 0.5 * F.cross_entropy(logits, labels) + 0.5 * TEMPERATURE**2 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def lightning_distill(student: Network, teacher: Network, examples: Any) -> None:
    import torch
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from lightning_distill import DistillModule, LogitsDistillation, SoftTargetLoss

    module = DistillModule(
        student,
        teacher,
        LogitsDistillation(SoftTargetLoss(TEMPERATURE), weight=0.5),
        task_weight=0.5,
        optimizer=lambda parameters: torch.optim.Adam(parameters, LR),
    )
    Trainer(max_epochs=EPOCHS, accelerator="cpu").fit(module, DataLoader(examples, BATCH, shuffle=True))


def lightning_distill_loop(student: Network, teacher: Network, examples: Any) -> None:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    from lightning_distill import Distiller, LogitsDistillation, SoftTargetLoss

    optimizer = torch.optim.Adam(student.parameters(), LR)
    term = LogitsDistillation(SoftTargetLoss(TEMPERATURE), weight=0.5)
    with Distiller(student, teacher, term, task_weight=0.5) as distiller:
        for _ in range(EPOCHS):
            for images, labels in DataLoader(examples, BATCH, shuffle=True):
                with distiller.record():
                    loss = F.cross_entropy(student(images), labels)
                optimizer.zero_grad()
                distiller.total(loss, (images, labels)).backward()
                optimizer.step()


def torchdistill(student: Network, teacher: Network, examples: Any) -> None:
    import torch
    from torch.utils.data import RandomSampler
    from torchdistill.core.distillation import get_distillation_box

    layers = {"student_module_path": ".", "teacher_module_path": "."}
    tensors = {"student_module_io": "output", "teacher_module_io": "output"}
    config = {
        "num_epochs": EPOCHS,
        "train_data_loader": {
            "dataset_id": "train",
            "requires_supp": True,
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": BATCH},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "Adam", "kwargs": {"lr": LR}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {**layers, **tensors, "temperature": TEMPERATURE, "alpha": 0.5},
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }
    teacher.eval()  # the library does not
    box = get_distillation_box(teacher, student, {"train": examples}, config, torch.device("cpu"), None, False, 1.0)
    for epoch in range(EPOCHS):
        box.pre_epoch_process(epoch=epoch)
        for images, labels, extra in box.train_data_loader:
            box.pre_forward_process()
            box.post_forward_process(box.forward_process(images, labels, extra))
        box.post_epoch_process()


def modelopt(student: Network, teacher: Network, examples: Any) -> None:
    import modelopt.torch.distill as mtd
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    config = {
        "teacher_model": teacher,
        "criterion": mtd.LogitsDistillationLoss(TEMPERATURE, reduction="batchmean"),
        "loss_balancer": mtd.StaticLossBalancer(0.5),
    }
    model = mtd.convert(student, mode=[("kd_loss", config)])
    optimizer = torch.optim.Adam(model.parameters(), LR)
    model.train()
    for _ in range(EPOCHS):
        for images, labels in DataLoader(examples, BATCH, shuffle=True):
            loss = model.compute_kd_loss(F.cross_entropy(model(images), labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    mtd.export(model)


def keras_distill(student: Network, teacher: Network, examples: Any) -> None:
    import keras

    from keras_distill import DistillModel, LogitsDistillation, SoftTargetLoss

    term = LogitsDistillation(SoftTargetLoss(TEMPERATURE), weight=0.5)
    model = DistillModel(student, teacher, term, task_weight=0.5)
    model.compile(keras.optimizers.Adam(LR), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*examples, BATCH, EPOCHS, verbose=0)


def keras_distillation(student: Network, teacher: Network, examples: Any) -> None:
    import keras

    soft = keras.distillation.LogitsDistillation(TEMPERATURE, keras.losses.KLDivergence())
    model = keras.distillation.Distiller(teacher, student, soft, student_loss_weight=0.5)
    model.compile(keras.optimizers.Adam(LR), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*examples, BATCH, EPOCHS, verbose=0)


PyTorch, Keras = "PyTorch", "Keras"
PEERS: dict[str, tuple[Program, str, str]] = {
    "a loop in plain PyTorch": (plain_pytorch, PyTorch, "torch"),
    "lightning_distill, DistillModule": (lightning_distill, PyTorch, "lightning-distill"),
    "lightning_distill, Distiller": (lightning_distill_loop, PyTorch, "lightning-distill"),
    "torchdistill": (torchdistill, PyTorch, "torchdistill"),
    "nvidia-modelopt": (modelopt, PyTorch, "nvidia-modelopt"),
    "keras_distill": (keras_distill, Keras, "lightning-distill"),
    "keras.distillation": (keras_distillation, Keras, "keras"),
    **peers_language.PEERS,
}


def in_pytorch(program: Program, seed: int) -> tuple[float, float]:
    """Accuracy and seconds of a student in PyTorch, by the teacher of the loss table."""
    import torch
    from torch.utils.data import TensorDataset

    from benchmarks.quality.networks import IMAGES, LARGE, SMALL

    examples = data.digits()
    for _ in range(2):
        teacher = LARGE[IMAGES]()
        teacher.load_state_dict(torch.load(TEACHER, weights_only=True))
        torch.manual_seed(seed)
        student = SMALL[IMAGES]()
        start = time.perf_counter()
        program(student, teacher, TensorDataset(*examples.train))
        seconds = time.perf_counter() - start
    images, labels = examples.test
    with torch.no_grad():
        hits = student.eval()(images).argmax(1) == labels
    return float(hits.float().mean()), seconds


def in_keras(program: Program, seed: int) -> tuple[float, float]:
    """Accuracy and seconds of a student in Keras, by the teacher of the loss table."""
    import keras

    from benchmarks.quality.keras_experiments import channels_last, convolutional, trained

    train, (images, labels) = channels_last(data.digits())
    for _ in range(2):
        teacher = trained(train, (3, 3), 12, 3e-3, RESULTS / "teacher.weights.h5")
        keras.utils.set_random_seed(seed)
        student = convolutional((8, 8), [8], [12], (3, 3))
        start = time.perf_counter()
        program(student, teacher, train)
        seconds = time.perf_counter() - start
    return float((student.predict(images, verbose=0).argmax(1) == labels).mean()), seconds


def measured_once(name: str, seed: int) -> dict[str, Any]:
    """A training, in this process."""
    program, framework, package = PEERS[name]
    warnings.simplefilter("ignore")
    sys.path.append(os.environ.get("RESULTS_PEERS", ".venv/peers"))
    if name == "torchdistill":  # it needs torchvision, whose wheel may lack operators for this build of PyTorch
        sys.path.append("tests")
        import_module("plain_operators").has_torchvision()
    measured = {PyTorch: in_pytorch, Keras: in_keras, peers_language.LANGUAGE: peers_language.measured}[framework]
    value, seconds = measured(program, seed)
    lines = [line for line in inspect.getsource(program).splitlines()[1:] if line.strip()]
    return {
        "peer": name,
        "seed": seed,
        "bits_per_byte" if framework == peers_language.LANGUAGE else "accuracy": value,
        "seconds": seconds,
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "lines": len(lines),
        **machine("cpu", **{package: metadata.version(package)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PEERS)}; all if left out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--one", type=int, help="the seed of a single training in this process")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measured_once(options.names[0], options.one)))
        return
    from benchmarks.quality.experiments import IMAGES, LARGE, trained

    trained(LARGE[IMAGES], data.digits(), 12, 3e-3, TEACHER)
    file = RESULTS / "runs.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(run["peer"], run["seed"]) for run in done}
    for seed in range(options.seeds):
        for name in options.names or PEERS:
            if (name, seed) in known:
                continue
            command = [sys.executable, "-m", "benchmarks.quality.peers", name, "--one", str(seed)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                print(f"{name}, seed {seed}: {ended.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            line = ended.stdout.strip().splitlines()[-1]
            with file.open("a") as handle:
                handle.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
