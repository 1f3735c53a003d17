"""Several teachers, by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pairs.by_hand import confidence, line, mixed, soft_targets, squared
from tiny import Mlp


def layer(learned, index):
    return [learned[f"body.adapters.{index}.{name}"] for name in ("weight", "bias")]


def adapted(result, ask, learned, teacher, index):
    return squared(F.linear(result["body"], *layer(learned, index)), ask(teacher)["body"])


def of_two(result, answers, learned):
    """The mean of the losses to two teachers, on logits and on a layer, through an adapter for each other width."""
    values = []
    for index, answer in enumerate(answers):
        feature, target = result["body"], answer["body"]
        if feature.shape != target.shape:
            feature = F.linear(feature, *layer(learned, index))
        values.append(0.5 * soft_targets(result["logits"], answer["logits"], 4.0) + 2.0 * squared(feature, target))
    return sum(values) / 2


def two_teachers(result, ask, batch, place, learned):
    return of_two(result, [ask(Mlp(7, seed=1)), ask(Mlp(6, seed=2))], learned)


def average_and_network(result, ask, batch, place, learned):
    return of_two(result, [ask(None), ask(Mlp(6, seed=2))], learned)


def cache_and_network(result, ask, batch, place, learned):
    """The network answers in the precision of the step, and the cache in the one in which it was built."""
    return of_two(result, [ask(Mlp(7, seed=1)), ask(Mlp(6, seed=2), None)], learned)


def weighted_teachers(result, ask, batch, place, learned):
    shares = torch.tensor([3.0, line(1.0, 0.0, place.fraction)])
    teachers = [Mlp(7, seed=1), Mlp(6, seed=2)]
    logits = [soft_targets(result["logits"], ask(teacher)["logits"], 4.0) for teacher in teachers]
    features = [adapted(result, ask, learned, teacher, index) for index, teacher in enumerate(teachers)]
    values = [0.5 * logit + 2.0 * feature for logit, feature in zip(logits, features, strict=True)]
    return sum(share * value for share, value in zip(shares / shares.sum(), values, strict=True))


def _both(ask):
    return [ask(Mlp(7, seed=1))["logits"], ask(Mlp(6, seed=2))["logits"]]


def mixed_probabilities(result, ask, batch, place, learned):
    return soft_targets(result["logits"], mixed(_both(ask), torch.tensor([0.7, 0.3]), 4.0), 4.0)


def mixed_logits(result, ask, batch, place, learned):
    teachers = _both(ask)
    weights = confidence(teachers)
    return soft_targets(result["logits"], sum(w * z.float() for w, z in zip(weights, teachers, strict=True)), 4.0)


def losses_by_confidence(result, ask, batch, place, learned):
    teachers = _both(ask)
    weights, values = confidence(teachers), []
    for row in range(len(result["logits"])):
        for weight, teacher in zip(weights, teachers, strict=True):
            values.append(weight[row, 0] * soft_targets(result["logits"][row : row + 1], teacher[row : row + 1], 4.0))
    return sum(values) / len(result["logits"])


def routed(result, ask, batch, place, learned):
    values = []
    for index, teacher in enumerate([Mlp(7, seed=1), Mlp(6, seed=2)]):
        rows = (batch["labels"] % 2 == index).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        part = {name: value[rows] for name, value in result.items()}
        answer = {name: value[rows] for name, value in ask(teacher).items()}
        value = 0.5 * soft_targets(part["logits"], answer["logits"], 4.0)
        value = value + 2.0 * adapted(part, lambda _, answer=answer: answer, learned, teacher, index)
        values.append(len(rows) / len(batch["labels"]) * value)
    return sum(values)
