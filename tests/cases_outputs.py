"""Rows of ``cases.py`` for the further losses on the models' outputs."""

from __future__ import annotations

from loss_case import LossCase

OUTPUT_CASES: list[LossCase] = []
