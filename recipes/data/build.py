"""Build the training corpus, and a wider one, from packages of the Debian archive.

    python recipes/data/build.py -o FOLDER [--wide] [--speeds 0.9 1.1] [--only PACKAGE …] [--mirror URL]
    python recipes/data/build.py -o FOLDER --compare ../shared/corpus

The corpus is what `corpus.jsonl.xz` lists; `--wide` adds what the rules of `wide.yaml` find in further packages and in
the same ones, `--speeds` copies of the training clips played faster and slower. Started again after an interruption,
the same command goes on where it was. docs/data.md tells more.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import soxr
from archive import MIRROR, Package, fetch, licence_text, load_packages, unpack
from comparison import compare
from corpus_statistics import measure
from decoding import SAMPLING_RATE, Samples, within_full_scale
from shards import encoded, fingerprints, numbered, without_copies, write_shards
from sources import listed_clips, listed_rows, load_rules, package_of, rerendered_notes, ruled_clips
from tqdm import tqdm

from dasheng_tokenizer.errors import DashengTokenizerError, DataError
from dasheng_tokenizer.files import atomic_path, make_folder

HERE = Path(__file__).resolve().parent
FORM = 2  # of clips: raised with every change of the code that changes them, so that they are made again
SOUND_FONT_PACKAGE = "fluid-soundfont-gm"
Row = dict[str, Any]


class Builder:
    """Makes the clips of each package once, then the shards of all."""

    def __init__(self, work: Path, mirror: str, packages: dict[str, Package], speeds: list[float]) -> None:
        self.work, self.mirror, self.packages, self.speeds = work, mirror, packages, speeds

    def folder(self, name: str) -> Path:
        """The unpacked package."""
        if name not in self.packages:
            raise DataError(f"package {name} is not in the list of packages; add it with recipes/data/list_packages.py")
        package = self.packages[name]
        return unpack(package, fetch(package, self.mirror, self.work / "debs"), self.work / "unpacked")

    def clips(self, name: str, listed: list[Row], rules: list[Row], corpus: list[Row]) -> list[Row]:
        """Rows of all clips of a package, their audio encoded in files; read back when they were made before."""
        asked = json.dumps([FORM, self.packages[name].sha256, listed, rules, self.speeds], sort_keys=True)
        target = self.work / "clips" / f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
        if not target.is_dir():
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            make_folder(partial)
            with (partial / "rows.jsonl").open("w", encoding="utf-8") as file:
                for number, (row, audio) in enumerate(self._audio(name, listed, rules, corpus)):
                    for version, (copy, changed) in enumerate([(row, audio), *self._at_speeds(row, audio)]):
                        stem = partial / f"{number:06d}-{version}"
                        changed = within_full_scale(changed)
                        suffix, data = encoded(changed, copy["split"])
                        stem.with_suffix(f".{suffix}").write_bytes(data)
                        exact, curve = fingerprints(changed)
                        made = {"format": suffix, "file": f"{stem.name}.{suffix}", "exact": exact, "curve": curve}
                        file.write(json.dumps(copy | made, ensure_ascii=False) + "\n")
            partial.rename(target)
        rows = [json.loads(line) for line in (target / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        return [row | {"file": str(target / row["file"])} for row in rows]

    def _audio(
        self, name: str, listed: list[Row], rules: list[Row], corpus: list[Row]
    ) -> Iterator[tuple[Row, Samples]]:
        folder = self.folder(name)
        if listed:
            rendered = listed[0]["domain"] == "instrument"
            font = self.folder(SOUND_FONT_PACKAGE) if rendered else None
            for row, audio in listed_clips(listed, folder, font):
                yield row | {"part": "corpus"}, audio
        taken = {
            (row["source_path"], row.get("first_sample", 0) // SAMPLING_RATE)
            for row in corpus
            if row["source_package"] == name
        }
        known = {row["group"]: row["split"] for row in corpus}
        for rule in rules:
            again = "sound_font" in rule
            clips = rerendered_notes(rule, folder, corpus) if again else ruled_clips(rule, folder, taken, known)
            for row, audio in clips:
                yield row | {"part": "wide"}, audio

    def _at_speeds(self, row: Row, audio: Samples) -> Iterator[tuple[Row, Samples]]:
        """Copies of a training clip played faster (above 1) or slower, pitch and all; notes have labels of pitch."""
        if row["split"] != "train" or row["domain"] == "instrument":
            return
        for speed in self.speeds:
            changed = soxr.resample(audio, SAMPLING_RATE * speed, SAMPLING_RATE)
            labels = row["labels"] | {"speed": speed}
            copy = row | {"part": "augmented", "labels": labels, "duration_s": round(len(changed) / SAMPLING_RATE, 4)}
            yield {key: value for key, value in copy.items() if key not in ("key", "shard", "format")}, changed


def build(
    builder: Builder, output: Path, listed: list[Row], rules: list[Row], only: list[str] | None = None
) -> dict[str, Any]:
    """Make clips, shards, manifest, licences and statistics. Returns the statistics.

    Args:
        builder: of the clips.
        output: folder of the shards.
        listed: rows of the corpus.
        rules: of the wider corpus.
        only: packages to take clips from; None: from all. Their splits are those of the whole corpus.

    Raises:
        DashengTokenizerError: a package cannot be had, a file of it cannot be decoded, an output cannot be written,
            or no clip comes from a package of `only`.
    """
    by_package: dict[str, list[Row]] = defaultdict(list)
    for row in listed:
        by_package[package_of(row)].append(row)
    names = sorted({*by_package, *(rule["package"] for rule in rules)})
    if only is not None:
        if unused := sorted({*only} - {*names}):
            raise DataError(f"no clips come from {', '.join(unused)}; there are: {', '.join(names)}")
        names = [name for name in names if name in only]
    rows: list[Row] = []
    for name in (bar := tqdm(names, unit="package")):
        bar.set_postfix_str(name)
        rows += builder.clips(name, by_package[name], [rule for rule in rules if rule["package"] == name], listed)
    parts = {part: [row for row in rows if row["part"] == part] for part in ("corpus", "wide", "augmented")}
    wide, copies = without_copies(parts["corpus"], parts["wide"])
    originals = {_original(row) for row in [*parts["corpus"], *wide]}
    augmented = [row for row in parts["augmented"] if _original(row) in originals]
    write_shards([*parts["corpus"], *numbered(wide, "wide-"), *numbered(augmented, "augmented-")], output)
    with atomic_path(output / "LICENCES.txt") as temporary:
        temporary.write_text(licence_text(builder.folder(name) for name in names), encoding="utf-8")
    statistics = measure(output) | {"copies_left_out": copies}
    with atomic_path(output / "statistics.json") as temporary:
        temporary.write_text(json.dumps(statistics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return statistics


def _original(row: Row) -> str:
    """What a clip and its copies at other speeds have in common: the name of their file up to the version."""
    return str(row["file"]).rpartition("-")[0]


def _only_user(work: Path) -> IO[str]:
    """A lock on the folder that vanishes with this process, since two builds would remove each other's files."""
    lock = (make_folder(work) / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"another build uses {work}; wait for it, or name another folder with --work") from error
    return lock


def main() -> None:
    """Build or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--work", type=Path, help="folder of downloads and single clips (default: OUTPUT/work)")
    parser.add_argument(
        "--mirror", default=MIRROR, help="URL of a mirror or snapshot, or a folder (default: %(default)s)"
    )
    parser.add_argument("--packages", type=Path, default=HERE / "packages.yaml", help="list of packages")
    parser.add_argument("--clips", type=Path, default=HERE / "corpus.jsonl.xz", help="list of the corpus' clips")
    parser.add_argument(
        "--rules", type=Path, nargs="+", default=[HERE / "wide.yaml"], help="rules of the wider corpus, in YAML"
    )
    parser.add_argument("--wide", action="store_true", help="add the clips that the rules give")
    parser.add_argument("--speeds", type=float, nargs="+", default=[], help="add training clips played at these speeds")
    parser.add_argument("--only", nargs="+", metavar="PACKAGE", help="take clips of these packages alone")
    parser.add_argument("--compare", type=Path, help="build nothing; compare OUTPUT with this corpus")
    parser.add_argument("--report", type=Path, help="with --compare, where the figures of both are written")
    arguments = parser.parse_args()
    try:
        if arguments.compare:
            sys.exit(compare(arguments.output, arguments.compare, arguments.report))
        work = arguments.work or arguments.output / "work"
        lock = _only_user(work)
        builder = Builder(work, arguments.mirror, load_packages(arguments.packages), arguments.speeds)
        rules = [rule for path in arguments.rules for rule in load_rules(path)] if arguments.wide else []
        with lock:
            statistics = build(builder, arguments.output, listed_rows(arguments.clips), rules, arguments.only)
    except DashengTokenizerError as error:
        sys.exit(f"error: {error}")
    for part, domains in statistics["hours"].items():
        print(part, ", ".join(f"{domain} {hours:.2f} h" for domain, hours in domains.items()))


if __name__ == "__main__":
    main()
