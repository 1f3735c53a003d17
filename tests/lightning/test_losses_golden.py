"""Values and student gradients of the published implementations."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from loss_case import GOLDEN_FOLDER, Golden, LossCase, golden_arrays, golden_index
from torch import Tensor

from lightning_distill import functional
from lightning_distill.losses import FeatureDistance

pytestmark = pytest.mark.tensors

# Sums over layers or over queries, keys and values: test_losses_attention.py has them.
# With parameters: test_losses_learned.py and test_losses_parts.py have them.
LEARNED = ("vid", "mgd", "srd", "factor_transfer", "ofd", "ofd_margin", "reviewkd_hcl", "simkd", "srrl", "fgd")
# From hidden states or over tokens: tests/language/test_fused_linear_golden.py has them.
OF_TOKENS = ("alpha_beta", "alpha_beta_paper", "fused_linear_jsd", "fused_linear_kl")
OF_TOKENS += ("gkd_jsd", "symmetric_kl", "token_ce", "token_kl")
PROJECTED = ("embed_distill",)  # in test_pca_projection.py
OF_TWO_TOKENIZERS = ("uld", "uld_trl", "gold_hybrid")  # in tests/language/test_universal_logit.py
# From several inputs of the student: test_losses_combined.py and test_losses_dense.py have them.
COMBINED = ("deit_hard", "deit_soft", "deit_soft_paper", "distill_kl", "fsp", "margin_mse", "mft", "taid", "taid_paper")
SEVERAL_LAYERS = ("tinybert_attention", "tinybert_hidden", "minilm_v2_relation")
ROWS = [
    pytest.param(case, golden, entry, id=f"{entry['key']}-{entry['case']}")
    for case in CASES
    for golden in case.golden
    for entry in golden_index(golden.key)
    if golden.cases is None or entry["case"] in golden.cases
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("case", "golden", "entry"), ROWS)
def test_value_and_gradient_equal_the_published_implementation(
    case: LossCase, golden: Golden, entry: dict, dtype: torch.dtype
) -> None:
    arrays = golden_arrays(entry)
    (student_name,) = entry["student_inputs"]
    student = torch.as_tensor(arrays[student_name]).to(dtype).requires_grad_()
    teacher = torch.as_tensor(arrays[student_name.replace("student", "teacher")]).to(dtype)
    arrays = {name: array.astype("float64" if dtype == torch.float64 else "float32") for name, array in arrays.items()}
    loss = case.loss(**golden.settings(entry["hyperparameters"]))
    labels = (torch.as_tensor(arrays["targets"]).long(),) if loss.needs_labels else ()
    factor = golden.factor(entry["hyperparameters"], student.shape)

    value = factor * loss(*golden.arrange(student, teacher, arrays), *labels)
    value.backward()

    tolerance = entry["tolerance_suggested"][str(dtype).removeprefix("torch.")]
    torch.testing.assert_close(value.detach(), torch.as_tensor(arrays[golden.value]), **tolerance)
    torch.testing.assert_close(student.grad, torch.as_tensor(arrays[f"grad_{student_name}"]), **tolerance)


def test_two_layers_of_the_intermediate_criterion_are_a_weighted_mse_and_l1() -> None:
    (entry,) = [entry for entry in golden_index("inc_intermediate") if entry["case"] == "s1"]
    tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    students = [tensors[f"student_{i}"].requires_grad_() for i in range(2)]

    value = 0.5 * FeatureDistance("mse")(students[0], tensors["teacher_0"])
    value = value + 0.5 * FeatureDistance("l1")(students[1], tensors["teacher_1"])
    value.backward()

    torch.testing.assert_close(value.detach(), tensors["loss"], rtol=1e-9, atol=1e-12)
    for i, student in enumerate(students):
        torch.testing.assert_close(student.grad, tensors[f"grad_student_{i}"], rtol=1e-9, atol=1e-12)


def test_first_layer_of_the_intermediate_criterion_is_an_mse_behind_a_linear_adapter() -> None:
    (entry,) = [entry for entry in golden_index("inc_intermediate") if entry["case"] == "s2"]
    tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    student = tensors["student_0"].requires_grad_()
    adapted = F.linear(student, tensors["param_matcher0_weight"], tensors["param_matcher0_bias"])

    (0.3 * FeatureDistance("mse")(adapted, tensors["teacher_0"])).backward()

    torch.testing.assert_close(student.grad, tensors["grad_student_0"], rtol=1e-9, atol=1e-12)


def test_kl_layer_of_the_intermediate_criterion_is_our_kl_over_the_number_of_channels() -> None:
    # The reference softmaxes this layer, as its rows do not add up to 1, and adds 1e-9 before the logarithm.
    (entry,) = [entry for entry in golden_index("inc_intermediate") if entry["case"] == "s2"]
    tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    student = tensors["student_1"].requires_grad_()

    (0.3 / student.shape[-1] * FeatureDistance("kl")(student, tensors["teacher_1"])).backward()

    torch.testing.assert_close(student.grad, tensors["grad_student_1"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("key", ["mlkd_batch", "mlkd_class"])
def test_parts_of_the_multi_level_loss_equal_the_published_implementation(key: str) -> None:
    part = functional.batch_correlation if key == "mlkd_batch" else functional.class_correlation
    for entry in golden_index(key):
        tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
        student = tensors["student_logits"].requires_grad_()

        value = part(student, tensors["teacher_logits"], temperature=entry["hyperparameters"]["temperature"])
        value.backward()

        torch.testing.assert_close(value.detach(), tensors["loss"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(student.grad, tensors["grad_student_logits"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("entry", golden_index("mlkd_total"), ids=lambda entry: entry["case"])
def test_published_total_of_the_multi_level_loss_can_be_rebuilt_from_our_parts(entry: dict) -> None:
    """The published masks of confident examples and classes multiply sums: only the share that they keep counts."""
    tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    weak, strong = (
        (tensors[f"student_logits_{view}"].requires_grad_(), tensors[f"teacher_logits_{view}"])
        for view in ("weak", "strong")
    )
    probabilities = weak[1].softmax(-1)
    examples, classes = (
        (confidence <= confidence.quantile(0.5)).double().mean()
        for confidence in (probabilities.amax(1), probabilities.sum(0))
    )
    first, weight = entry["hyperparameters"]["temperature"], entry["hyperparameters"]["kd_weight"]
    temperatures = (first, 3.0, 5.0, 2.0, 6.0)

    def total(part: Callable[..., Tensor], pair: tuple[Tensor, Tensor], *some: float) -> Tensor:
        return sum(part(*pair, temperature=temperature).mean() for temperature in some)

    divergences = examples * total(functional.soft_target_kl, weak, *temperatures)
    divergences += total(functional.soft_target_kl, strong, first, 3.0, 5.0)
    divergences += total(functional.soft_target_kl, weak, 2.0, 6.0)  # the weak view, as published
    by_class = weight * classes * total(functional.class_correlation, weak, *temperatures)
    by_batch = weight * examples * total(functional.batch_correlation, weak, *temperatures)
    task = sum(F.cross_entropy(student, tensors["targets"]) for student, _ in (weak, strong))
    value = entry["hyperparameters"]["ce_weight"] * task + weight * divergences + by_class + by_batch
    value.backward()

    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(by_class.detach(), tensors["component_loss_cc"], **tolerance)
    torch.testing.assert_close(by_batch.detach(), tensors["component_loss_bc"], **tolerance)
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    for (student, _), view in ((weak, "weak"), (strong, "strong")):
        torch.testing.assert_close(student.grad, tensors[f"grad_student_logits_{view}"], **tolerance)


@pytest.mark.parametrize("entry", golden_index("symmetric_kl"), ids=lambda entry: entry["case"])
def test_published_symmetric_divergence_is_a_sum_of_two_functions(entry: dict) -> None:
    """The forward half is a cross entropy there: only the value without the teacher's entropy is published."""
    tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    student, share = tensors["student_logits"].requires_grad_(), entry["hyperparameters"]["lam"]
    pair, mask = (student, tensors["teacher_logits"]), tensors["labels"] != -100
    forward, entropy_added, reverse = (
        function(*pair, temperature=1.0, mask=mask, reduction="mean")
        for function in (functional.soft_target_kl, functional.soft_cross_entropy, functional.reverse_kl)
    )

    value = (1 - share) * entropy_added + share * reverse
    value.backward()

    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    torch.testing.assert_close(student.grad, tensors["grad_student_logits"], **tolerance)
    torch.testing.assert_close(((1 - share) * forward + share * reverse).detach(), tensors["loss_true_kl"], **tolerance)


@pytest.mark.parametrize("entry", golden_index("gkd_jsd"), ids=lambda entry: entry["case"])
def test_published_divergence_of_a_language_model_shifts_labels_and_divides_by_a_count_of_its_own(
    entry: dict,
) -> None:
    tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    student, reference = tensors["student_logits"].requires_grad_(), entry["hyperparameters"]
    mask = tensors["labels"][:, 1:] != -100

    values = functional.generalized_jsd(
        student[:, :-1],
        tensors["teacher_logits"][:, :-1],
        beta=reference["beta"],
        temperature=reference["temperature"],
        mask=mask,
    )
    value = values.sum() / (reference["num_items_in_batch"] or mask.sum())
    value.backward()

    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    torch.testing.assert_close(student.grad, tensors["grad_student_logits"], **tolerance)


def test_every_golden_case_kept_here_is_used() -> None:
    used = {golden.key for case in CASES for golden in case.golden} | {
        "gkd_jsd",
        "crd",  # in test_losses_contrast.py
        "ctkd",  # in test_curriculum_temperature.py
        "inc_combined",  # in tests/launcher
        "cka_minibatch",  # in tests/guidance
        "inc_intermediate",
        "mlkd_batch",
        "mlkd_class",
        "mlkd_total",
        "symmetric_kl",
        "topk_tail_kl",  # in tests/cache
        *COMBINED,
        *SEVERAL_LAYERS,
        *LEARNED,
        *OF_TOKENS,
        *OF_TWO_TOKENIZERS,
        *PROJECTED,
    }
    entries = json.loads((GOLDEN_FOLDER / "index.json").read_text(encoding="utf-8"))

    assert {entry["key"] for entry in entries} == used
    assert {entry["file"] for entry in entries} == {path.name for path in GOLDEN_FOLDER.glob("*.npz")}
