"""Rules for the next experiment: each reads a few numbers of a comparison and answers with an action and its reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from distill_core.guidance.verdict import BETTER, UNCLEAR, UNTESTED, WORSE


@dataclass(frozen=True)
class Facts:
    """The numbers that the rules read; NaN or None where a number is not known.

    "Best" is the distilled method with the best mean metric, "alone" the student alone with the same number of steps.

    Args:
        seeds: Number of seeds on which the best method and the student alone can be compared.
        failed: Number of runs that ended with an error.
        not_finite: Methods with a run whose metric is not a finite number.
        best: Name of the best method, or None.
        verdict: Verdict on the best method beside the student alone.
        verdict_equal_compute: Verdict on the best method beside the student alone with equal compute, or None.
        equal_compute_leads: Whether the student alone with equal compute has a better mean than the best method.
        teacher_lead: Teacher's metric minus that of the student alone, positive if the teacher is better.
        still_rising: Share of the whole improvement of the best method's curve that came in its last fifth.
        agreement: Agreement of the best method with the teacher, from 0 to 1.
        agreement_alone: Agreement of the student alone with the teacher.
        teacher_other_mass: Mean probability that the teacher leaves to all classes but its first.
        teacher_gap: Teacher's mean confidence minus its accuracy.
        gap: The best method's mean confidence minus its accuracy.
        inherited: Share of the teacher's errors that the best method repeats.
        inherited_alone: Share of the teacher's errors that the student alone makes too.
        teacher_error: Share of the teacher's wrong answers.
        size_ratio: Parameters of the teacher divided by those of the student.
        step_ratio: Seconds of a step of the best method divided by those of the student alone.
        harmed: Class, its loss of accuracy by the best method, and whether the teacher is worse there too than the
            student alone; None if no class with enough examples loses much.
        layers: The student's and the teacher's layer of greatest similarity, and the similarity; None without a map.
    """

    seeds: int = 0
    failed: int = 0
    not_finite: tuple[str, ...] = ()
    best: str | None = None
    verdict: str = UNTESTED
    verdict_equal_compute: str | None = None
    equal_compute_leads: bool = False
    teacher_lead: float = math.nan
    still_rising: float = math.nan
    agreement: float = math.nan
    agreement_alone: float = math.nan
    teacher_other_mass: float = math.nan
    teacher_gap: float = math.nan
    gap: float = math.nan
    inherited: float = math.nan
    inherited_alone: float = math.nan
    teacher_error: float = math.nan
    size_ratio: float = math.nan
    step_ratio: float = math.nan
    harmed: tuple[str, float, bool] | None = None
    layers: tuple[str, str, float] | None = None


@dataclass(frozen=True)
class Advice:
    """An action for the next experiment.

    Args:
        rule: Name of the rule, as in the documentation.
        action: The action, a short imperative.
        reason: The numbers that speak for it.
    """

    rule: str
    action: str
    reason: str


# Thresholds of the rules; docs/report.md names the same numbers.
ENOUGH_SEEDS: Final = 3
STILL_RISING: Final = 0.05
LITTLE_AGREEMENT: Final = 0.02
HARD_TEACHER: Final = 0.01
TOO_SURE: Final = 0.05
INHERITED: Final = 0.10
WRONG_TEACHER: Final = 0.05
GREAT_RATIO: Final = 50
SLOW_STEP: Final = 1.5
HARMED: Final = 0.05
HARMED_EXAMPLES: Final = 20
ALIKE: Final = 0.5


def failed_runs(facts: Facts) -> tuple[str, str] | None:
    """Runs failed: repair them before anything is compared."""
    if not facts.failed:
        return None
    runs = f"{facts.failed} run{'s' * (facts.failed > 1)} failed"
    return (
        "Repair the failed runs, and run the comparison again.",
        f"{runs}. Their errors are listed below. Finished runs are kept.",
    )


def not_finite(facts: Facts) -> tuple[str, str] | None:
    """A metric is not a finite number: the training has diverged."""
    if not facts.not_finite:
        return None
    return (
        'Use a lower learning rate or a smaller weight of the term; weight="balanced" chooses the weight.',
        f"The metric is missing or not a finite number in runs of {_list(facts.not_finite)}.",
    )


def few_seeds(facts: Facts) -> tuple[str, str] | None:
    """Fewer than 3 common seeds: the interval is missing or very wide."""
    if facts.best is None or facts.seeds >= ENOUGH_SEEDS:
        return None
    seeds = f"{facts.seeds} seed{'s' * (facts.seeds != 1)}"
    return (
        "Run at least 3 seeds, better 5.",
        f"The best method and the student alone have {seeds} in common: chance alone can explain such a difference.",
    )


def keep_best(facts: Facts) -> tuple[str, str] | None:
    """The best method is better than the student alone, and the student alone with equal compute is not ahead."""
    if facts.verdict != BETTER or facts.equal_compute_leads:
        return None
    endings = {BETTER: " and with equal compute", UNCLEAR: "; with equal compute the difference is not clear"}
    beside = endings.get(facts.verdict_equal_compute or "", "")
    return (
        f"Keep “{facts.best}”.",
        f"It is better than the student alone after equal steps{beside}.",
    )


def weak_teacher(facts: Facts) -> tuple[str, str] | None:
    """The teacher is not better than the student alone."""
    if not facts.teacher_lead <= 0:
        return None
    return (
        "Take a better teacher first, or check its inputs (normalisation, size of the images).",
        "The teacher is not better than the student alone on the same validation data, so that it has little to teach.",
    )


def compute_first(facts: Facts) -> tuple[str, str] | None:
    """The student alone with equal compute has a better mean than the best method."""
    if not facts.equal_compute_leads:
        return None
    return (
        "Train the student alone for longer, or make the teacher cheaper with a cache of its outputs.",
        f"With the compute of “{facts.best}” spent on more steps, the student alone has the better mean.",
    )


def slow_step(facts: Facts) -> tuple[str, str] | None:
    """A distilled step takes 1.5 times as long as a step alone, or longer."""
    if not facts.step_ratio >= SLOW_STEP:
        return None
    return (
        "Run the teacher once and keep its outputs in a cache.",
        f"A step of “{facts.best}” takes {facts.step_ratio:.1f} times as long as a step of the student alone.",
    )


def train_longer(facts: Facts) -> tuple[str, str] | None:
    """More than 5 % of the improvement came in the last fifth of the training."""
    if not facts.still_rising > STILL_RISING:
        return None
    return (
        "Train for longer.",
        f"{100 * facts.still_rising:.0f} % of the improvement of “{facts.best}” came in the last fifth of its training."
        " Distillation gains most from patience (Beyer et al. 2022, arXiv:2106.05237).",
    )


def little_imitation(facts: Facts) -> tuple[str, str] | None:
    """Distillation raised the agreement with the teacher by less than 2 points."""
    if not facts.agreement - facts.agreement_alone < LITTLE_AGREEMENT:
        return None
    return (
        "Give the teacher more weight: a smaller task_weight, or a greater weight of the term.",
        f"“{facts.best}” agrees with the teacher on {100 * facts.agreement:.1f} % of the examples, the student alone"
        f" on {100 * facts.agreement_alone:.1f} %: the teacher has hardly been imitated.",
    )


def hard_targets(facts: Facts) -> tuple[str, str] | None:
    """The teacher leaves less than 1 % of the probability to its other classes."""
    if not facts.teacher_other_mass < HARD_TEACHER:
        return None
    return (
        "Raise the temperature (4 to 8), or compare standardised logits: SoftTargetLoss(standardize=True).",
        f"The teacher leaves {100 * facts.teacher_other_mass:.2g} % of the probability to all classes but its first, so"
        " that soft targets hardly differ from labels (Hinton et al. 2015, arXiv:1503.02531).",
    )


def too_sure(facts: Facts) -> tuple[str, str] | None:
    """The best method's confidence exceeds its accuracy by more than 5 points."""
    if not facts.gap > TOO_SURE:
        return None
    points = f"by {100 * facts.gap:.1f} points"
    if facts.teacher_gap > TOO_SURE:
        return (
            "Calibrate the teacher before you distil: divide its logits by a temperature fitted on held-out data.",
            f"Confidence exceeds accuracy {points} in “{facts.best}” and by {100 * facts.teacher_gap:.1f} points in the"
            " teacher (Guo et al. 2017, arXiv:1706.04599).",
        )
    return (
        "Fit a temperature for the student's logits on held-out data before you trust its probabilities.",
        f"Confidence exceeds accuracy {points} in “{facts.best}”, but not in the teacher.",
    )


def copied_errors(facts: Facts) -> tuple[str, str] | None:
    """The student repeats 10 points more of the teacher's errors, and the teacher errs on 5 % or more."""
    if not (facts.inherited - facts.inherited_alone > INHERITED and facts.teacher_error >= WRONG_TEACHER):
        return None
    return (
        "Trust the teacher less where it is wrong: a greater task_weight, or WeightedSoftLabelLoss.",
        f"“{facts.best}” repeats {100 * facts.inherited:.0f} % of the teacher's wrong answers, the student alone gives"
        f" {100 * facts.inherited_alone:.0f} % of them.",
    )


def harmed_class(facts: Facts) -> tuple[str, str] | None:
    """A class with 20 or more examples lost more than 5 points."""
    if facts.harmed is None:
        return None
    name, loss, teacher_too = facts.harmed
    action = (
        f"Improve the teacher on the class “{name}”, or use another teacher for it (route=)."
        if teacher_too
        else f"Look at the examples of the class “{name}”, and give labels more weight there."
    )
    teacher = "worse than the student alone there too" if teacher_too else "not worse than the student alone there"
    return action, f"“{facts.best}” loses {100 * loss:.1f} points on this class, and the teacher is {teacher}."


def great_gap(facts: Facts) -> tuple[str, str] | None:
    """The teacher has 50 times the student's parameters or more, and no method is better."""
    if facts.verdict not in (UNCLEAR, WORSE) or not facts.size_ratio >= GREAT_RATIO:
        return None
    return (
        "Put an assistant of middle size between the two: assistant_chain.",
        f"The teacher has {facts.size_ratio:.0f} times the student's parameters, and distillation is not clearly better"
        " (Mirzadeh et al. 2020, arXiv:1902.03393).",
    )


def compare_layers(facts: Facts) -> tuple[str, str] | None:
    """No method is better, and the best pair of the map of layers has a similarity of 0.5 or more."""
    if facts.verdict not in (UNCLEAR, WORSE) or facts.layers is None or not facts.layers[2] >= ALIKE:
        return None
    student, teacher, similarity = facts.layers
    return (
        f'Add a term on inner layers: FeatureDistillation("{student}", "{teacher}").',
        f"Of all pairs of layers these are the most similar (CKA {similarity:.2f}), and the methods compared so far are"
        " not clearly better than the student alone.",
    )


def no_gain(facts: Facts) -> tuple[str, str] | None:
    """Three seeds or more, and the best method is not better."""
    if facts.verdict not in (UNCLEAR, WORSE) or facts.seeds < ENOUGH_SEEDS:
        return None
    return (
        "Without another idea from this list, keep the student alone: it is the cheapest.",
        f"With {facts.seeds} seeds, “{facts.best}” is not better than the student alone. On data with many labels this"
        " is common: the gain is greatest where labels are few.",
    )


RULES: Final[tuple[Callable[[Facts], tuple[str, str] | None], ...]] = (
    failed_runs,
    not_finite,
    few_seeds,
    keep_best,
    compute_first,
    weak_teacher,
    little_imitation,
    hard_targets,
    train_longer,
    great_gap,
    compare_layers,
    copied_errors,
    harmed_class,
    too_sure,
    slow_step,
    no_gain,
)


def advise(facts: Facts) -> list[Advice]:
    """Apply all rules.

    Args:
        facts: The numbers of the comparison.

    Returns:
        The advice of each rule that applies, the most important first.

    Example:
        >>> [advice.rule for advice in advise(Facts(seeds=2, best="soft targets", teacher_lead=-0.01))]
        ['few_seeds', 'weak_teacher']
    """
    answers = [(rule.__name__, rule(facts)) for rule in RULES]
    return [Advice(name, *answer) for name, answer in answers if answer is not None]


def _list(names: tuple[str, ...]) -> str:
    quoted = [f"“{name}”" for name in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(quoted) + more
