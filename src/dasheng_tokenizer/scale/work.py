"""What the engines with several workers share: which units wait, which failed, and one try at a unit."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

from dasheng_tokenizer.errors import DashengTokenizerError, DataError, ModelMismatchError, WorkerError
from dasheng_tokenizer.scale.shard_writer import EncodingJob, LatentModel, encode_unit

ATTEMPTS = 3
"""Tries at a unit before it counts as failed."""

MOST_FAILED = 10
"""Failed units at which a run stops: something is wrong with more than single units."""

Message = tuple[str, object]
"""What a worker says: ("ready" | "items" | "done", count), ("failed", reason) or ("fatal", error)."""


class WorkQueue:
    """Units that wait. One that fails, or whose worker dies, waits again, a few times."""

    def __init__(self, job: EncodingJob, numbers: Sequence[int]) -> None:
        self._job = job
        self._waiting = deque(numbers)
        self._tries: Counter[int] = Counter()
        self._failed: dict[int, str] = {}
        self._stillborn = 0

    def __bool__(self) -> bool:
        """Whether units wait."""
        return bool(self._waiting)

    def take(self) -> int:
        """The next unit."""
        return self._waiting.popleft()

    def worker_started(self) -> None:
        """Note that a worker has its model."""
        self._stillborn = 0

    def worker_lost(self, reason: str) -> None:
        """Note that a worker died before it had its model.

        Raises:
            WorkerError: too often in a row.
        """
        self._stillborn += 1
        if self._stillborn >= ATTEMPTS:
            raise WorkerError(
                f"{self._stillborn} workers in a row died while they loaded the model ({reason}); take fewer workers, "
                "or give each more memory; what is done stays, the same command goes on"
            )

    def unit_lost(self, number: int, reason: str) -> None:
        """Put a unit back, or count it as failed.

        Raises:
            WorkerError: too many units failed.
        """
        self._tries[number] += 1
        if self._tries[number] < ATTEMPTS:
            self._waiting.append(number)
            return
        self._failed[number] = reason
        if len(self._failed) >= MOST_FAILED:
            self.check()

    def check(self) -> None:
        """See that no unit failed.

        Raises:
            WorkerError: one did.
        """
        if self._failed:
            named = "; ".join(
                f"unit {number} ({self._job.units[number].name}): {reason}"
                for number, reason in list(self._failed.items())[:3]
            )
            raise WorkerError(
                f"{len(self._failed)} units of work failed {ATTEMPTS} times each, such as {named}; what is done stays, "
                "the same command tries these again"
            )


def check_model(job: EncodingJob, model: LatentModel) -> None:
    """See that a worker found the model that the run is about.

    Raises:
        ModelMismatchError: it found another one of that name.
    """
    if (found := model.weights_hash()) != job.model_hash:
        raise ModelMismatchError(
            f"a worker found a model with weights {found[:12]} instead of {job.model_hash[:12]} under the same name; "
            "put the same model on all machines"
        )


def load_checked(job: EncodingJob, model_name: str | None, device: str) -> LatentModel:
    """Load the model in the arithmetic of the job; the hash is that of the weights as they are stored.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigurationError: there is no such device.
        ModelMismatchError: it is another one.
    """
    from dasheng_tokenizer.cli_audio import load_model

    model = load_model(model_name, device, job.options.arithmetic)
    check_model(job, model)
    return model


def try_unit(job: EncodingJob, number: int, model: LatentModel, advance: Callable[[int], None]) -> Message:
    """Encode a unit; whatever goes wrong is told and not raised.

    Returns:
        ("done", 0); ("failed", reason) where another try may help; ("fatal", error) where none will.
    """
    try:
        encode_unit(job, number, model, advance)
    except DataError as error:  # a storage that does not answer
        return "failed", str(error)
    except DashengTokenizerError as error:
        return "fatal", error
    except Exception as error:  # out of memory, a driver of the GPU, a network
        return "failed", f"{type(error).__name__}: {error}"
    return "done", 0
