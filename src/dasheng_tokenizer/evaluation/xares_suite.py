"""The public X-ARES tasks as a suite of probes, as far as their shards are there."""

from __future__ import annotations

from pathlib import Path

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.evaluation.embedding_store import Split
from dasheng_tokenizer.evaluation.probe import Fold, SuiteTask
from dasheng_tokenizer.evaluation.xares_data import XaresData
from dasheng_tokenizer.evaluation.xares_tasks import available

WITH_FRAMES = ("frame", "asr")
"""Heads that look at every token; the others take the mean over time."""


def xares_suite(folder: str | Path, xares_protocol: bool = False) -> tuple[list[SuiteTask], dict[str, str]]:
    """Tasks whose shards are there, and for each other one the reason with its source.

    Args:
        folder: that holds `NAME/*.tar` or `env/NAME/*.tar`.
        xares_protocol: choose epochs by the data that the original package chooses them by.

    Raises:
        DataError: none of the tasks is there.
    """
    rows, missing = available(folder)
    if not rows:
        raise DataError(f"{folder} holds no task of X-ARES: {'; '.join(missing.values())}")
    return [_suite_task(XaresData(row, folder, xares_protocol)) for row in rows], missing


def _suite_task(data: XaresData) -> SuiteTask:
    task = data.row.task

    def split(name: str) -> Split:
        frames = task.head in WITH_FRAMES
        return Split(f"{task.name} {name}", data.identity(name), lambda skipped: data.examples(name, skipped), frames)

    folds = [
        Fold(*([split(name) for name in fold[role]] for role in ("train", "valid", "test"))) for fold in data.folds
    ]
    return SuiteTask(task, folds, lambda role, key, label: label)
