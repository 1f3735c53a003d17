"""Fixtures and rules that every test shares."""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import ACCELERATOR, DEVICE, OnDevice
from hypothesis import settings
from lightning.pytorch import Trainer
from lightning_utilities.core.inheritance import get_all_subclasses
from plain_trainer import PLAIN
from torch.utils.data import BatchSampler, DataLoader

from lightning_distill.compat import HookGuards

# Before anything imports Keras: the backend is chosen once in a process, and TensorFlow's C++ log is loud.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# No deadline: a law must not fail because the machine is busy.
settings.register_profile("distill", deadline=None, max_examples=50)
settings.load_profile("distill")

# Helper modules are imported by the tests under their own names. Doctest must not import them a second time.
collect_ignore = [str(path) for path in Path(__file__).parent.rglob("*.py") if not path.name.startswith("test_")]

# Variables of a cluster or an earlier launch, which make Lightning take the test for one of several processes.
LAUNCHER_VARIABLES = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS"),
)

TRAINER_DEFAULTS: dict[str, Any] = {**PLAIN, "accelerator": ACCELERATOR, "devices": 1}


def pytest_configure() -> None:
    """Keep every process to one thread, child processes included: two cores are shared by two gloo processes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", MPLBACKEND="Agg")
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # convolutions of float32 on a GPU keep its precision


def pytest_collection_finish() -> None:
    """Freeze imported objects: many tests collect garbage, which would take over a second in each."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch.cuda.is_available() is False on this machine")
    if item.get_closest_marker("distributed") and not (
        torch.distributed.is_available() and torch.distributed.is_gloo_available()
    ):
        pytest.skip("needs torch.distributed with gloo, which this build of torch lacks")


def process_state() -> dict[str, Any]:
    """Settings of the process that one test could leave behind for the next."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "process group": distributed,
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "guards of torch.compile": HookGuards._holders,
    }


def restore_loaders() -> None:
    """Undo Lightning's patches of loaders, which stay on the classes if a `train_dataloader` raises."""
    for base in (DataLoader, BatchSampler):
        for kind in get_all_subclasses(base) | {base}:
            for name in ("__setattr__", "__delattr__", "__init__"):
                if f"__old{name}" in vars(kind):
                    setattr(kind, name, vars(kind)[f"__old{name}"])
                    delattr(kind, f"__old{name}")


@pytest.fixture(autouse=True)
def isolation() -> Iterator[None]:
    """Seeded generators and a single-process environment before the test; no leaked setting after it."""
    environment = os.environ.copy()
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = process_state()
    yield
    restore_loaders()
    after = process_state()
    if after["process group"] and not before["process group"]:
        torch.distributed.destroy_process_group()  # blame one test, not all that follow
    torch.set_default_dtype(before["default dtype"])
    torch.use_deterministic_algorithms(before["deterministic algorithms"])
    torch.set_num_threads(before["threads"])
    os.environ.clear()
    os.environ.update(environment)
    leaks = {name: (before[name], value) for name, value in after.items() if value != before[name]}
    assert not leaks, f"the test changed settings of the process and left them so (before, after): {leaks}"


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors of a test that is marked ``tensors`` lie on the device of the tests, unless it is marked ``exact``."""
    marked = request.node.get_closest_marker("tensors") and not request.node.get_closest_marker("exact")
    with OnDevice() if marked and DEVICE != "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture
def trainer(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Trainer]:
    """A factory of quiet trainers for two steps; every setting can be overridden."""
    defaults = {**TRAINER_DEFAULTS, "default_root_dir": tmp_path}
    if request.node.get_closest_marker("exact"):
        defaults["accelerator"] = "cpu"

    def make(**overrides: Any) -> Trainer:
        if not overrides.keys() & {"max_steps", "max_epochs", "max_time"}:
            overrides["max_steps"] = 2
        return Trainer(**{**defaults, **overrides})

    return make
