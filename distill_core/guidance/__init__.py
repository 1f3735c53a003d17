"""Guidance: did distillation help, and what to try next. No framework is imported."""

from distill_core.guidance.report import write_report

__all__ = ["write_report"]
