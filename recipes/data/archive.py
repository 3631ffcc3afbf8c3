"""Packages of a Debian archive: the list of them, download with checksum, and unpacking, each step done once."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from containers import unpack_containers

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.files import atomic_path, make_folder, require_extra

MIRROR = "https://deb.debian.org/debian"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """A binary package: `file` is its path below the root of a mirror, `sha256` that of the .deb file."""

    name: str
    version: str
    file: str
    size: int
    sha256: str


def load_packages(path: Path) -> dict[str, Package]:
    """The packages of a YAML list by name.

    Raises:
        DataError: the list cannot be read or an entry lacks a field.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: Package(name=name, **fields) for name, fields in entries.items()}
    except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no list of packages ({error}); make one with recipes/data/list_packages.py"
        ) from error


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch(package: Package, mirror: str, cache: Path) -> Path:
    """The .deb file in `cache`, downloaded when it is not there.

    Args:
        package: What to fetch.
        mirror: URL of a mirror or a snapshot, or a local folder laid out like one.
        cache: Folder of downloads.

    Raises:
        DataError: it cannot be had, or its checksum is another one; nothing is kept then.
    """
    target = cache / f"{package.name}_{package.sha256[:16]}.deb"
    if target.is_file():
        return target
    with atomic_path(target) as temporary:
        source = f"{mirror.rstrip('/')}/{package.file}"
        try:
            _copy(source, temporary)
        except OSError as error:  # requests' errors are OSErrors too
            raise DataError(
                f"cannot fetch {source}: {error}; archives drop old versions: name another mirror or a dated one of "
                "snapshot.debian.org with --mirror"
            ) from error
        if checksum(temporary) != package.sha256:
            raise DataError(f"{source} is not the file that was listed (checksum); try another mirror")
    return target


def _copy(source: str, target: Path) -> None:
    if "://" not in source:
        shutil.copyfile(source, target)
        return
    pooch = require_extra("pooch", "data")
    pooch.HTTPDownloader(progressbar=True)(source, str(target), None)


def unpack(package: Package, deb: Path, folder: Path) -> Path:
    """Folder with the files of the package; those inside its containers are below `unpacked`.

    Raises:
        DataError: dpkg-deb is missing or cannot read the file.
    """
    target = folder / f"{package.name}_{package.sha256[:16]}"
    if target.is_dir():
        return target
    partial = make_folder(folder) / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        subprocess.run(["dpkg-deb", "-x", str(deb), str(partial)], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise DataError("dpkg-deb is needed to unpack packages; install dpkg (Linux: apt-get, macOS: brew)") from error
    except subprocess.CalledProcessError as error:
        raise DataError(f"{deb} cannot be unpacked: {error.stderr.strip()}") from error
    unpack_containers(partial)
    partial.rename(target)
    return target


def licence_text(folders: Iterable[Path]) -> str:
    """The copyright files of unpacked packages, one after another."""
    files = sorted(file for folder in folders for file in folder.glob("usr/share/doc/*/copyright") if file.is_file())
    rule = "=" * 80
    return "".join(
        f"{rule}\n{file.parent.name}\n{rule}\n{file.read_text(encoding='utf-8', errors='replace')}\n" for file in files
    )
