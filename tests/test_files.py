"""Outputs appear whole or not at all: errors, full disks, killed writers."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dasheng_tokenizer.audio import AudioWriter, save_audio
from dasheng_tokenizer.errors import MissingExtraError, OutputError
from dasheng_tokenizer.files import atomic_path, require_extra
from dasheng_tokenizer.token_file import AudioTokens


def noise(channels: int, samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal((channels, samples))).astype(np.float32)


def test_an_existing_file_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(KeyboardInterrupt), AudioWriter(tmp_path / "b.wav", 16000, 1) as writer:
        writer.write(noise(1, 100))
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match="exists"), atomic_path(path, overwrite=False):
        pass
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_file_has_the_permissions_of_any_new_one(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    AudioTokens(torch.zeros(1, 2, 8), 16000, 1280, 1, 25.0, "a model", "ab" * 32).save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3"])
@pytest.mark.parametrize("room", [0, 5000])
def test_a_disk_that_fills_is_named_and_nothing_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, room: int
) -> None:
    _fill_disk_after(monkeypatch, room)
    with pytest.raises(OutputError, match=rf"a{suffix}: the disk is full; free some space"):
        save_audio(tmp_path / f"a{suffix}", noise(1, 60_000), 48000)
    assert not os.listdir(tmp_path)


def _fill_disk_after(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Let writes of audio beyond `room` bytes fail as on a full disk."""
    from dasheng_tokenizer.audio_writer import _GuardedFile

    make: Callable[..., None] = _GuardedFile.__init__

    class Full:
        def __init__(self, handle: object) -> None:
            self.handle, self.left = handle, room
            self.seek, self.tell, self.read = handle.seek, handle.tell, handle.read  # type: ignore[attr-defined]

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.handle.write(data)  # type: ignore[attr-defined, no-any-return]

    monkeypatch.setattr(_GuardedFile, "__init__", lambda self, handle: make(self, Full(handle)))


def in_child(work: Callable[[], None]) -> int:
    """Start `work` in a forked process, which needs no imports anew, and return its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(0)


def test_a_real_limit_of_the_system_is_named(tmp_path: Path) -> None:
    """The same with the system's own refusal (RLIMIT_FSIZE), for audio and token files."""
    tokens = AudioTokens(torch.zeros(1, 25, 400), 16000, 16000, 1, 25.0, "m", "h")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        messages = []
        for save in (
            lambda: save_audio(tmp_path / "a.wav", np.zeros(50000), 16000),
            lambda: tokens.save(tmp_path / "a.tokens.safetensors"),
        ):
            try:
                save()
                messages.append("written")
            except OutputError as error:
                messages.append(str(error))
        (tmp_path / "messages").write_text("\n".join(messages))

    os.waitpid(in_child(work), 0)
    lines = (tmp_path / "messages").read_text().splitlines()
    assert "a.wav: the file would be larger" in lines[0], lines
    assert "a.tokens.safetensors: the file would be larger" in lines[1], lines
    assert os.listdir(tmp_path) == ["messages"]


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(OutputError, match="folder"):
        save_audio(tmp_path / "file" / "b.wav", noise(1, 5), 16000)
    with pytest.raises(OutputError, match="folder of that name"):
        save_audio(tmp_path / "a.wav", noise(1, 5), 16000)
    with pytest.raises(OutputError, match=f"cannot write .*{'x' * 250}"):
        save_audio(tmp_path / f"{'x' * 252}.wav", noise(1, 5), 16000)
    with pytest.raises(OutputError, match="cannot write /proc/"):
        save_audio("/proc/b.wav", noise(1, 5), 16000)
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "file"]


def test_a_killed_writer_leaves_no_file_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    def work() -> None:
        with AudioWriter(tmp_path / "a.wav", 16000, 1) as writer:
            writer.write(noise(1, 50_000))
            (tmp_path / "ready").touch()
            time.sleep(60)

    child = in_child(work)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    (tmp_path / "ready").unlink()
    (living,) = os.listdir(tmp_path)
    save_audio(tmp_path / "a.wav", noise(1, 5), 16000)  # a writer that lives is left alone
    assert sorted(os.listdir(tmp_path)) == [living, "a.wav"]
    (tmp_path / "a.wav").unlink()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.listdir(tmp_path) == [living] and living.startswith(".")
    save_audio(tmp_path / "a.wav", noise(1, 5), 16000)
    assert os.listdir(tmp_path) == ["a.wav"]


def test_writers_of_one_file_do_not_remove_what_the_others_write(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for number in range(100):
                with atomic_path(tmp_path / f"{number}.bin") as temporary:
                    temporary.write_bytes(b"x" * 100)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(os.listdir(tmp_path)) == sorted(f"{number}.bin" for number in range(100))


def test_long_names_and_glob_signs_are_fine(tmp_path: Path) -> None:
    for name in ("x" * 250, "[a]*?"):
        save_audio(tmp_path / f"{name}.wav", noise(1, 5), 16000)
        assert (tmp_path / f"{name}.wav").exists()
    assert len(os.listdir(tmp_path)) == 2


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'dasheng-tokenizer\[report\]'"):
        require_extra("no_such_module.inside", "report")
    assert require_extra("json.decoder", "report").JSONDecoder
