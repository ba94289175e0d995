"""data/folders.py: prepared folders and their files in a house where others may write too."""
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.folders import ensure, read_meta, sha256
from engine.options import DataError

ROOT = Path(__file__).parents[1]


def in_time(code: str, *args) -> str:
    """What a program prints that must end by itself, soon."""
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_refused_and_nobody_waits_for_them(tmp_path):
    folder = tmp_path / "data" / "prepared"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "meta.json")
    code = "import sys; from data import folders, text; "
    meta = in_time(code + "folders.read_meta(sys.argv[1])", folder)
    assert f"DataError: {folder} holds no readable meta.json: remove" in meta
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for path in folder / "meta.json", "/dev/zero", tmp_path / "zero.txt":
        with_hash = in_time(code + "folders.sha256(sys.argv[1])", path)
        assert "OSError: [Errno 22] a pipe or a device, not a file" in with_hash
        prepared = in_time(code + "text.prepare(*sys.argv[1:])", path, tmp_path / "data")
        assert "DataError: dataset" in prepared
        assert "cannot be read (a pipe or a device, not a file): give" in prepared
    (tmp_path / "data" / ".tmp").mkdir()
    os.mkfifo(tmp_path / "data" / ".tmp" / "shakespeare_char.lock")
    locked = in_time(code + "text.prepare('shakespeare', sys.argv[1])", tmp_path / "data")
    assert "DataError: cannot prepare shakespeare" in locked


def test_a_lock_that_is_a_link_leaves_alone_what_it_points_to(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("precious")
    (tmp_path / ".tmp").mkdir()
    (tmp_path / ".tmp" / "a.lock").symlink_to(other)
    ensure(tmp_path / "a", lambda work: {"made": 1})
    assert other.read_text() == "precious" and read_meta(tmp_path / "a") == {"made": 1}


def test_without_locks_each_process_works_in_a_folder_of_its_own(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    works = []

    def fill(work):
        works.append(work)
        number = len(works)
        if number == 1:  # while this one works, another process makes the folder
            ensure(tmp_path / "a", fill)
        return {"made": number}

    monkeypatch.setattr(os, "getpid", lambda: len(works))
    ensure(tmp_path / "a", fill)
    assert read_meta(tmp_path / "a") == {"made": 2} and len(works) == 2
    assert works[0] != works[1] and not works[0].exists() and not works[1].exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{", b"[" * 200_000])
def test_a_damaged_meta_is_one_line(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match="holds no readable meta.json: remove the folder") as error:
        read_meta(tmp_path)
    assert "\n" not in str(error.value)


def test_a_hash_is_of_the_content(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")
    with pytest.raises(IsADirectoryError):
        sha256(tmp_path)
