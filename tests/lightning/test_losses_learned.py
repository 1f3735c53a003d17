"""Losses with parameters: published values, the random mask, and the words of their errors."""

from __future__ import annotations

from typing import Any

import oracle_learned as oracle
import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from learned_golden import narrowed, parameters_of, widened
from loss_case import golden_arrays, golden_index
from torch import Tensor

from lightning_distill import (
    FeatureDistillation,
    LogitsDistillation,
    MaskedGenerativeLoss,
    SimpleRecipeLoss,
    VariationalInformationLoss,
    functional,
    losses,
)

pytestmark = pytest.mark.tensors

NAMES = {"vid": "variational_information", "mgd": "masked_generative"}


def built(loss: losses.DistillationLoss, *shapes: tuple[int, ...]) -> Any:
    loss.build(*(torch.Size(shape) for shape in (shapes if len(shapes) == 2 else shapes * 2)))
    return loss.double().to(DEVICE)


def filled(loss: losses.DistillationLoss, parameters: dict[str, Any]) -> None:
    shapes = {name: tuple(value.shape) for name, value in loss.state_dict().items()}
    loss.load_state_dict({name: torch.as_tensor(value) for name, value in widened(parameters, shapes).items()})


def assert_published_gradients(loss: losses.DistillationLoss, factor: float, arrays: Any, tolerance: Any) -> None:
    expected = parameters_of(arrays, "gradp")
    assert expected.keys() == dict(loss.named_parameters()).keys()
    for name, parameter in loss.named_parameters():
        gradient = torch.as_tensor(narrowed(factor * parameter.grad.numpy(), expected[name]))
        torch.testing.assert_close(gradient, torch.as_tensor(expected[name]), **tolerance)


@pytest.mark.parametrize("entry", golden_index("vid"), ids=lambda entry: entry["case"])
def test_variational_information_equals_the_published_implementation(entry: dict[str, Any]) -> None:
    arrays, tolerance = golden_arrays(entry), entry["tolerance_suggested"]["float64"]
    student = torch.as_tensor(arrays["student_feat"]).requires_grad_()
    teacher = torch.as_tensor(arrays["teacher_feat"])
    smaller = F.adaptive_avg_pool2d(student, teacher.shape[2:])  # the reference pools the larger map of the two
    loss = built(VariationalInformationLoss(), student.shape, teacher.shape)
    filled(loss, parameters_of(arrays))

    value = loss(smaller, teacher)
    value.backward()

    torch.testing.assert_close(value.detach(), torch.as_tensor(arrays["loss"]), **tolerance)
    torch.testing.assert_close(student.grad, torch.as_tensor(arrays["grad_student_feat"]), **tolerance)
    assert_published_gradients(loss, 1.0, arrays, tolerance)


@pytest.mark.parametrize("entry", golden_index("mgd"), ids=lambda entry: entry["case"])
def test_masked_generation_equals_the_published_implementation(entry: dict[str, Any]) -> None:
    arrays, tolerance = golden_arrays(entry), entry["tolerance_suggested"]["float64"]
    student = torch.as_tensor(arrays["student_feat"]).requires_grad_()
    teacher, mask = (torch.as_tensor(arrays[name]) for name in ("teacher_feat", "mask"))
    aligned = student
    if "param_align.weight" in arrays:  # the term's adapter
        aligned = F.conv2d(student, *(torch.as_tensor(arrays[f"param_align.{name}"]) for name in ("weight", "bias")))
    loss = built(MaskedGenerativeLoss(mask=entry["hyperparameters"]["mask"]), teacher.shape)
    filled(loss, parameters_of(arrays))

    factor = entry["hyperparameters"]["alpha_mgd"]
    value = functional.masked_generative(aligned, teacher, generator=loss.generator, mask=mask).mean()
    value.backward()

    torch.testing.assert_close(factor * value.detach(), torch.as_tensor(arrays["loss"]), **tolerance)
    torch.testing.assert_close(factor * student.grad, torch.as_tensor(arrays["grad_student_feat"]), **tolerance)
    assert_published_gradients(loss, factor, arrays, tolerance)


@pytest.mark.parametrize("variance", [1e-4, 0.5, 5.0, 1e4])
def test_variance_starts_at_the_requested_value(variance: float) -> None:
    loss = built(VariationalInformationLoss(initial_variance=variance), (2, 3), (2, 4))

    torch.testing.assert_close(loss.variance, torch.full((4,), variance, dtype=torch.float64), rtol=1e-6, atol=0)


def test_variance_learns_the_mean_squared_error_of_each_channel() -> None:
    """The least negative log-likelihood of a Gaussian."""
    errors = torch.tensor([[1.0, -3.0], [-2.0, 4.0]], dtype=torch.float64)
    loss = built(VariationalInformationLoss(), (2, 3), (2, 2))
    optimizer = torch.optim.Adam([loss.rho], lr=0.1)

    for _ in range(400):
        optimizer.zero_grad()
        loss(torch.zeros(2, 3, dtype=torch.float64), errors).backward()
        optimizer.step()

    torch.testing.assert_close(loss.variance.detach(), errors.square().mean(0), rtol=1e-2, atol=0)


def kept(mask: str, shape: tuple[int, ...], ratio: float = 0.5) -> Tensor:
    """The mask that a loss of this kind drew: what reaches the generator from a feature of ones."""
    seen: list[Tensor] = []
    loss = built(MaskedGenerativeLoss(mask_ratio=ratio, mask=mask), shape)
    loss.generator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    feature = torch.ones(shape, dtype=torch.float64)
    loss(feature, feature)
    return seen[0]


@pytest.mark.parametrize(("ratio", "shape"), [(0.3, (4, 3, 40, 40)), (0.8, (4, 3, 1600))])
def test_a_spatial_mask_hides_all_channels_of_a_share_of_the_positions(ratio: float, shape: tuple[int, ...]) -> None:
    mask = kept("spatial", shape if len(shape) == 4 else (4, 1600, 3), ratio)

    assert mask.unique().tolist() == [0, 1]
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    assert mask.mean().item() == pytest.approx(1 - ratio, abs=0.02)
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("shape", [(4, 2000, 2, 2), (4, 3, 2000), (4, 2000)], ids=["map", "tokens", "vector"])
def test_a_channel_mask_hides_a_share_of_the_channels_everywhere(shape: tuple[int, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, feature: feature)  # 2000 channels are slow
    monkeypatch.setattr(torch.nn.Conv1d, "forward", lambda self, feature: feature)
    mask = kept("channel", shape, 0.3)

    flat = mask.flatten(2) if mask.ndim > 2 else mask.unsqueeze(-1)
    assert mask.unique().tolist() == [0, 1]
    assert torch.equal(flat, flat[:, :, :1].expand_as(flat))
    assert mask.mean().item() == pytest.approx(0.7, abs=0.03)
    assert not torch.equal(mask[0], mask[1])


def test_the_mask_follows_the_global_seed() -> None:
    loss = built(MaskedGenerativeLoss(), (2, 3, 5, 5))
    student, teacher = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
    values = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        values.append(loss(student, teacher).item())

    assert values[0] == values[2] != values[1]


def test_nothing_is_masked_outside_training() -> None:
    loss = built(MaskedGenerativeLoss(mask_ratio=0.9), (2, 3, 5, 5)).eval()
    student, teacher = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
    state = torch.get_rng_state()
    parameters = {name: value.detach().numpy() for name, value in loss.named_parameters()}

    value = loss(student, teacher).item()

    assert value == pytest.approx(oracle.masked_generative(student.numpy(), teacher.numpy(), parameters=parameters))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_masked_feature_gives_the_value_of_the_oracle() -> None:
    loss = built(MaskedGenerativeLoss(), (2, 3, 4, 4))
    student, teacher = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    mask = (torch.rand(2, 1, 4, 4) > 0.5).double()
    parameters = {name: value.detach().numpy() for name, value in loss.named_parameters()}
    arrays = (student.numpy(), teacher.numpy())

    values = functional.masked_generative(student, teacher, generator=loss.generator, mask=mask)

    assert values.shape == (2,)
    expected = oracle.masked_generative(*arrays, parameters=parameters, hidden=mask.numpy())
    assert values.mean().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"initial_variance": 0.0}, ValueError, r"`initial_variance` to be at least 0\.0001, but got"),
        ({"initial_variance": "5"}, TypeError, r"`initial_variance` to be an int or a float, but"),
        ({"mask_ratio": 1.0}, ValueError, r"`mask_ratio` to be at least 0 and less than 1, but got"),
        ({"mask_ratio": -0.1}, ValueError, r"`mask_ratio` to be at least 0 and less than 1, but got"),
        ({"mask": "spacial"}, ValueError, r"`mask` to be one of .* Closest: 'spatial'\."),
    ],
)
def test_bad_settings_raise_in_the_constructor(settings: dict, error: type[Exception], words: str) -> None:
    loss = VariationalInformationLoss if "initial_variance" in settings else MaskedGenerativeLoss
    with pytest.raises(error, match=words):
        loss(**settings)


@pytest.mark.parametrize(
    "loss", [VariationalInformationLoss(), MaskedGenerativeLoss()], ids=lambda loss: type(loss).__name__
)
def test_a_loss_that_was_not_built_says_so(loss: losses.DistillationLoss) -> None:
    with pytest.raises(
        ValueError, match=r"Expected the loss to be built before it is called, but got no parameters\. "
    ):
        loss(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4))


@pytest.mark.parametrize("loss", [VariationalInformationLoss, MaskedGenerativeLoss], ids=lambda loss: loss.__name__)
def test_features_of_unequal_dimensions_raise(loss: type[losses.DistillationLoss]) -> None:
    for shapes in (((2, 3, 4), (2, 3, 4, 4)), ((2,), (2,))):
        with pytest.raises(
            ValueError, match=r"Expected .* the same number of dimensions, 2 to 5, but got \(2.* Pass adapter"
        ):
            built(loss(), *shapes)


def test_a_spatial_mask_of_vectors_raises() -> None:
    with pytest.raises(ValueError, match=r"Expected .* have positions for mask='spatial', .* Pass mask='channel'\."):
        built(MaskedGenerativeLoss(), (2, 3))


@pytest.mark.parametrize("name", NAMES.values())
def test_a_learned_part_of_the_wrong_shape_raises_instead_of_broadcasting(name: str) -> None:
    arguments = {
        "variational_information": {"mean": lambda feature: feature[:, :1], "variance": torch.ones(3)},
        "masked_generative": {"generator": lambda feature: feature[:, :1]},
    }[name]

    with pytest.raises(
        ValueError, match=r"\(student\)` and `teacher` to have equal shapes, but got \(2, 1\) and \(2, 3"
    ):
        getattr(functional, name)(torch.ones(2, 3), torch.ones(2, 3), **arguments)


def test_variances_that_do_not_fit_the_channels_raise() -> None:
    with pytest.raises(
        ValueError, match=r"`variance` to have one value for .* the teacher's 3 channels, but got .*\(1,"
    ):
        functional.variational_information(
            torch.ones(2, 3, 2, 2), torch.ones(2, 3, 2, 2), mean=torch.nn.Identity(), variance=torch.ones(1)
        )


def test_terms_say_where_a_learned_loss_belongs() -> None:
    with pytest.raises(TypeError, match=r"no parameters of its own, but got VariationalInf.* FeatureDistillation"):
        LogitsDistillation(VariationalInformationLoss())
    with pytest.raises(ValueError, match=r"Expected `loss` not to be built yet, but got VariationalInf.* Pass a new"):
        FeatureDistillation("a", "b", built(VariationalInformationLoss(), (2, 3)))


# The simple recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", golden_index("srd"), ids=lambda entry: entry["case"])
def test_simple_recipe_is_the_first_part_of_the_published_loss(entry: dict[str, Any]) -> None:
    """The other is a divergence of the logits without T^2; the bias of its projection has no gradient."""
    settings = entry["hyperparameters"]
    tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    student, scores = (tensors[name].requires_grad_() for name in ("student_feat", "student_logits"))
    loss = built(
        SimpleRecipeLoss(power=settings["exponent"], eps=settings["bn_eps"]),
        student.shape,
        tensors["teacher_feat"].shape,
    )
    loss.load_state_dict({"projection.weight": tensors["param_embed.weight"]})

    part = loss(student, tensors["teacher_feat"])
    temperature = settings["temperature"]
    other = functional.soft_target_kl(scores, tensors["teacher_logits"], temperature=temperature, reduction="mean")
    value = settings["feature_weight"] * part + other / temperature**2
    value.backward()

    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(part.detach(), tensors["component_feature"], **tolerance)
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    torch.testing.assert_close(student.grad, tensors["grad_student_feat"], **tolerance)
    torch.testing.assert_close(scores.grad, tensors["grad_student_logits"], **tolerance)
    torch.testing.assert_close(loss.projection.weight.grad, tensors["gradp_embed.weight"], **tolerance)
    assert tensors["gradp_embed.bias"].abs().max() < 1e-12


def test_a_batch_of_one_example_teaches_the_simple_recipe_nothing() -> None:
    loss = built(SimpleRecipeLoss(), (1, 4), (1, 3))
    student = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)

    value = loss(student, torch.randn(1, 3, dtype=torch.float64))
    value.backward()

    assert value == 0
    assert (student.grad == 0).all()


def test_positions_that_do_not_count_are_left_out_of_the_average_of_the_simple_recipe() -> None:
    loss = built(SimpleRecipeLoss(), (4, 5, 3), (4, 5, 2))
    student, teacher = (torch.randn(4, 5, width, dtype=torch.float64) for width in (3, 2))
    mask = torch.tensor([True, True, False, True, False]).expand(4, 5)
    expected = loss(student[:, mask[0]], teacher[:, mask[0]])
    student[:, ~mask[0]] = torch.nan

    torch.testing.assert_close(loss(student, teacher, mask=mask), expected)


def test_the_simple_recipe_does_not_see_the_scale_of_a_feature() -> None:
    loss = built(SimpleRecipeLoss(eps=1e-12), (6, 4), (6, 3))
    student, teacher = (torch.randn(6, width, dtype=torch.float64) for width in (4, 3))

    torch.testing.assert_close(loss(7 * student + 1, 0.1 * teacher - 3), loss(student, teacher))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"power": 0.5}, r"Expected `power` to be at least 1, but got power=0\.5\."),
        ({"eps": 0.0}, r"Expected `eps` to be greater than 0, but got eps=0\.0\."),
    ],
)
def test_bad_settings_of_the_simple_recipe_raise(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SimpleRecipeLoss(**settings)


def test_features_of_other_examples_raise() -> None:
    loss = built(SimpleRecipeLoss(), (4, 5), (4, 5))

    with pytest.raises(
        ValueError, match=r"the same number of examples and a dimension of channels, but got \(4, 5\) and"
    ):
        loss(torch.ones(4, 5).double(), torch.ones(3, 5).double())
