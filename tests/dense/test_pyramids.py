"""The levels of a feature pyramid in one term: values by hand, adapters, pairs, wrong structures."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from scenes import Net, Segmenter, loader, stacked

from lightning_distill import DistillCallback, Distiller, FeatureDistillation, SelfDistillation, Tap
from lightning_distill.adapters.shapes import calls_of, describe

ALL = Tap("neck", output="*")


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def value(term: FeatureDistillation, student: Net, teacher: Net) -> tuple[float, Distiller]:
    distiller = Distiller(student, teacher, term, task_weight=0)
    with distiller.record():
        output = student(images())
    return distiller.total(output.mean()).item(), distiller


def by_hand(student: Net, teacher: Net, term: Any) -> float:
    maps, targets = student.neck(images()), teacher.neck(images())
    names = [*maps] if isinstance(maps, dict) else range(2)
    losses = [
        F.mse_loss(adapter(maps[name]), targets[name]) for name, adapter in zip(names, term.adapters, strict=True)
    ]
    return (sum(losses) / 2).item()


@pytest.mark.parametrize("kind", [OrderedDict, dict, list, tuple])
def test_all_levels_are_compared_through_an_adapter_each(kind: type) -> None:
    student, teacher = Net(3, 0, kind=kind), Net(5, 1, kind=kind)

    total, distiller = value(FeatureDistillation(ALL, ALL), student, teacher)

    assert [tuple(adapter.weight.shape) for adapter in distiller.terms[0].adapters] == [(5, 3, 1, 1)] * 2
    assert total == pytest.approx(by_hand(student, teacher, distiller.terms[0]), rel=1e-5)


def test_one_term_on_all_levels_equals_a_term_that_names_them() -> None:
    student, teacher = Net(3, 0), Net(3, 1)
    named = [Tap("neck", output=name) for name in ("fine", "coarse")]

    assert value(FeatureDistillation(ALL, ALL, "l1"), student, teacher)[0] == pytest.approx(
        value(FeatureDistillation(named, named, "l1"), student, teacher)[0], rel=1e-6
    )


def test_named_levels_are_paired_by_their_names() -> None:
    student, teacher = Net(3, 0), Net(3, 0, names=("coarse", "fine"))

    total = value(FeatureDistillation(ALL, ALL, adapter=None), student, teacher)[0]

    fine, coarse = student.neck(images()).values()
    expected = [F.mse_loss(fine, torch.nn.functional.interpolate(coarse, fine.shape[2:], mode="bilinear"))]
    expected.append(F.mse_loss(coarse, F.adaptive_avg_pool2d(fine, coarse.shape[2:])))
    assert total == pytest.approx((sum(expected) / 2).item(), rel=1e-5)


def test_a_dict_and_a_list_are_paired_in_their_order() -> None:
    student, teacher = Net(3, 0), Net(3, 1, kind=list)

    term = FeatureDistillation(ALL, ALL)

    total, _ = value(term, student, teacher)
    maps, targets = student.neck(images()).values(), teacher.neck(images())
    assert total == pytest.approx((sum(map(F.mse_loss, maps, targets)) / 2).item(), rel=1e-5)


def test_the_input_of_a_head_may_be_a_list_of_maps() -> None:
    student, teacher = Net(3, 0), Net(3, 1)
    into_head = Tap("head", output="*", where="input")

    assert value(FeatureDistillation(into_head, into_head), student, teacher)[0] == pytest.approx(
        value(FeatureDistillation(ALL, ALL), student, teacher)[0], rel=1e-6
    )


def test_the_path_to_a_pyramid_may_be_nested() -> None:
    student, teacher = Net(3, 0, kind=lambda maps: {"maps": maps}), Net(3, 1, kind=list)
    student.neck.register_forward_hook(lambda *_: None)
    student.head.register_forward_pre_hook(lambda module, args: (next(iter(args[0])),))

    total = value(FeatureDistillation(Tap("neck", output=("maps", "*")), ALL), student, teacher)[0]

    maps, targets = student.neck(images())["maps"], teacher.neck(images())
    assert total == pytest.approx((sum(map(F.mse_loss, maps, targets)) / 2).item(), rel=1e-5)


def test_a_single_map_is_a_pyramid_of_one_level() -> None:
    fine = Tap("neck.fine", output="*")

    assert value(FeatureDistillation(fine, fine), Net(3, 0), Net(3, 1))[0] == pytest.approx(
        value(FeatureDistillation("neck.fine", "neck.fine"), Net(3, 0), Net(3, 1))[0], rel=1e-6
    )


def test_a_loss_with_several_layers_gets_the_lists_of_levels() -> None:
    class Counting:
        several_layers = True

        def __call__(self, students: list[torch.Tensor], teachers: list[torch.Tensor]) -> torch.Tensor:
            return len(students) * 10 + len(teachers) + 0 * students[0].mean()

    assert value(FeatureDistillation(ALL, ALL, Counting()), Net(3, 0), Net(3, 1))[0] == 22


def test_levels_of_one_network_can_teach_those_of_a_shallower_pyramid() -> None:
    term = SelfDistillation(ALL, Tap("head", output="*", where="input"), adapter=None)
    student = Net(3, 0)
    distiller = Distiller(student, None, term, task_weight=0)

    with distiller.record():
        output = student(images())

    assert distiller.total(output.mean()).item() == 0  # the same maps


def test_each_level_of_several_teachers_has_an_adapter() -> None:
    student, teachers = Net(3, 0), [Net(4, 1), Net(5, 2)]
    distiller = Distiller(student, teachers, FeatureDistillation(ALL, ALL), task_weight=0)
    with distiller.record():
        output = student(images())

    total = distiller.total(output.mean()).item()

    adapters = distiller.terms[0].adapters
    assert [adapter.weight.shape[0] for adapter in adapters] == [4, 4, 5, 5]
    maps = [*student.neck(images()).values()] * 2
    targets = [level for teacher in teachers for level in teacher.neck(images()).values()]
    losses = [
        F.mse_loss(adapter(level), target) for adapter, level, target in zip(adapters, maps, targets, strict=True)
    ]
    assert total == pytest.approx((sum(losses) / 4).item(), rel=1e-5)


def test_a_process_without_a_batch_makes_the_same_adapters_from_the_noted_shapes() -> None:
    student, teacher = Net(3, 0), Net(5, 1)
    _, distiller = value(FeatureDistillation(ALL, ALL), student, teacher)
    term = distiller.terms[0]
    with distiller.record():
        student(images())
    (call,) = distiller._step.student.find()
    shapes = describe(term, call, distiller._step.answers(call))

    fresh = FeatureDistillation(ALL, ALL)
    fresh.build(*calls_of(fresh, shapes, torch.device("cpu")))

    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in term.state_dict().items()}


def test_a_trainer_trains_the_adapters_of_all_levels() -> None:
    distill = DistillCallback(Net(5, 1), FeatureDistillation(ALL, ALL))
    module = Segmenter(Net(3, 0))
    trainer = Trainer(
        callbacks=[distill], max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, loader(stacked))

    assert len(distill.terms[0].adapters) == 2
    assert float(trainer.callback_metrics["distill/neck_loss"]) > 0


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (
            {"names": ("0", "pool")},
            {},
            r"Expected student layer 'neck' and teacher layer 'neck' to return the same levels for output='\*', but got"
            r" \['0', 'pool'\] and \['fine', 'coarse'\]. Name the levels to compare: \[Tap\('neck', output='0'\), ...",
        ),
        (
            {"kind": lambda maps: (maps, None)},
            {},
            r"Expected the output of student layer 'neck' to hold a dict, list or tuple of tensors for output='\*', but"
            r" got tuple of \[0, 1\]. Pass the path to it",
        ),
    ],
)
def test_other_levels_are_refused(student: dict[str, Any], teacher: dict[str, Any], words: str) -> None:
    networks = Net(3, 0, **student), Net(3, 1, **teacher)
    networks[0].head.forward = lambda maps: [torch.stack([each.mean() for each in _flat(maps)]).view(1, -1, 1, 1)]

    with pytest.raises(ValueError, match=words):
        value(FeatureDistillation(ALL, ALL), *networks)


def _flat(maps: Any) -> list[torch.Tensor]:
    if isinstance(maps, torch.Tensor):
        return [maps]
    return [tensor for each in maps if each is not None for tensor in _flat(each)]
