"""The record of a run: `log.jsonl` in the run folder, and the same in TensorBoard with audio and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dasheng_tokenizer.files import atomic_path, parse_json, require_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends one JSON line a record, and mirrors numbers, audio and pictures to TensorBoard.

    On resume, records of steps that are done again are dropped, so that the file reads as if nothing had happened. On
    ranks other than 0 every method does nothing.
    """

    def __init__(self, folder: Path, step: int, active: bool = True) -> None:
        """Open the record of a run.

        Args:
            folder: run folder.
            step: steps already done; later records are dropped.
            active: False on ranks other than 0.

        Raises:
            MissingExtraError: TensorBoard is not installed.
        """
        self.path = folder / "log.jsonl"
        self.writer: SummaryWriter | None = None
        if active:
            tensorboard = require_extra("torch.utils.tensorboard", "train")
            truncate_log(self.path, step)
            self.writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def __enter__(self) -> RunLog:
        """Return the log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush and close TensorBoard's file."""
        if self.writer is not None:
            self.writer.close()

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one record; numbers also go to TensorBoard as `kind/name`."""
        if self.writer is None:
            return
        line = json.dumps({"kind": kind, "step": step, **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{kind}/{name}", value, step)
        self.writer.flush()

    def audio(self, name: str, samples: np.ndarray, step: int, sampling_rate: int) -> None:
        """Store audio, samples (S,) in [-1, 1]."""
        if self.writer is not None:
            self.writer.add_audio(name, np.clip(samples, -1.0, 1.0)[None], step, sample_rate=sampling_rate)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Store a picture and close it."""
        if self.writer is not None:
            self.writer.add_figure(name, figure, step)


def truncate_log(path: Path, step: int) -> None:
    """Drop the records after `step`, and a last line that a killed run left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if parse_json(line, finite=False)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def read_log(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the records of a run, all or of one kind (`train`, `validation`)."""
    records = [parse_json(line, finite=False) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if kind is None or record["kind"] == kind]
