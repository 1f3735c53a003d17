"""Losses as plain PyTorch formulas, to time the library's losses against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    grams = [F.normalize(f.flatten(1) @ f.flatten(1).T, dim=1) for f in (student, teacher)]
    return (grams[0] - grams[1]).square().mean()


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    ratios = []
    for f in (student.flatten(1), teacher.flatten(1)):
        squares = f.square().sum(1)
        distances = (squares[:, None] + squares[None] - 2 * f @ f.T).clamp(min=1e-12).sqrt()
        distances = distances * (1 - torch.eye(len(f)))
        ratios.append(distances / distances[distances > 0].mean())
    return F.smooth_l1_loss(ratios[0], ratios[1])


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    cosines = []
    for f in (student.flatten(1), teacher.flatten(1)):
        directions = F.normalize(f[None] - f[:, None], dim=2)
        cosines.append(directions @ directions.mT)
    return F.smooth_l1_loss(cosines[0], cosines[1])


def relational(student: Tensor, teacher: Tensor) -> Tensor:
    return 25 * relational_distance(student, teacher) + 50 * relational_angle(student, teacher)


def probabilistic_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    probabilities = []
    for f in (student.flatten(1), teacher.flatten(1)):
        rows = f / (f.norm(dim=1, keepdim=True) + 1e-7)
        kernel = (rows @ rows.T + 1) / 2
        probabilities.append(kernel / kernel.sum(1, keepdim=True))
    return (probabilities[1] * ((probabilities[1] + 1e-7) / (probabilities[0] + 1e-7)).log()).mean()


def gaussian_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    kernels = []
    for f in (student.flatten(1), teacher.flatten(1)):
        rows = F.normalize(f, dim=1)
        cosines = rows @ rows.T
        kernels.append(sum(math.exp(-0.8) * 0.8**p / math.factorial(p) * cosines**p for p in range(3)))
    return (kernels[0] - kernels[1]).square().mean()


def neighbour_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    errors = (student.flatten(1) - teacher.flatten(1)).abs()
    return (errors[:-1] * errors[1:]).sum(1).mean()


def inter_channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    grams = [F.normalize(f.flatten(2) @ f.flatten(2).mT, dim=2) for f in (student, teacher)]
    return (grams[0] - grams[1]).square().mean()


def neuron_selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    def kernel(left: Tensor, right: Tensor) -> Tensor:
        return (left[:, :, None] * right[:, None]).sum(3).square().mean()

    s, t = (F.normalize(f.flatten(2), dim=2) for f in (student, teacher))
    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def centered_kernel_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (f.flatten(1) - f.flatten(1).mean(0) for f in (student, teacher))
    return 1 - (t.T @ s).norm() ** 2 / ((s.T @ s).norm() * (t.T @ t).norm())


def pearson_feature(student: Tensor, teacher: Tensor) -> Tensor:
    scores = []
    for f in (student, teacher):
        channels = f.transpose(0, 1).flatten(1)
        scores.append((channels - channels.mean(1, keepdim=True)) / (channels.std(1, keepdim=True) + 1e-6))
    return F.mse_loss(scores[0], scores[1]) / 2


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(F.normalize(student, dim=1), F.normalize(teacher, dim=1))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    maps = [F.normalize(f.square().mean(1).flatten(1)) for f in (student, teacher)]
    return (maps[0] - maps[1]).square().mean()


def attention_relation(student: Tensor, teacher: Tensor) -> Tensor:
    logarithms = []
    for vectors in (student, teacher):
        heads = vectors.view(*vectors.shape[:2], 8, -1).transpose(1, 2)
        logarithms.append((heads @ heads.mT / math.sqrt(heads.shape[3])).log_softmax(3))
    return F.kl_div(logarithms[0], logarithms[1], reduction="none", log_target=True).sum(3).mean()


def attention_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(3), teacher.log_softmax(3), reduction="none", log_target=True).sum(3).mean()


def pixel_relation(student: Tensor, teacher: Tensor) -> Tensor:
    logarithms = []
    for f in (student, teacher):
        pixels = F.normalize(f.flatten(2), dim=1)
        logarithms.append((torch.einsum("icp,jcq->ijpq", pixels, pixels) / 0.1).log_softmax(3))
    return F.kl_div(logarithms[0], logarithms[1], reduction="none", log_target=True).sum(3).mean()


def channel_wise(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = ((f.flatten(2) / 4.0).log_softmax(2) for f in (student, teacher))
    return 4.0**2 * F.kl_div(s, t, reduction="none", log_target=True).sum(2).mean()


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    value, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for cells in (4, 2, 1):
        weight /= 2
        total += weight
        pooled = [F.adaptive_avg_pool2d(f, cells) for f in (student, teacher)]
        value = value + weight * F.mse_loss(pooled[0], pooled[1])
    return value / total


def feature_map_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.layer_norm(f.movedim(1, -1), f.shape[1:2], eps=1e-12) for f in (student, teacher))
    return F.mse_loss(s, t)


def soft_targets(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = ((logits / 4.0).log_softmax(1) for logits in (student, teacher))
    return 4.0**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(teacher.log_softmax(1), student.log_softmax(1), reduction="batchmean", log_target=True)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (logits.log_softmax(1) for logits in (student, teacher))
    middle = torch.stack([s, t]).logsumexp(0) - math.log(2)
    parts = [F.kl_div(middle, part, reduction="batchmean", log_target=True) for part in (s, t)]
    return (parts[0] + parts[1]) / 2


def skew_kl(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.softmax(1), teacher.softmax(1)
    return (t * (t.log() - (0.1 * t + 0.9 * s).log())).sum(1).mean()


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.softmax(1) - teacher.softmax(1)).abs().sum(1).mean() / 2


def alpha_beta(student: Tensor, teacher: Tensor) -> Tensor:
    alpha, beta = 0.2, 0.7
    s, t = student.log_softmax(1), teacher.log_softmax(1)
    both = alpha + beta
    terms = alpha * (both * t).exp() + beta * (both * s).exp() - both * (alpha * t + beta * s).exp()
    return terms.sum(1).mean() / (alpha * beta * both)


def universal_logits(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (logits.softmax(1).sort(dim=1, descending=True).values for logits in (student, teacher))
    return (s - t).abs().sum(1).mean()


def dist(student: Tensor, teacher: Tensor) -> Tensor:
    def apart(left: Tensor, right: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(left - left.mean(1, keepdim=True), right - right.mean(1, keepdim=True)).mean()

    s, t = student.softmax(1), teacher.softmax(1)
    return apart(s, t) + apart(s.T, t.T)


def multi_level(student: Tensor, teacher: Tensor) -> Tensor:
    values = []
    for temperature in (2.0, 3.0, 4.0, 5.0, 6.0):
        s, t = ((logits / temperature).softmax(1) for logits in (student, teacher))
        divergence = F.kl_div(s.log(), t, reduction="batchmean") * temperature**2
        batch = (s @ s.T - t @ t.T).square().sum() / len(s)
        values.append(divergence + batch + (s.T @ s - t.T @ t).square().sum() / s.shape[1])
    return torch.stack(values).mean()
