"""Containers inside packages that hold audio: zip archives of games, Qt resource files, sound sets of OpenTTD."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from dasheng_tokenizer.audio_formats import READ_SUFFIXES
from dasheng_tokenizer.errors import DataError

AUDIO_SUFFIXES = READ_SUFFIXES | {".wv", ".g722"}
_ZIP_SUFFIXES = {".pk3", ".pk4", ".zip"}
_DIRECTORY, _ZLIB, _ZSTD = 2, 1, 4  # flags of an entry in a Qt resource file


def unpack_containers(folder: Path) -> None:
    """Write the audio of every container below `folder` into `folder/unpacked`, under its name in the container.

    Raises:
        DataError: a container is damaged or of an unknown kind.
    """
    readers = {".rcc": _qt_resource, ".cat": _sound_set, **dict.fromkeys(_ZIP_SUFFIXES, _zip)}
    for path in sorted(folder.rglob("*")):
        reader = readers.get(path.suffix.lower())
        if reader is None or not path.is_file() or path.is_symlink():
            continue
        try:
            for name, data in reader(path):
                _write(folder / "unpacked", name, data)
        except (struct.error, zipfile.BadZipFile, zlib.error, IndexError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be unpacked: {error}") from error


def _write(root: Path, name: str, data: bytes) -> None:
    target = (root / name).resolve()
    if not target.is_relative_to(root.resolve()):
        raise DataError(f"a container wants to write outside its folder: {name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def _is_audio(name: str) -> bool:
    return Path(name).suffix.lower() in AUDIO_SUFFIXES


def _zip(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if _is_audio(name):
                yield name, archive.read(name)


def _sound_set(path: Path) -> Iterator[tuple[str, bytes]]:
    """OpenTTD: a table of offsets and sizes; each entry is a description with its length before it, then a WAV file.

    The description begins with a title in quotes, which gives the file its name, the number of the sound before it.
    """
    data = path.read_bytes()
    count = (struct.unpack_from("<I", data)[0] & 0x7FFFFFFF) // 8
    for index in range(count):
        offset = struct.unpack_from("<I", data, 8 * index)[0] & 0x7FFFFFFF
        start = offset + 1 + data[offset]
        title = data[offset + 1 : start].rstrip(b"\0").decode(errors="replace").split('"')
        name = re.sub("[^A-Za-z0-9]+", "_", title[min(1, len(title) - 1)])
        if data[start : start + 4] == b"RIFF":
            size = struct.unpack_from("<I", data, start + 4)[0] + 8
            yield f"{index:02d}_{name}.wav", data[start : start + size]


def _qt_resource(path: Path) -> Iterator[tuple[str, bytes]]:
    """Qt's binary resource file: a tree of names and of data, each with its own table, all numbers big-endian."""
    data = path.read_bytes()
    if data[:4] != b"qres":
        return
    version, tree, contents, names = struct.unpack_from(">IIII", data, 4)
    entry = 22 if version >= 2 else 14

    def walk(node: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        at = tree + node * entry
        name_at, flags = struct.unpack_from(">IH", data, at)
        length = struct.unpack_from(">H", data, names + name_at)[0] if node else 0
        name = data[names + name_at + 6 : names + name_at + 6 + 2 * length].decode("utf-16-be")
        full = f"{prefix}/{name}" if prefix else name
        if flags & _DIRECTORY:
            count, first = struct.unpack_from(">II", data, at + 6)
            for child in range(first, first + count):
                yield from walk(child, full)
        elif _is_audio(name):
            start = contents + struct.unpack_from(">I", data, at + 10)[0]
            size = struct.unpack_from(">I", data, start)[0]
            yield full, _expand(data[start + 4 : start + 4 + size], flags, path)

    yield from walk(0, "")


def _expand(data: bytes, flags: int, path: Path) -> bytes:
    if flags & _ZSTD:
        raise DataError(f"{path} is compressed by Zstandard, which this recipe does not read")
    return zlib.decompress(data[4:]) if flags & _ZLIB else data  # four bytes of length come first
