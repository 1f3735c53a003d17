"""The kernels behind ``triton_rows``, one program for each row of logits.

Each lane of a program keeps its own largest logits and sums and meets the others once, after its last logit. The sums
of the lanes are added up in float64; everything else is float32, whatever the logits are. A statement about settings
(``kind``, ``weighted``, ``labelled``) is decided when a kernel is compiled.
"""

import math

import triton
import triton.language as tl

from lightning_distill.functional.kernels.settings import Kind

KINDS: dict[Kind, int] = {
    "forward_kl": 0,
    "cross_entropy": 1,
    "reverse_kl": 2,
    "jensen_shannon": 3,
    "skew_kl": 4,
    "skew_reverse_kl": 5,
    "total_variation": 6,
}
FORWARD_KL, CROSS_ENTROPY, REVERSE_KL, JENSEN_SHANNON, SKEW_KL, SKEW_REVERSE_KL, TOTAL_VARIATION = map(
    tl.constexpr, KINDS.values()
)
LOG2_E = tl.constexpr(math.log2(math.e))
TINY = tl.constexpr(1.2e-38)  # in place of a mixture of two probabilities that are less
# Numbers that a kernel is not compiled for again.
STRIDES = ["x_outer", "x_inner", "y_outer", "y_inner", "inner_rows"]


@triton.jit
def _scores(row, offsets, floor, classes: tl.constexpr, eviction: tl.constexpr):
    """Float32 logits, not less than the floor."""
    scores = tl.load(row + offsets, mask=offsets < classes, other=float("-inf"), eviction_policy=eviction)
    return tl.maximum(scores.to(tl.float32), floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _offsets(lanes: tl.constexpr, word: tl.constexpr, aligned: tl.constexpr):
    """Offsets of the first tile: a lane owns neighbours that it reads at once, if rows are aligned, else every n-th."""
    lane, number = tl.arange(0, lanes)[:, None], tl.arange(0, word)[None, :]
    return lane * word + number if aligned else lane + number * lanes


@triton.jit
def _row_of(logits, outer_stride, inner_stride, inner_rows, word: tl.constexpr, aligned: tl.constexpr):
    """Pointer to this program's row of a tensor of shape (outer rows, inner rows, classes)."""
    row = tl.program_id(0).to(tl.int64)
    start = (row // inner_rows) * outer_stride + (row % inner_rows) * inner_stride
    return logits + (tl.multiple_of(start, word) if aligned else start)


@triton.jit
def _terms(dx, dy, q, p, scale, log_sum_q, log_sum_p, share, kind: tl.constexpr):
    """Each class's part f of the value, and h = q df/dq, for the divergences that need both sums of exponentials."""
    if kind == TOTAL_VARIATION:
        f = 0.5 * tl.abs(p - q)
        h = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    else:
        log_q, log_p = dx * scale - log_sum_q, dy * scale - log_sum_p
        if kind == JENSEN_SHANNON:
            log_m = tl.log(tl.maximum(share * p + (1 - share) * q, TINY))
            h = (1 - share) * q * (log_q - log_m)
            f = share * p * (log_p - log_m) + h
        elif kind == SKEW_KL:
            m = tl.maximum(share * p + (1 - share) * q, TINY)
            f = p * (log_p - tl.log(m))
            h = (share - 1) * q * (p / m)
        else:
            m = tl.maximum(share * q + (1 - share) * p, TINY)
            f = q * (log_q - tl.log(m))
            h = f + q * (1 - share * (q / m))
    return f, h


@triton.jit
def _sum(lanes):
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def _statistics(
    x_row, y_row, offsets, scale, floor, share,
    classes: tl.constexpr, kind: tl.constexpr, whole_sum: tl.constexpr, lanes: tl.constexpr, word: tl.constexpr,
):  # fmt: skip
    """Value of a row and its six numbers."""
    zero = tl.zeros((lanes,), tl.float32)
    max_x, max_y, sum_q, sum_p, sum_whole, moment = zero + floor, zero + floor, zero, zero, zero, zero
    for start in range(0, classes, lanes * word):
        x = _scores(x_row, start + offsets, floor, classes, "evict_last")
        y = _scores(y_row, start + offsets, floor, classes, "evict_last")
        if kind == REVERSE_KL:
            x = tl.where(y <= floor, floor, x)
        new_x, new_y = tl.maximum(max_x, tl.max(x, 1)), tl.maximum(max_y, tl.max(y, 1))
        dx, dy = x - new_x[:, None], y - new_y[:, None]
        q, p = tl.exp2(dx * (scale * LOG2_E)), tl.exp2(dy * (scale * LOG2_E))
        shrink_q = tl.exp2((max_x - new_x) * (scale * LOG2_E))
        shrink_p = tl.exp2((max_y - new_y) * (scale * LOG2_E))
        # Sums of exponentials times differences, which move along with the largest logits.
        if kind == FORWARD_KL:
            moment = shrink_p * (moment - sum_p * ((new_y - max_y) - (new_x - max_x))) + tl.sum(p * (dy - dx), 1)
        if kind == CROSS_ENTROPY:
            moment = shrink_p * (moment + sum_p * (max_x - new_x)) + tl.sum(p * dx, 1)
        if kind == REVERSE_KL:
            moment = shrink_q * (moment - sum_q * ((new_x - max_x) - (new_y - max_y))) + tl.sum(q * (dx - dy), 1)
        if whole_sum:
            sum_whole = sum_whole * tl.exp2((max_x - new_x) * LOG2_E) + tl.sum(tl.exp2(dx * LOG2_E), 1)
        sum_q = sum_q * shrink_q + tl.sum(q, 1)
        sum_p = sum_p * shrink_p + tl.sum(p, 1)
        max_x, max_y = new_x, new_y

    largest_x, largest_y = tl.max(max_x, 0), tl.max(max_y, 0)
    below_x, below_y = max_x - largest_x, max_y - largest_y
    shrink_q, shrink_p = tl.exp2(below_x * (scale * LOG2_E)), tl.exp2(below_y * (scale * LOG2_E))
    wide_q, wide_p = _sum(sum_q * shrink_q), _sum(sum_p * shrink_p)
    total_q, total_p = wide_q.to(tl.float32), wide_p.to(tl.float32)
    whole = total_q
    if whole_sum:
        whole = tl.sum(sum_whole * tl.exp2(below_x * LOG2_E), 0)

    if kind == FORWARD_KL:
        moment = shrink_p * (moment + sum_p * (below_y - below_x))
        value = (scale * _sum(moment) / wide_p + tl.log(wide_q / wide_p)).to(tl.float32)
        centre = value
    elif kind == CROSS_ENTROPY:
        value = (tl.log(wide_q) - scale * _sum(shrink_p * (moment + sum_p * below_x)) / wide_p).to(tl.float32)
        centre = value
    elif kind == REVERSE_KL:
        moment = shrink_q * (moment + sum_q * (below_x - below_y))
        value = (scale * _sum(moment) / wide_q + tl.log(wide_p / wide_q)).to(tl.float32)
        centre = value
    else:
        log_sum_q, log_sum_p = tl.log(total_q), tl.log(total_p)
        values, centres = zero, zero
        for start in range(0, classes, lanes * word):
            dx = _scores(x_row, start + offsets, floor, classes, "evict_last") - largest_x
            dy = _scores(y_row, start + offsets, floor, classes, "evict_last") - largest_y
            q = tl.exp2(dx * (scale * LOG2_E)) / total_q
            p = tl.exp2(dy * (scale * LOG2_E)) / total_p
            f, h = _terms(dx, dy, q, p, scale, log_sum_q, log_sum_p, share, kind)
            values += tl.sum(f, 1)
            centres += tl.sum(h, 1)
        value, centre = tl.sum(values, 0), tl.sum(centres, 0)
        # The rounding of the two logarithms, in a sum of probabilities times their differences.
        if kind == JENSEN_SHANNON:
            value -= (1 - share) * (tl.log(wide_q) - log_sum_q).to(tl.float32)
            value -= share * (tl.log(wide_p) - log_sum_p).to(tl.float32)
        elif kind == SKEW_KL:
            value -= (tl.log(wide_p) - log_sum_p).to(tl.float32)
        elif kind == SKEW_REVERSE_KL:
            value -= (tl.log(wide_q) - log_sum_q).to(tl.float32)
    return value, largest_x, total_q, largest_y, total_p, centre, whole


@triton.jit
def _store_gradient(
    x_row, y_row, out_row, offsets, scale, floor, share, label, factor, task_factor,
    largest_x, total_q, largest_y, total_p, centre, whole,
    classes: tl.constexpr, kind: tl.constexpr, labelled: tl.constexpr, lanes: tl.constexpr, word: tl.constexpr,
):  # fmt: skip
    """Write a row's gradient, which may lie where its logits are."""
    log_sum_q, log_sum_p = tl.log(total_q), tl.log(total_p)
    inverse_q, inverse_p = 1.0 / total_q, 1.0 / total_p
    for start in range(0, classes, lanes * word):
        at = start + offsets
        x = _scores(x_row, at, floor, classes, "evict_first")
        y = _scores(y_row, at, floor, classes, "evict_first")
        if kind == REVERSE_KL:
            x = tl.where(y <= floor, floor, x)
        dx, dy = x - largest_x, y - largest_y
        q, p = tl.exp2(dx * (scale * LOG2_E)) * inverse_q, tl.exp2(dy * (scale * LOG2_E)) * inverse_p
        if kind == FORWARD_KL or kind == CROSS_ENTROPY:
            slope = (q - p) * factor
        elif kind == REVERSE_KL:
            slope = q * (scale * (dx - dy) + (log_sum_p - log_sum_q - centre)) * factor
        else:
            _, h = _terms(dx, dy, q, p, scale, log_sum_q, log_sum_p, share, kind)
            slope = (h - q * centre) * factor
        if labelled:
            slope += task_factor * (tl.exp2(dx * LOG2_E) / whole - tl.where(at == label, 1.0, 0.0))
        tl.store(out_row + at, slope.to(out_row.dtype.element_ty), mask=at < classes)


@triton.jit
def _store_zeros(out_row, offsets, classes: tl.constexpr, lanes: tl.constexpr, word: tl.constexpr):
    for start in range(0, classes, lanes * word):
        zeros = tl.zeros((lanes, word), out_row.dtype.element_ty)
        tl.store(out_row + start + offsets, zeros, mask=start + offsets < classes)


@triton.jit
def _counts(weights, labels, weighted: tl.constexpr, labelled: tl.constexpr):
    """Weight and label of this program's row; 1 without weights, and -1 without labels."""
    row = tl.program_id(0)
    weight, label = 1.0, -1
    if weighted:
        weight = tl.load(weights + row).to(tl.float32)
    if labelled:
        label = tl.load(labels + row).to(tl.int32)
    return weight, label


@triton.jit
def _store_values(
    x_row, values, task_values, value, weight, label, floor, largest, whole,
    classes: tl.constexpr, labelled: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tl.store(values + row, tl.where(weight == 0, 0.0, value))
    if labelled:
        at_label = _scores(x_row, tl.where(label < 0, classes, label), floor, classes, "")
        tl.store(task_values + row, tl.where(label < 0, 0.0, tl.log(whole) - (at_label - largest)))


@triton.jit(do_not_specialize=STRIDES)
def forward(
    x, y, x_outer, x_inner, y_outer, y_inner, inner_rows, values, task_values, statistics, weights, labels,
    scale, floor, share,
    classes: tl.constexpr, kind: tl.constexpr, weighted: tl.constexpr, labelled: tl.constexpr, whole_sum: tl.constexpr,
    aligned: tl.constexpr, lanes: tl.constexpr, word: tl.constexpr,
):  # fmt: skip
    """Values and numbers of a row; those of a row without weight and label are not written."""
    weight, label = _counts(weights, labels, weighted, labelled)
    if weighted:
        if (weight == 0) & (label < 0):
            return
    x_row = _row_of(x, x_outer, x_inner, inner_rows, word, aligned)
    y_row = _row_of(y, y_outer, y_inner, inner_rows, word, aligned)
    offsets = _offsets(lanes, word, aligned)
    value, largest_x, total_q, largest_y, total_p, centre, whole = _statistics(
        x_row, y_row, offsets, scale, floor, share, classes, kind, whole_sum, lanes, word
    )
    _store_values(x_row, values, task_values, value, weight, label, floor, largest_x, whole, classes, labelled)
    row = statistics + tl.program_id(0) * 6
    tl.store(row, largest_x)
    tl.store(row + 1, total_q)
    tl.store(row + 2, largest_y)
    tl.store(row + 3, total_p)
    tl.store(row + 4, centre)
    tl.store(row + 5, whole)


@triton.jit(do_not_specialize=[*STRIDES, "out_outer", "out_inner"])
def backward(
    x, y, out, x_outer, x_inner, y_outer, y_inner, out_outer, out_inner, inner_rows,
    statistics, upstream, task_upstream, weights, labels, scale, floor, share,
    classes: tl.constexpr, kind: tl.constexpr, weighted: tl.constexpr, labelled: tl.constexpr,
    aligned: tl.constexpr, lanes: tl.constexpr, word: tl.constexpr,
):  # fmt: skip
    """Gradient of a row from its numbers."""
    weight, label = _counts(weights, labels, weighted, labelled)
    out_row = _row_of(out, out_outer, out_inner, inner_rows, word, aligned)
    offsets = _offsets(lanes, word, aligned)
    if weighted:
        if (weight == 0) & (label < 0):
            _store_zeros(out_row, offsets, classes, lanes, word)
            return
    x_row = _row_of(x, x_outer, x_inner, inner_rows, word, aligned)
    y_row = _row_of(y, y_outer, y_inner, inner_rows, word, aligned)
    row = tl.program_id(0)
    task_factor = 0.0
    if labelled:
        task_factor = tl.where(label < 0, 0.0, tl.load(task_upstream + row))
    factor = tl.where(weight == 0, 0.0, weight * scale * tl.load(upstream + row))
    known = statistics + row * 6
    _store_gradient(
        x_row, y_row, out_row, offsets, scale, floor, share, label, factor, task_factor,
        tl.load(known), tl.load(known + 1), tl.load(known + 2), tl.load(known + 3), tl.load(known + 4),
        tl.load(known + 5), classes, kind, labelled, lanes, word,
    )  # fmt: skip


@triton.jit(do_not_specialize=STRIDES)
def in_place(
    x, y, x_outer, x_inner, y_outer, y_inner, inner_rows, values, task_values, weights, labels,
    scale, floor, share, task_weight,
    classes: tl.constexpr, kind: tl.constexpr, weighted: tl.constexpr, labelled: tl.constexpr, whole_sum: tl.constexpr,
    aligned: tl.constexpr, lanes: tl.constexpr, word: tl.constexpr,
):  # fmt: skip
    """Values of a row, and its gradient in place of the student's logits."""
    weight, label = _counts(weights, labels, weighted, labelled)
    x_row = _row_of(x, x_outer, x_inner, inner_rows, word, aligned)
    y_row = _row_of(y, y_outer, y_inner, inner_rows, word, aligned)
    offsets = _offsets(lanes, word, aligned)
    if weighted:
        if (weight == 0) & (label < 0):
            _store_zeros(x_row, offsets, classes, lanes, word)
            return
    value, largest_x, total_q, largest_y, total_p, centre, whole = _statistics(
        x_row, y_row, offsets, scale, floor, share, classes, kind, whole_sum, lanes, word
    )
    _store_values(x_row, values, task_values, value, weight, label, floor, largest_x, whole, classes, labelled)
    task_factor = tl.where(label < 0, 0.0, task_weight)
    tl.debug_barrier()  # every lane has read the label's logit before another lane writes there
    _store_gradient(
        x_row, y_row, x_row, offsets, scale, floor, share, label, weight * scale, task_factor,
        largest_x, total_q, largest_y, total_p, centre, whole, classes, kind, labelled, lanes, word,
    )  # fmt: skip
