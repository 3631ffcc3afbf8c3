"""Files that appear whole or not at all, JSON of any origin, and optional packages that are named when missing."""

from __future__ import annotations

import errno
import glob
import importlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

from dasheng_tokenizer.errors import MissingExtraError, OutputError

_PARTIAL = ".partial"
_KEPT = 60  # characters of the name kept in the temporary one, which must not grow beyond what file systems allow

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would be larger than this system or user may write; choose another disk or a smaller format",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "the system does not permit it; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file and not a folder; choose another folder",
    errno.EEXIST: "a file is where a folder is needed; choose another folder",
    errno.EISDIR: "a folder of that name is in the way; choose another name",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
}


def output_error(path: str | Path, error: OSError) -> OutputError:
    """Turn an error of the operating system into one that names the output and says what to do."""
    reason = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}; check the disk and the path")
    return OutputError(f"cannot write {path}: {reason}")


def is_partial(path: str | Path) -> bool:
    """Whether `path` is a temporary file of `atomic_path`, left by a process that was killed while writing."""
    name = Path(path).name
    return name.startswith(".") and f"{_PARTIAL}." in f"{name}."


def write_text(path: Path, text: str, newline: str | None = None) -> None:
    r"""`path.write_text` of any text in UTF-8.

    Names of files that are not UTF-8 reach Python as halves of characters, which UTF-8 does not know. They become
    `\udcff`, which a reader of JSON turns back into the same name.
    """
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline=newline)


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents.

    Raises:
        OutputError: the folder cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error
    return folder


def _lock(handle: IO[bytes]) -> bool:
    """Mark a temporary file as being written; the mark vanishes with the process. False: another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: an open file cannot be removed there, which serves the same end
        return True
    try:
        fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # file systems without locks
        return True
    return True


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary files of this target whose writer was killed before it could tidy up."""
    for stale in target.parent.glob(f".{glob.escape(target.name[:_KEPT])}.*{_PARTIAL}*"):
        with suppress(OSError), stale.open("rb") as handle:
            if _lock(handle):
                stale.unlink()


@contextmanager
def atomic_path(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all.

    Yields the path of an empty temporary file in the same folder and with the same last suffix (libraries infer the
    format from it). Write there; when the block ends, the data is forced to the disk and the file takes its name in one
    step. When the block raises, also for Ctrl-C, the temporary file is removed. A process killed with SIGKILL leaves a
    hidden `.NAME.….partial.SUFFIX`, never a half-written `path`; the next write to the same path removes it.

    Args:
        path: The file to write. Its folder is created.
        overwrite: Whether an existing file may be replaced.

    Raises:
        OutputError: the file exists and `overwrite` is false, or it cannot be written (no permission, full disk, …).
    """
    target = Path(path)
    if os.path.isdir(target):  # unlike pathlib's, it does not raise for impossible names
        raise OutputError(f"cannot write {target}: a folder of that name is in the way; choose another name")
    if not overwrite and os.path.exists(target):
        raise OutputError(f"{target} exists; choose another name or allow overwriting")
    make_folder(target.parent)
    _remove_abandoned(target)
    temporary = target  # no file of ours yet
    try:
        while True:
            temporary = target.with_name(f".{target.name[:_KEPT]}.{secrets.token_hex(4)}{_PARTIAL}{target.suffix}")
            holder = temporary.open("xb")
            # Another writer may have taken the new file for an abandoned one before it was locked.
            if _lock(holder) and temporary.exists():
                break
            holder.close()
        with holder:
            mode = stat.S_IMODE(os.fstat(holder.fileno()).st_mode)
            yield temporary
            temporary.chmod(mode)  # that of any new file; safetensors makes files that only their owner can read
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            if os.name == "nt":
                holder.close()  # an open file cannot be renamed there; elsewhere the lock must outlast the renaming
            os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException as error:
        if temporary != target:
            with suppress(OSError):
                temporary.unlink()
        elsewhere = isinstance(error, OSError) and error.filename not in (None, str(temporary), temporary)
        if isinstance(error, OSError) and error.errno is not None and not elsewhere:
            raise output_error(target, error) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Force the new name to the disk too, where the system offers it (Linux, macOS)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def parse_json(data: str | bytes, finite: bool = True) -> Any:
    """Read JSON that may come from anywhere.

    Args:
        data: the whole document.
        finite: refuse NaN and infinite numbers, which JSON does not know, and whole numbers of more than 64 bits.

    Raises:
        ValueError: no JSON, no UTF-8, nested too deep, or a number beyond what is finite or has thousands of digits.
    """
    strict = {"parse_constant": _refuse_number, "parse_float": _finite, "parse_int": _of_64_bits}
    options: dict[str, Any] = strict if finite else {}
    try:
        return json.loads(data, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _of_64_bits(text: str) -> int:
    return int(text) if len(text) <= 20 else _refuse_number(f"{text[:20]}…")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: Module to import, e.g. `"matplotlib.figure"`.
        extra: Name of the extra of this package that installs it, e.g. `"report"`.

    Raises:
        MissingExtraError: the package is not installed, or is broken; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.partition('.')[0]} is needed for this but cannot be imported ({error}); "
            f"install it with: pip install 'dasheng-tokenizer[{extra}]'"
        ) from error
