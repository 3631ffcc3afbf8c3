"""Figures that need a trained model or a pitch tracker: DNSMOS, ViSQOL, speaker similarity, F0 error.

All models lie inside their packages; nothing is downloaded. Each is loaded once per process. A figure that is not
defined for a clip raises AudioError with the reason, as in `metrics`.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.errors import AudioError, MissingExtraError
from dasheng_tokenizer.evaluation.metrics import Samples, checked_pair
from dasheng_tokenizer.files import require_extra

EXTRA = "evaluate"

RATE = 16_000

DNSMOS_KEYS: dict[Literal["sig", "bak", "ovr"], str] = {"sig": "sig_mos", "bak": "bak_mos", "ovr": "ovrl_mos"}

F0_RANGE = (60.0, 500.0)
F0_FRAME, F0_HOP = 1024, 160
"""Settings of the pitch tracker: Hz, and samples at 16 kHz (64 ms windows every 10 ms)."""


def dnsmos(estimate: Samples, scale: Literal["sig", "bak", "ovr"]) -> float:
    """DNSMOS P.835 (Reddy et al. 2022) of a clip alone, without its original: 1 to 5; speech; greater is better.

    Samples beyond full scale are clipped, as a file of whole numbers would. Clips shorter than 9.01 s are repeated, as
    speechmos does; below half a second that would judge the repetition.

    Args:
        estimate: (samples,) at 16 kHz.
        scale: of the speech, of the background, or overall.

    Raises:
        AudioError: silence, or less than half a second. MissingExtraError: speechmos is not installed.
    """
    if estimate.size < RATE // 2:
        raise AudioError("DNSMOS needs at least half a second")
    if not estimate.any():
        raise AudioError("DNSMOS is not defined for silence")
    return _dnsmos(np.clip(estimate, -1, 1).astype(np.float32).tobytes())[DNSMOS_KEYS[scale]]


@functools.lru_cache(maxsize=4)
def _dnsmos(samples: bytes) -> dict[str, float]:
    """All scales come from one run; `samples` are float32."""
    result = _dnsmos_model()(np.frombuffer(samples, np.float32), RATE, False)
    return {key: float(result[key]) for key in DNSMOS_KEYS.values()}


@functools.cache
def _dnsmos_model() -> Any:
    """The networks of speechmos, each in a session of one thread: the figures of a clip are made side by side."""
    package = require_extra("speechmos.dnsmos", EXTRA)
    runtime = require_extra("onnxruntime", EXTRA)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    paths = [
        Path(str(package.__file__)).parent / "dnsmos_models" / name for name in ("sig_bak_ovr.onnx", "model_v8.onnx")
    ]
    model = package.DNSMOS(*map(str, paths))
    model.onnx_sess, model.p808_onnx_sess = (runtime.InferenceSession(str(path), options) for path in paths)
    return model


def visqol(reference: Samples, estimate: Samples, mode: Literal["speech", "audio"]) -> float:
    """ViSQOL v3 (Chinen et al. 2020), MOS-LQO from 1 to 5; greater is better.

    Args:
        reference: (samples,) at 16 kHz for mode speech, 48 kHz for mode audio.
        estimate: the same.
        mode: speech maps similarities by `visqol_mapper()`, audio by a support vector regression.

    Raises:
        AudioError: silence, or a clip too short for one patch. MissingExtraError: visqol-python is not installed.
    """
    first, second = checked_pair(reference, estimate)
    if not first.any() or not second.any():
        raise AudioError("ViSQOL is not defined for silence")
    try:
        rate = RATE if mode == "speech" else 3 * RATE
        return float(_visqol_model(mode).measure_from_arrays(first, second, rate).moslqo)
    except IndexError as error:  # no patch to compare
        raise AudioError("ViSQOL gives no figure: the clip is too short, or no speech is detected") from error
    except (ValueError, RuntimeError) as error:
        raise AudioError(f"ViSQOL gives no figure: {error}") from error


def visqol_mapper() -> Literal["lattice", "exponential"]:
    """What mode speech maps similarities to MOS by on this machine: the original's lattice needs ai-edge-litert."""
    return "lattice" if importlib.util.find_spec("ai_edge_litert") is not None else "exponential"


@functools.cache
def _visqol_model(mode: str) -> Any:
    model = require_extra("visqol", EXTRA).VisqolApi()
    model.create(mode=mode, use_lattice_model=visqol_mapper() == "lattice")
    return model


def speaker_similarity(reference: Samples, estimate: Samples) -> float:
    """Cosine of the speaker embeddings of both clips (GE2E, Wan et al. 2018, by resemblyzer): 1 for the same voice.

    Both at 16 kHz. As resemblyzer does it: brought to −30 dB where softer, long pauses cut out, embedded in windows of
    1.6 s and averaged. Embeddings have no negative component, so that figures of strangers lie well above 0.

    Raises:
        AudioError: no speech detected. MissingExtraError: resemblyzer or webrtcvad is not installed.
    """
    first, second = checked_pair(reference, estimate)
    return float(_speaker_embedding(_bytes(first)) @ _speaker_embedding(_bytes(second)))


@functools.lru_cache(maxsize=4)
def _speaker_embedding(samples: bytes) -> npt.NDArray[np.float32]:
    """(256,) of length 1; `samples` are float32."""
    package = require_resemblyzer()
    audio = np.clip(np.frombuffer(samples, np.float32), -1, 1)
    if not audio.any():
        raise AudioError("speaker similarity is not defined for silence")
    voiced = package.preprocess_wav(audio) if audio.size >= RATE // 10 else audio[:0]
    if voiced.size < RATE // 10:
        raise AudioError("speaker similarity gives no figure: less than 0.1 s of detected speech")
    embedding: npt.NDArray[np.float32] = _speaker_model().embed_utterance(voiced)
    return embedding


@functools.cache
def _speaker_model() -> Any:
    return require_resemblyzer().VoiceEncoder("cpu", verbose=False)


def require_resemblyzer() -> Any:
    """Import resemblyzer.

    Raises:
        MissingExtraError: it, or what it needs, is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old import path of scipy
            return require_extra("resemblyzer", EXTRA)
    except MissingExtraError as error:
        # Its metadata asks for the obsolete `typing` and `webrtcvad`: hence --no-deps, and no place in the extra.
        raise MissingExtraError(
            f"resemblyzer is needed for speaker similarity but cannot be imported ({error.__cause__}); "
            f"install it with: pip install 'dasheng-tokenizer[{EXTRA}]' && pip install --no-deps resemblyzer"
        ) from error


def f0_cents(reference: Samples, estimate: Samples) -> float:
    """Root mean square F0 error in cents over the frames that are voiced in both clips; speech; smaller is better.

    Both at 16 kHz. F0 by probabilistic YIN (Mauch & Dixon 2014, of librosa): 60 to 500 Hz, 64 ms windows every 10 ms.

    Raises:
        AudioError: no frame is voiced in both. MissingExtraError: librosa is not installed.
    """
    first, second = (_f0(_bytes(audio)) for audio in checked_pair(reference, estimate))
    both = np.isfinite(first) & np.isfinite(second)
    if not both.any():
        raise AudioError("F0 error is not defined: no frame is voiced in both clips")
    return float(np.sqrt(np.mean((1200 * np.log2(second[both] / first[both])) ** 2)))


def voicing_error(reference: Samples, estimate: Samples) -> float:
    """Share of frames that are voiced in one clip and not in the other, 0 to 1; speech; smaller is better.

    Settings as in `f0_cents`.

    Raises:
        AudioError: the original has no voiced frame. MissingExtraError: librosa is not installed.
    """
    first, second = (_f0(_bytes(audio)) for audio in checked_pair(reference, estimate))
    if not np.isfinite(first).any():
        raise AudioError("voicing error is not defined: the original has no voiced frame")
    return float(np.mean(np.isfinite(first) != np.isfinite(second)))


@functools.lru_cache(maxsize=8)
def _f0(samples: bytes) -> npt.NDArray[np.float64]:
    """F0 in Hz per frame, NaN where unvoiced; `samples` are float32."""
    librosa = require_extra("librosa", EXTRA)
    audio = np.frombuffer(samples, np.float32)
    low, high = F0_RANGE
    track: npt.NDArray[np.float64] = librosa.pyin(
        audio, fmin=low, fmax=high, sr=RATE, frame_length=F0_FRAME, hop_length=F0_HOP
    )[0]
    return track


def _bytes(audio: npt.NDArray[np.float64]) -> bytes:
    return audio.astype(np.float32).tobytes()
