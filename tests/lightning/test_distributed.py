"""Two processes and spawned ones (L4, L19), and the agreement with the teacher in validation (L20).

The two processes are started once and write what they ended with; each test reads its part and compares it with one
process on the same global batches, which here is a loop written by hand.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from tiny import Classifier, Mlp, ValidatedClassifier, dataset, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation

ROWS, GLOBAL_BATCH = 48, 8
SCRIPT = Path(__file__).parent / "two_processes.py"
distributed = pytest.mark.distributed
fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this release of torch does not run on the CPU"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(SCRIPT, "pair", 2, tmp_path_factory.mktemp("pair"))


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    p, log_q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()


def one_process(
    start: dict[str, Any],
    steps: int,
    accumulate: int = 1,
    weights: Callable[[int], tuple[float, float]] = lambda batch: (0.5, 2.0),
    clip: float | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Student and adapter after a plain loop over the global batches, and the last batch's losses."""
    student, teacher, adapter = Mlp(5), Mlp(7, seed=1), nn.Linear(5, 7)
    adapter.load_state_dict({key.removeprefix("body.adapters.0."): torch.tensor(value) for key, value in start.items()})
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (student, adapter)]
    inputs, labels = dataset(ROWS).tensors
    parts: dict[str, float] = {}
    batches = list(zip(inputs.split(GLOBAL_BATCH), labels.split(GLOBAL_BATCH), strict=True))
    for index, (x, y) in enumerate(batches[: steps * accumulate]):
        feature = student.body(x)
        logits = student.head(F.relu(feature))
        with torch.no_grad():
            teacher_feature = teacher.body(x)
            target = teacher.head(F.relu(teacher_feature))
        task, soft = F.cross_entropy(logits, y), soft_targets(logits, target)
        distance = (adapter(feature) - teacher_feature).square().mean()
        soft_weight, feature_weight = weights(index)
        loss = task + (soft_weight * soft if soft_weight else 0) + (feature_weight * distance if feature_weight else 0)
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            for optimizer in optimizers:
                if clip is not None:
                    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
                optimizer.step()
                optimizer.zero_grad()
        parts = {"task": float(task.detach()), "logits": float(soft.detach()), "body": float(distance.detach())}
    adapters = {f"body.adapters.0.{key}": value for key, value in adapter.state_dict().items()}
    return {f"model.{key}": value for key, value in student.state_dict().items()}, adapters, parts


def close(got: dict[str, Any], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(got[name]), value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def some_steps(batch: int) -> tuple[float, float]:
    return (0.0 if batch % 4 == 3 else 0.5), (0.0 if batch % 2 else 2.0)


SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp": {"steps": 4},
    "ddp_accumulating": {"steps": 3, "accumulate": 2},
    "ddp_find_unused": {"steps": 4},
    "ddp_some_steps": {"steps": 6, "weights": some_steps},
    "ddp_some_steps_accumulating": {"steps": 3, "accumulate": 2, "weights": some_steps},
    "ddp_clipped": {"steps": 4, "clip": 0.1},
    "fsdp": {"steps": 4},
}
NAMES = [pytest.param(name, marks=fsdp2 if name == "fsdp" else ()) for name in SCENARIOS]


# L4 --------------------------------------------------------------------------------------------------------------


@distributed
@pytest.mark.parametrize("name", NAMES)
def test_l4_two_processes_equal_one_process_on_the_same_global_batches(pair, name):
    students, adapters, _ = one_process(pair[0][name]["start"], **SCENARIOS[name])
    for rank in pair:
        close(rank[name]["student"], students)
        close(rank[name]["adapters"], adapters)


@distributed
@pytest.mark.parametrize("name", NAMES)
def test_l4_adapters_and_students_are_identical_on_all_processes(pair, name):
    for part in ("start", "adapters", "student"):
        assert pair[0][name][part] == pair[1][name][part]
    assert pair[0][name]["start"].keys() == {"body.adapters.0.weight", "body.adapters.0.bias"}


@distributed
@fsdp2
def test_l4_ddp_and_fsdp2_look_after_the_student_alone(pair):
    names = sorted(name for name, _ in Classifier().named_parameters())
    assert sorted(name.removeprefix("module.") for name in pair[0]["ddp"]["seen_by_the_strategy"]) == names
    assert sorted(pair[0]["fsdp"]["seen_by_the_strategy"]) == names


@distributed
def test_l4_no_byte_of_the_teacher_is_broadcast_or_reduced(pair):
    # a plain run's bytes, and the adapter's: broadcast once when it is made, reduced in each of the two steps
    adapter = 4 * (5 * 4096 + 4096)
    for rank in pair:
        plain, distilled = rank["plain_bytes"], rank["bytes"]
        assert plain["gloo:all_reduce"] > 0
        for kind in plain:
            expected = {"gloo:broadcast": adapter, "gloo:all_reduce": 2 * adapter}.get(kind, 0)
            # and some words: the seed of the adapters, which of them exist, which gradients there are, epoch means
            assert expected <= distilled[kind] - plain[kind] <= expected + 256
        assert distilled.keys() == plain.keys()


@distributed
def test_l4_adapters_of_different_shapes_are_refused_on_both_processes(pair):
    for rank in pair:
        assert rank["different_shapes"].startswith("Expected the adapters of term 'body' to have the same shapes")


@distributed
def test_learning_rates_follow_the_mean_over_all_processes_and_not_the_loss_of_one(pair):
    words = r"Expected interval='epoch' for a scheduler that monitors 'distill/loss', but got 'step'"
    for rank in pair:
        assert rank["plateau"]["step"].startswith(words)
    first, second = (rank["plateau"]["epoch"] for rank in pair)
    assert 0 < first == second < 0.1


# L19 -------------------------------------------------------------------------------------------------------------


def test_l19_callback_pickles_before_fit_and_the_copy_trains_as_the_original(trainer):
    callback = DistillCallback(
        Mlp(7, seed=1), [LogitsDistillation(weight=0.5), FeatureDistillation("body", "body", "cosine", weight=2.0)]
    )
    copied, ended = pickle.loads(pickle.dumps(callback)), []
    for each in (callback, copied):
        torch.manual_seed(3)
        module = Classifier()
        trainer(callbacks=each, max_steps=3).fit(module, loader())
        ended.append((list(module.parameters()), each.adapter_state()["adapters"]["body"]))
    assert all(torch.equal(a, b) for a, b in zip(ended[0][0], ended[1][0], strict=True))
    assert all(torch.equal(value, ended[1][1][key]) for key, value in ended[0][1].items())


def test_l19_callback_pickles_after_fit_with_its_adapters_and_without_the_module(trainer):
    callback = DistillCallback(Mlp(7, seed=1), FeatureDistillation("body", "body"))
    module = Classifier(Mlp(5))
    module.not_for_pickle = lambda: None  # pickling the module along with the callback fails
    trainer(callbacks=callback).fit(module, loader())
    copied = pickle.loads(pickle.dumps(callback))
    assert copied.adapter_state().keys() == callback.adapter_state().keys()
    for key, value in callback.adapter_state()["adapters"]["body"].items():
        assert torch.equal(copied.adapter_state()["adapters"]["body"][key], value)


@distributed
def test_l19_ddp_spawn_runs_and_its_adapters_come_back_to_the_main_process(tmp_path):
    (ended,) = run_processes(SCRIPT, "spawn", 1, tmp_path)
    assert ended["adapters"].keys() == {"body.adapters.0.weight", "body.adapters.0.bias"}
    # the first adapters were seen in the spawned processes only: what they became determines them up to the training
    students, adapters, _ = one_process(ended["start_from_children"], steps=4)
    close(ended["student"], students)
    close(ended["adapters"], adapters)
    assert ended["left_over"] == [], "nothing is left in the folder for temporary files"


# L20 -------------------------------------------------------------------------------------------------------------


class CountingTeacher(Mlp):
    """A teacher that keeps the number of rows of each call."""

    def __init__(self) -> None:
        super().__init__(7, seed=1)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x)


def counted(student: nn.Module, teacher: nn.Module, rows: Tensor) -> float:
    """The share of equal top classes, counted in float64 one row at a time."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    with torch.no_grad():
        hits = [int(student(row[None]).argmax() == teacher(row[None]).argmax()) for row in rows.double()]
    return sum(hits) / len(hits)


@distributed
def test_l20_agreement_is_exact_on_two_processes_with_uneven_last_batches(pair):
    rows = dataset(13, seed=9).tensors[0]
    for rank in pair:
        student = Mlp(5)
        student.load_state_dict({key: torch.tensor(value) for key, value in rank["agreement"]["student"].items()})
        expected = counted(student, Mlp(7, seed=1), rows)
        assert 0 < expected < 1, "the count can tell a wrong average from a right one"
        assert rank["agreement"]["logged"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("rows", [1, 11, 13])
def test_l20_agreement_is_exact_on_an_uneven_last_batch(trainer, rows):
    teacher, module = CountingTeacher(), ValidatedClassifier()
    validation = DataLoader(dataset(rows, seed=9), batch_size=5)
    run = trainer(callbacks=DistillCallback(teacher), max_epochs=2)
    run.fit(module, loader(), validation)
    expected = counted(module.model, teacher, dataset(rows, seed=9).tensors[0])
    assert float(run.callback_metrics["distill/val_teacher_agreement"]) == pytest.approx(expected, abs=1e-7)


def test_l20_agreement_is_measured_by_trainer_validate_as_well(trainer):
    teacher, module = CountingTeacher(), ValidatedClassifier()
    (logged,) = trainer(callbacks=DistillCallback(teacher)).validate(
        module, loader(rows=13, batch_size=5, seed=9), verbose=False
    )
    expected = counted(module.model, teacher, dataset(13, seed=9).tensors[0])
    assert logged["distill/val_teacher_agreement"] == pytest.approx(expected, abs=1e-7)


def test_l20_several_validation_loaders_are_counted_each_by_itself(trainer):
    teacher, module = CountingTeacher(), ValidatedClassifier()
    loaders = [loader(rows=7, batch_size=5, seed=8), loader(rows=13, batch_size=5, seed=9)]
    run = trainer(callbacks=DistillCallback(teacher), max_epochs=1)
    run.fit(module, loader(), loaders)
    for index, each in enumerate(loaders):
        expected = counted(module.model, teacher, each.dataset.tensors[0])
        key = f"distill/val_teacher_agreement/dataloader_idx_{index}"
        assert float(run.callback_metrics[key]) == pytest.approx(expected, abs=1e-7)
    assert teacher.rows == [4] * 4 + [5, 2, 5, 5, 3]


def test_l20_nothing_runs_or_is_logged_during_the_sanity_check(trainer):
    class Sanity(ValidatedClassifier):
        def on_train_start(self):
            self.calls, self.keys = len(teacher.rows), list(self.trainer.callback_metrics)

    teacher, module = CountingTeacher(), Sanity()
    trainer(callbacks=DistillCallback(teacher), max_epochs=1, num_sanity_val_steps=2).fit(module, loader(), loader())
    assert module.calls == 0
    assert not any(key.startswith("distill/") for key in module.keys)
    assert teacher.rows == [4] * 4 + [4] * 4


def test_l20_module_without_validation_step_does_not_get_one(trainer):
    module = Classifier()
    run = trainer(callbacks=DistillCallback(Mlp(7, seed=1)), max_epochs=1)
    with pytest.warns(UserWarning, match="have no `validation_step`"):
        run.fit(module, loader(), loader())
    assert "validation_step" not in vars(module)
    assert not any("val_" in key for key in run.callback_metrics)


def test_l20_validate_false_never_runs_the_teacher_in_validation(trainer):
    teacher, module = CountingTeacher(), ValidatedClassifier()
    run = trainer(callbacks=DistillCallback(teacher, validate=False), max_epochs=1)
    run.fit(module, loader(rows=8), loader(rows=13, batch_size=5))
    assert teacher.rows == [4, 4]
    assert "distill/val_teacher_agreement" not in run.callback_metrics
    trainer(callbacks=DistillCallback(teacher, validate=False)).validate(module, loader(), verbose=False)
    assert teacher.rows == [4, 4]
