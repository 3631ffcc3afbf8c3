"""Reading local files and anything that fsspec reaches by a URL (`s3://…`, `gs://…`, `hf://…`, `https://…`)."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.files import require_extra

TRIES = 3
"""Requests before a storage counts as one that does not answer; the waits between them are 1 and 2 seconds."""


def is_url(name: str) -> bool:
    """Whether a source is a URL and not a local path."""
    return "://" in name


def join(folder: str, name: str) -> str:
    """A name below a folder or URL; absolute paths and URLs stay as they are."""
    if is_url(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def base_name(name: str) -> str:
    """Last part of a path or URL."""
    return name.rstrip("/").rpartition("/")[2] if is_url(name) else os.path.basename(name)


def folder_of(name: str) -> str:
    """What a path or URL lies in."""
    return name.rpartition("/")[0] if is_url(name) else os.path.dirname(name)


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path there.

    Raises:
        MissingExtraError: fsspec is not installed.
        ConfigurationError: no such protocol, or its package is not installed.
    """
    fsspec = require_extra("fsspec", "scale")
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"{url} cannot be reached: {error}") from error
    return found


def read_bytes(name: str, start: int = 0, end: int | None = None) -> bytes:
    """The bytes from `start` up to `end` of a file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: a local file that cannot be read, or a name that no local file can have.
        DataError: a storage that does not answer, after `TRIES` requests.
    """
    if not is_url(name):
        try:
            file = open(name, "rb")  # noqa: SIM115
        except ValueError as error:  # a zero byte, or half a character, in the name
            raise OSError(errno.EINVAL, f"no file can have such a name ({error})") from error
        with file:
            file.seek(start)
            return file.read() if end is None else file.read(end - start)
    system, path = file_system(name)
    for attempt in range(TRIES):
        try:
            data: bytes = system.cat_file(path, start=start or None, end=end)
            return data
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each storage has its own kinds
            if attempt + 1 == TRIES:
                raise DataError(f"{name} cannot be read ({error!r}); check network and permissions") from error
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


@contextmanager
def opened(name: str) -> Iterator[IO[bytes]]:
    """A file for reading at any position.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        if is_url(name):
            system, path = file_system(name)
            file = system.open(path, "rb")
        else:
            file = open(name, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{name} cannot be read: no file can have such a name ({error})") from error
    with file:
        yield file


@contextmanager
def local_copy(name: str) -> Iterator[Path]:
    """A local file as it is; what lies behind a URL as a temporary file of the same name.

    Archives are fetched whole: encoding one takes minutes, and few storages keep a connection open that long.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the storage does not answer, or the temporary folder is full.
    """
    if not is_url(name):
        yield Path(name)
        return
    system, path = file_system(name)
    folder = tempfile.mkdtemp(prefix="dasheng-tokenizer-")
    try:
        target = Path(folder) / base_name(name)
        for attempt in range(TRIES):
            try:
                system.get_file(path, str(target))
                break
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:
                if attempt + 1 == TRIES:
                    raise DataError(
                        f"{name} cannot be fetched to {folder} ({error!r}); check network and disk"
                    ) from error
                time.sleep(2**attempt)
        yield target
    finally:
        shutil.rmtree(folder, ignore_errors=True)
