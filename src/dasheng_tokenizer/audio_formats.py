"""Names of audio files, apart from what reads and writes them, which takes long to import."""

from __future__ import annotations

READ_SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64"}
)
"""Suffixes that a folder is searched for. A file named by itself may have any suffix."""

WRITE_FORMATS = {
    # suffix: (libsndfile format, default subtype, most channels, allowed rates or None for any)
    ".wav": ("WAV", "PCM_16", 1024, None),
    ".w64": ("W64", "PCM_16", 1024, None),
    ".flac": ("FLAC", "PCM_16", 8, None),
    ".ogg": ("OGG", "VORBIS", 255, None),
    ".opus": ("OGG", "OPUS", 255, (8000, 12000, 16000, 24000, 48000)),
    ".mp3": ("MP3", "MPEG_LAYER_III", 2, (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)),
}
