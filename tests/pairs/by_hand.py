"""The oracle of the pairs: every formula and the whole training loop written out in plain torch.

Nothing here uses the library. A feature of the table has one function that computes its weighted distillation loss from
these formulas; :class:`Hand` is the loop around it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from device import DEVICE
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Place(NamedTuple):
    """Where a step stands in the training."""

    step: int
    epoch: int
    fraction: float
    batch: int = 0  # in its epoch


def draw_alike(epoch: int, batch: int) -> None:
    """Seed the random numbers of a step: resumed runs and loaders draw from the same generator."""
    torch.manual_seed(1000 * epoch + batch)


# Formulas ------------------------------------------------------------------------------------------------------------


def soft_targets(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """T^2 KL(teacher || student), averaged over the rows that count."""
    target = (teacher.float() / temperature).softmax(-1)
    each = (target * (target.log() - (student.float() / temperature).log_softmax(-1))).sum(-1) * temperature**2
    return each.mean() if mask is None else each[mask].mean()


def curriculum(student: Tensor, teacher: Tensor, learned: dict[str, Tensor]) -> Tensor:
    """The divergence at a temperature from 0.1 to 0.5, whose parameter climbs where the student descends."""
    theta = learned["logits.loss.temperature.theta"]
    temperature = 0.1 + 0.4 * torch.sigmoid(2 * theta.detach() - theta)
    return soft_targets(student, teacher, temperature)


def mixed(teachers: Sequence[Tensor], weights: Tensor, temperature: float) -> Tensor:
    """Logits of the weighted mean of the teachers' softened probabilities."""
    return (
        temperature
        * sum(w * (z.float() / temperature).softmax(-1) for w, z in zip(weights, teachers, strict=True)).log()
    )


def confidence(teachers: Sequence[Tensor]) -> Tensor:
    """Weights by the inverse of each teacher's perplexity, for each row, (teachers, rows, 1)."""
    probabilities = [z.float().softmax(-1) for z in teachers]
    scores = torch.stack([1 / (-(p * p.log()).sum(-1, keepdim=True)).exp() for p in probabilities])
    return scores / scores.sum(0)


def likeliest(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same where only the likeliest of the teacher's classes is known, and the others share the rest evenly."""
    best = teacher.argmax(-1, keepdim=True)
    others = teacher.shape[-1] - 1
    # a cache of them keeps logarithms in float16
    share, left = ((log.half().float()).exp() for log in _logs(teacher, best))
    first, rest = share ** (1 / temperature), others * (left / others) ** (1 / temperature)
    target = torch.cat([first, rest], -1) / (first + rest)
    own = (student.float() / temperature).softmax(-1).gather(-1, best)
    log_own = torch.cat([own.log(), (1 - own).log()], -1)
    return (target * (target.log() - log_own)).sum(-1).mean() * temperature**2


def _logs(teacher: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    logs = teacher.double().log_softmax(-1)
    return logs.gather(-1, best), logs.scatter(-1, best, -math.inf).logsumexp(-1, keepdim=True)


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.float() - teacher.float()).square().mean()


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, others: float) -> Tensor:
    """Decoupled distillation: the binary divergence, and ``others`` times the one among the other classes."""
    values = []
    for row, target, label in zip(student / temperature, teacher / temperature, labels.tolist(), strict=True):
        p, q = target.softmax(0), row.softmax(0)
        rest = torch.arange(len(p)) != label
        binary = p[label] * (p[label] / q[label]).log() + (1 - p[label]) * ((1 - p[label]) / (1 - q[label])).log()
        p, q = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        values.append(binary + others * (p * (p / q).log()).sum())
    return temperature**2 * torch.stack(values).mean()


def variational(student: Tensor, teacher: Tensor, learned: dict[str, Tensor], prefix: str) -> Tensor:
    """The Gaussian's negative log-likelihood; the mean is three linear maps."""
    mean = student.float() @ learned[f"{prefix}.mean.0.weight"].T
    for layer in (2, 4):
        mean = mean.relu() @ learned[f"{prefix}.mean.{layer}.weight"].T
    variance = (1 + learned[f"{prefix}.rho"].exp()).log() + 1e-5
    return 0.5 * ((mean - teacher.float()).square() / variance + variance.log()).mean()


def generated(student: Tensor, teacher: Tensor, learned: dict[str, Tensor], prefix: str, hidden: float) -> Tensor:
    """The squared error of a network that guesses the teacher's feature from a part of the student's."""
    kept = (torch.rand(student.shape, device=student.device) >= hidden).float()
    feature = student.float() * kept
    inner = (feature @ learned[f"{prefix}.generator.0.weight"].T + learned[f"{prefix}.generator.0.bias"]).relu()
    guess = inner @ learned[f"{prefix}.generator.2.weight"].T + learned[f"{prefix}.generator.2.bias"]
    return (guess - teacher.float()).square().sum(-1).mean()


def line(start: float, end: float, share: float) -> float:
    return start + (end - start) * min(share, 1.0)


# The loop ------------------------------------------------------------------------------------------------------------


def places(epochs: Sequence[int], accumulate: int = 1, optimizers: int = 1) -> Iterator[list[Place]]:
    """The places of the batches of every optimizer step, for epochs of so many batches."""
    step = 0
    for epoch, batches in enumerate(epochs):
        windows = math.ceil(batches / accumulate)
        for window in range(windows):
            count = min(accumulate, batches - window * accumulate)
            fraction = (epoch + window / windows) / len(epochs)
            yield [Place(step, epoch, fraction, window * accumulate + number) for number in range(count)]
            step += optimizers


def outputs(student: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The features and logits of the students and teachers of the table."""
    body: Tensor = student.body(x)  # type: ignore[operator, assignment]
    act: Tensor = student.act(body)  # type: ignore[operator, assignment]
    return {"body": body, "act": act, "logits": student.head(act)}  # type: ignore[operator, dict-item]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def asked(teacher: Any, x: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The outputs of a teacher, without gradients; in a precision of its own if it has one."""
    teacher = teacher.to(x.device)
    with torch.no_grad():
        if dtype is None:
            return outputs(teacher, x)
        with torch.autocast(x.device.type, enabled=False):
            return outputs(teacher.to(dtype), x.to(dtype))


# From the student's outputs, the teacher's, the batch, the place and the learned parts to the weighted loss.
Formula = Callable[[dict[str, Tensor], Callable[..., dict[str, Tensor]], Batch, Place, dict[str, Tensor]], Tensor]


@dataclass
class Hand:
    """A training in a plain loop, with the learned parts in the student's optimizer.

    Args:
        formula: The weighted distillation loss; of a class, one for this training, which remembers what it measures.
        student: The student; it is trained.
        learned: The first values of the learned parts.
        views: Makes the student's inputs from the batch's input.
        task_weight: The task loss's weight at a place.
        optimizer: Makes the optimizer.
        dtype: The precision in which the teacher has answered, whatever the student's.
        decay: Share of the old values in each update of the student's average, at a place; ``None`` keeps no average.
        average: The average of an earlier training, by name.
        device: Where it trains: where the run that it is compared with does, so that both draw and round alike.
    """

    formula: Formula
    student: nn.Module
    learned: dict[str, Tensor]
    views: Sequence[Callable[[Tensor], Tensor]] = (lambda x: x,)
    task_weight: Callable[[Place], float] = lambda place: 1.0
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9
    )
    dtype: torch.dtype | None = None
    decay: Callable[[Place], float] | None = None
    average: dict[str, Tensor] | None = None
    device: str = DEVICE
    losses: list[float] = field(default_factory=list)
    tasks: list[float] = field(default_factory=list)
    after: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.formula, type):
            self.formula = self.formula()
        self.student = self.student.to(self.device)
        self.learned = {key: value.to(self.device, copy=True) for key, value in self.learned.items()}
        for value in self.learned.values():
            value.requires_grad_(value.is_floating_point())
        self.teacher = copy.deepcopy(self.student)
        if self.average is not None:
            self.teacher.load_state_dict(self.average)

    def distillation(self, batch: Batch, place: Place, distils: bool = True) -> tuple[Tensor, Tensor]:
        """The task loss and the weighted distillation loss of a batch, means over the views."""
        tasks, values = [], [torch.zeros(())] if not distils else []
        batch = {key: value.to(self.device) for key, value in batch.items()}
        draw_alike(place.epoch, place.batch)
        for view in self.views:
            x = view(batch["x"])
            result = outputs(self.student, x)
            tasks.append(cross_entropy(result["logits"], batch["labels"]))
            if distils:
                ask = lambda teacher, dtype=self.dtype, x=x: asked(teacher or self.teacher, x, dtype)  # noqa: E731
                values.append(self.formula(result, ask, batch, place, self.learned))
        return torch.stack(tasks).mean(), torch.stack(values).mean()

    def train(
        self,
        steps: Sequence[Sequence[tuple[Batch, Place]]],
        *,
        distils: Callable[[int], bool] = lambda number: True,
        weighs_task: bool = True,
        divide_by: int = 1,
        clip: float | None = None,
        autocast: torch.dtype | None = None,
        rates: Sequence[float] | None = None,
    ) -> Hand:
        """Train.

        Args:
            steps: For every optimizer step the batches that are accumulated, with their places.
            distils: Whether the batch of that number, from 0, is distilled.
            weighs_task: Whether the task weight counts.
            divide_by: Divisor of the gradients of a batch.
            clip: The largest norm of the gradients, of the student and of the learned parts each by itself.
            autocast: The half precision of the forward passes; the loss is scaled for float16.
            rates: The learning rate of every step.
        """
        parameters, learned = list(self.student.parameters()), list(self.learned.values())
        optimizer = self.optimizer([*parameters, *learned])
        scaler = torch.amp.GradScaler(self.device, enabled=autocast is torch.float16)
        number = 0
        for index, batches in enumerate(steps):
            if rates is not None:
                optimizer.param_groups[0]["lr"] = rates[index]
            optimizer.zero_grad()
            for batch, place in batches:
                with torch.autocast(self.device, autocast, enabled=autocast is not None):
                    task, distillation = self.distillation(batch, place, distils(number))
                weight = self.task_weight(place) if weighs_task else 1.0
                left_out = weight == 0 and distillation.requires_grad  # then optimizers see no gradient of 0 either
                total = distillation if left_out else weight * task + distillation
                scaler.scale(total / divide_by).backward()
                self.losses.append(total.item())
                self.tasks.append(task.item())
                number += 1
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
                if any(parameter.grad is not None for parameter in learned):
                    torch.nn.utils.clip_grad_norm_(learned, clip)
            scaler.step(optimizer)
            scaler.update()
            if self.decay is not None:
                decay = self.decay(batches[-1][1])
                with torch.no_grad():
                    for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                        old.copy_(decay * old + (1 - decay) * new)
            self.after.append({name: value.detach().clone() for name, value in self.student.named_parameters()})
        return self

    def values(self) -> dict[str, Tensor]:
        """The learned parts as they are now."""
        return {key: value.detach().clone() for key, value in self.learned.items()}


def mean_of(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def moving_average(states: Sequence[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average: dict[str, Any] = dict(states[0])
    for state in states[1:]:
        average = {name: decay * average[name] + (1 - decay) * state[name] for name in average}
    return average
