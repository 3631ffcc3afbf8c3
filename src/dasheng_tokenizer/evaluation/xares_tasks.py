"""The 22 public tasks of X-ARES (arXiv 2505.16369) as rows of data; `xares_data` reads their clips.

Names of folders, shards, labels, folds and records, and epochs, batches, crops and weights, are those of the package
xares 0.1.3. The user downloads the shards; a task whose shards are not there is named with their source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.evaluation.probe_tasks import ProbeTask


@dataclass(frozen=True)
class XaresRow:
    """A task, and what is specific to its data.

    Attributes:
        task: the task.
        record: Zenodo record that holds the shards.
        fields: of the JSON: one with the label; onset, offset and label of each event of a list; none where all values
            are captions.
        shards: glob of the shards of each split, or of each fold.
        folded: whether `shards` are folds, each of them tested on once.
        selects_on_test: whether the original chooses the best epoch by its score on the test data.
        num_classes: that the original has; 0 where there are no classes.
        folders: names of the folder that holds the shards; the first that exists is read.
    """

    task: ProbeTask
    record: int
    fields: tuple[str, ...]
    shards: dict[str, str]
    folded: bool
    selects_on_test: bool
    num_classes: int
    folders: tuple[str, ...]

    @property
    def source(self) -> str:
        """Where the shards are found."""
        return f"https://zenodo.org/records/{self.record}"


def _row(
    task: ProbeTask, record: int, fields: str, splits: str = "", folds: tuple[str, range] | None = None, **more: Any
) -> XaresRow:
    """`splits`: training, validation and test split, or training and test; `folds`: name of a shard, and numbers."""
    if folds is None:
        shards = {name: f"{name}*.tar" for name in splits.split()}
        on_test = len(shards) == 2
    else:
        shards = {f"fold-{fold}": folds[0].format(fold) for fold in folds[1]}
        on_test = True
    values = {"num_classes": len(task.classes), "folders": (task.name,), **more}
    return XaresRow(task, record, tuple(fields.split()), shards, folds is not None, on_test, **values)


def _clip(name: str, domain: str, weight: int, classes: str = "", **more: Any) -> ProbeTask:
    task = ProbeTask(name, domain, "clip", "accuracy", tuple(classes.split()), weight=float(weight))
    return replace(task, **more)


def _numbers(*bounds: int) -> str:
    return " ".join(map(str, range(*bounds)))


_COMMANDS = """bed bird cat dog down eight five four go happy house left marvin nine no off on one right seven sheila
    six stop three tree two up wow yes zero"""
_LANGUAGES = "ar az da de el en es et fa fi fr hr hu hy is it ja lt lv mk nl nn no pl pt ru sl sr sv tr uk ur zh"
_EVENTS = """Alarm_bell_ringing Blender Cat Dishes Dog Electric_shaver_toothbrush Frying Running_water Speech
    Vacuum_cleaner"""
_SOUNDS = """Acoustic_guitar Applause Bark Bass_drum Burping_or_eructation Bus Cello Chime Clarinet Computer_keyboard
    Cough Cowbell Double_bass Drawer_open_or_close Electric_piano Fart Finger_snapping Fireworks Flute Glockenspiel Gong
    Gunshot_or_gunfire Harmonica Hi-hat Keys_jangling Knock Laughter Meow Microwave_oven Oboe Saxophone Scissors Shatter
    Snare_drum Squeak Tambourine Tearing Telephone Trumpet Violin_or_fiddle Writing"""
_CITY = """air_conditioner car_horn children_playing dog_bark drilling engine_idling gun_shot jackhammer siren
    street_music"""
_EMOTIONS = "neutral calm happy sad angry fearful disgust surprised"
_GENRES = "Electronic Experimental Folk Hip-Hop Instrumental International Pop Rock"
_GTZAN = "blues classical country disco hiphop jazz metal pop reggae rock"
_INSTRUMENTS = "bass brass flute guitar keyboard mallet organ reed string synth_lead vocal"
_WDS = "wds-audio-train wds-audio-valid wds-audio-test"
_LIBRI = "train-clean-100 dev-clean test-clean"

_SPEECH = (
    _row(
        _clip("asvspoof2015", "speech", 2000, "human spoof", epochs=5, batch_size=64),
        14718430, "binary_spoof", "asvspoof_train asvspoof_valid asvspoof_eval",
    ),
    _row(_clip("cremad", "speech", 1116, "H S A F D N"), 14646870, "label", _WDS),
    _row(
        _clip("fluentspeechcommands", "speech", 2000),
        14722453, "transcription",
        "fluentspeechcommands_train fluentspeechcommands_valid fluentspeechcommands_test", num_classes=248,
    ),
    _row(
        _clip("libricount", "speech", 1144, _numbers(11), batch_size=64),
        14722478, "num_speakers", folds=("libricount_fold{:02d}.tar", range(5)),
    ),
    _row(
        ProbeTask("librispeech", "speech", "asr", "1-wer", batch_size=4, weight=10000.0, knn=False),
        14716252, "trans", _LIBRI, folders=("librispeech", "librispeechmalefemale"),
    ),
    _row(
        _clip("librispeechmalefemale", "speech", 2620, crop_seconds=5.0),
        14716252, "gender", _LIBRI, num_classes=2, folders=("librispeechmalefemale", "librispeech"),
    ),
    _row(
        _clip("ravdess", "speech", 360, _EMOTIONS), 14722524, "emotion", folds=("ravdess_fold_{}_0000000.tar", range(4))
    ),
    _row(_clip("speechcommandsv1", "speech", 2000, _COMMANDS, batch_size=64), 14722647, "labels", _WDS),
    _row(
        _clip("vocalimitations", "speech", 1867, epochs=20),
        14862060, "imitation", folds=("vocal_imitations_fold{:02d}_0000000.tar", range(3)), num_classes=302,
    ),
    _row(
        _clip("vocalsound", "speech", 2000, "laughter sigh throatclearing cough sneeze sniff"),
        14722710, "label", "train valid test",
    ),
    _row(
        _clip("voxceleb1", "speech", 2000, crop_seconds=6.0),
        14811963, "speakerid", "voxceleb1_train voxceleb1_valid voxceleb1_test", num_classes=1251,
    ),
    _row(
        _clip("voxlingua33", "speech", 1609, _LANGUAGES, crop_seconds=10.0, batch_size=64),
        14812245, "labels", "train_subset dev",
    ),
)  # fmt: skip

_SOUND = (
    _row(
        ProbeTask(
            "clotho", "sound", "retrieval", "recall@1", epochs=20, batch_size=128, crop_seconds=30.0, weight=1045.0,
            knn=False,
        ),
        14856454, "", "clotho_development clotho_evaluation clotho_validation",  # the original tests on "validation"
    ),
    _row(
        ProbeTask(
            "desed", "sound", "frame", "segment_f1_macro", tuple(_EVENTS.split()), segment_seconds=1.0, weight=1153.0,
            knn=False,
        ),
        14808180, "onset offset label", "wds-audio-train wds-audio-eval",
    ),
    _row(
        _clip("esc50", "sound", 400, _numbers(50)),
        14614287, "label", folds=("wds-audio-fold-{}-*.tar", range(1, 6)),
    ),
    _row(
        ProbeTask(
            "fsd50k", "sound", "multilabel", "mAP", batch_size=64, crop_seconds=10.0, weight=2000.0, knn=False
        ),
        14868441, "soundevent", "fsd50k_train fsd50k_validation fsd50k_eval", num_classes=200,
    ),
    _row(
        _clip("fsdkaggle2018", "sound", 1600, _SOUNDS, epochs=3, batch_size=64, knn=False),
        14725117, "sound", "fsd18_train fsd18_test",
    ),
    _row(
        _clip("urbansound8k", "sound", 873, _CITY),
        14722683, "soundevent", folds=("urbansound_fold{}_0000000.tar", range(1, 11)),
    ),
)  # fmt: skip

_MUSIC = (
    _row(
        _clip("freemusicarchive", "music", 800, _GENRES, crop_seconds=10.0, epochs=3),
        14725056, "genre", "fma_small_train fma_small_valid fma_small_test",
    ),
    _row(
        _clip("gtzan_genre", "music", 100, _GTZAN), 14722472, "genre", folds=("gtzan_fold_{}_0000000.tar", range(10))
    ),
    _row(
        ProbeTask(
            "maestro", "music", "frame", "segment_f1_micro", tuple(_numbers(21, 108).split()), epochs=50, batch_size=1,
            segment_seconds=0.1, pos_weight=10.0, weight=65.0, knn=False,
        ),
        14858022, "start end note", "maestro_train maestro_valid maestro_test",
    ),
    _row(
        _clip("nsynthinstument", "music", 2000, _INSTRUMENTS),  # spelt so in the original
        14725174, "instrument_family_str", "nsynth_train nsynth_valid nsynth_test",
    ),
)  # fmt: skip

XARES_ROWS: tuple[XaresRow, ...] = _SPEECH + _SOUND + _MUSIC
"""All public tasks."""


def available(folder: str | Path) -> tuple[list[XaresRow], dict[str, str]]:
    """Which tasks can be read from a folder.

    Returns:
        The rows whose shards are there, and for each other task by name the reason and the source of its data.
    """
    present, missing = [], {}
    for row in XARES_ROWS:
        try:
            find_shards(row, Path(folder))
        except DataError as error:
            missing[row.task.name] = str(error)
        else:
            present.append(row)
    return present, missing


def find_shards(row: XaresRow, folder: Path) -> dict[str, list[Path]]:
    """Shards of each split, in a fixed order.

    Args:
        row: the task.
        folder: that holds `NAME/*.tar` or `env/NAME/*.tar`.

    Raises:
        DataError: some are missing; the message names their source.
    """
    get = f"download the shards from {row.source} to {folder / row.folders[0]}"
    candidates = [base / name for name in row.folders for base in (folder, folder / "env")]
    home = next((path for path in candidates if path.is_dir() and any(path.glob("*.tar"))), None)
    if home is None:
        raise DataError(f"{row.task.name}: {folder / row.folders[0]} holds no tar shards; {get}")
    found = {split: sorted(home.glob(pattern)) for split, pattern in row.shards.items()}
    absent = [row.shards[split] for split, paths in found.items() if not paths]
    if absent:
        raise DataError(f"{row.task.name}: {home} holds no {', '.join(absent)}; {get}")
    return found
