"""The form of a report, which the package shares with the benchmarks."""

from __future__ import annotations

from dasheng_tokenizer.evaluation.report import Report, Table, hardware

__all__ = ["Report", "Table", "hardware"]
