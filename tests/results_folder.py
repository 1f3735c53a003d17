"""Results folders of comparisons with known numbers, in the form that `compare` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

ALONE, EQUAL = "student alone", "student alone, equal compute"
METHODS = (ALONE, EQUAL, "soft targets")
# how strongly the label, the teacher and the method's own noise speak in its logits
STRENGTHS = {ALONE: (2.2, 0.0, 1.6), EQUAL: (2.4, 0.0, 1.6), "soft targets": (2.0, 0.8, 0.8)}


def cost(parameters: int, **changes: Any) -> dict[str, Any]:
    """A model's costs, of which everything but the parameters follows from them."""
    known = {
        "parameters": parameters,
        "multiply_adds": 12 * parameters,
        "bytes": 4 * parameters,
        "latency_seconds": 2e-8 * parameters,
        "memory_bytes": None,
    }
    return known | changes


def comparison(methods: tuple[str, ...] = METHODS, seeds: int = 3, **changes: Any) -> dict[str, Any]:
    """The content of comparison.json."""
    content = {
        "format": 1,
        "kind": "lightning",
        "metric": "val_acc",
        "mode": "max",
        "seeds": list(range(seeds)),
        "methods": list(methods),
        "fingerprint": "0123456789abcdef",
        "settings": {"epochs": "10", "soft targets": "LogitsDistillation(SoftTargetLoss(temperature=4.0))"},
        "machine": {"platform": "Linux", "processor": "x86_64", "cores": 2, "device": "cpu"},
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "commit": None,
        "command": "lightning-distill compare config.yaml",
        "classes": [f"class {index}" for index in range(5)],
        "teacher": {"metrics": {"val_acc": 0.95}, "cost": cost(67_754), "predictions": "predictions/teacher.npz"},
        "student": {"cost": cost(1_466)},
    }
    return content | changes


def run(method: str, seed: int, value: float | None, **changes: Any) -> dict[str, Any]:
    """A line of runs.jsonl, whose curve rises to the value."""
    end = 0.0 if value is None else value
    entry = {
        "method": method,
        "seed": seed,
        "metrics": {"val_acc": value},
        "seconds": 12.5,
        "steps": 100,
        "epochs": 10,
        "step_seconds": 0.004,
        "curve": [{"epoch": e, "step": 10 * e + 9, "val_acc": end * (1 - 0.5 ** (e + 1))} for e in range(10)],
        "error": None,
        "predictions": None,
        "warnings": [],
    }
    return entry | changes


def slug(method: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in method)


def write_comparison(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(content), encoding="utf-8")


def write_runs(folder: Path, runs: list[dict[str, Any]]) -> None:
    (folder / "runs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in runs), encoding="utf-8")


def save_predictions(folder: Path, name: str, logits: np.ndarray, labels: np.ndarray) -> str:
    (folder / "predictions").mkdir(exist_ok=True)
    np.savez(folder / "predictions" / f"{name}.npz", logits=logits.astype(np.float32), labels=labels)
    return f"predictions/{name}.npz"


def write_folder(
    folder: Path,
    methods: tuple[str, ...] = METHODS,
    seeds: int = 3,
    examples: int = 300,
    samples: int = 40,
    side: int = 8,
    classes: int = 5,
    epochs: int = 10,
    names: list[str] | None = None,
    **changes: Any,
) -> Path:
    """A whole results folder of a classification; the same arguments give the same numbers."""
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, examples)
    targets = np.eye(classes)[labels]
    teacher = 5 * targets + 1.4 * random.normal(size=(examples, classes))
    names = names or [f"class {index}" for index in range(classes)]
    write_comparison(folder, comparison(methods, seeds, classes=names, **changes))
    save_predictions(folder, "teacher", teacher, labels)
    runs = []
    for method in methods:
        label, copied, noise = STRENGTHS.get(method, (2.2, 0.4, 1.2))
        for seed in range(seeds):
            logits = label * targets + copied * teacher + noise * random.normal(size=teacher.shape)
            name = save_predictions(folder, f"{slug(method)}-{seed}", logits, labels)
            value = float((logits.argmax(1) == labels).mean())
            curve = [{"epoch": e, "step": e, "val_acc": value * (1 - 0.5 ** (e + 1))} for e in range(epochs)]
            seconds = 0.004 if method in (ALONE, EQUAL) else 0.007
            runs.append(run(method, seed, value, predictions=name, curve=curve, step_seconds=seconds))
    write_runs(folder, runs)
    images = random.integers(0, 256, (samples, side, side, 3)).astype(np.uint8)
    np.savez(folder / "samples.npz", images=images, index=np.arange(samples))
    write_layers(folder)
    return folder


def write_layers(folder: Path, students: int = 3, teachers: int = 4) -> None:
    similarity = np.round(np.random.default_rng(1).uniform(0.1, 0.9, (students, teachers)), 3)
    content = {
        "student_layers": [f"block{index}" for index in range(students)],
        "teacher_layers": [f"layer{index}" for index in range(teachers)],
        "similarity": similarity.tolist(),
    }
    (folder / "pairs.json").write_text(json.dumps(content), encoding="utf-8")
