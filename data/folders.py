"""Folders of prepared data: complete or absent, whatever is killed and however many ask for one."""
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.options import DataError


def ensure(folder: Path, fill: Callable[[Path], dict], what: str = "data"):
    """Make `folder`, the prepared form of `what`, unless it exists. Raises DataError.

    fill(work) writes the files into an empty folder and returns what goes into meta.json. The work
    is done in .tmp beside `folder` and renamed when complete. A second process waits for the first;
    what a killed one left is removed by the next. On a file system without locks each does its own
    work, the first to end is kept, and what a killed one left stays.
    """
    if folder.exists():
        return
    for rule in _rules:
        rule(None)
    work = folder.parent / ".tmp" / folder.name
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        # "a" does not empty what a link points to; "+" does not wait where it is a pipe.
        with open(work.with_name(work.name + ".lock"), "a+b") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when its holder dies
            except OSError:  # a file system without locks
                work = work.with_name(f"{work.name}.{socket.gethostname()}.{os.getpid()}")
            if not folder.exists():  # another process may have made it while this one waited
                _make(folder, work, fill)
    except OSError as error:
        raise DataError(f"cannot prepare {what} in {folder}: {error}") from error


def _make(folder: Path, work: Path, fill: Callable[[Path], dict]):
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        meta = fill(work)
        for rule in _rules:
            rule(meta)
        (work / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            work.rename(folder)
        except OSError:
            if not folder.exists():  # without locks another may have made it meanwhile
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


_rules = []  # of the contexts that are open: asked before a folder is made, then with its meta


@contextmanager
def _obeying(rule: Callable[[dict | None], None]):
    _rules.append(rule)
    try:
        yield
    finally:
        _rules.pop()


def only_prepared(missing: str):
    """A context in which `ensure` makes no folder: where there is none, DataError(missing)."""
    def rule(meta):
        raise DataError(missing)

    return _obeying(rule)


def expecting(expected: Callable[[dict], bool]):
    """A context in which `ensure` keeps no data but that for whose meta.json expected(meta) holds.

    A checkpoint may come from anywhere, and name any file of this machine as its data.
    """
    def rule(meta):
        if meta and not expected(meta):
            raise DataError("the data is not what the run was trained on: restore it, or start "
                            "anew in another --out_dir")

    return _obeying(rule)


def read_meta(folder: str | Path) -> dict:
    """What `fill` returned when the folder was made. Raises DataError where it is not readable."""
    try:
        with open_file(Path(folder) / "meta.json") as file:
            return dict(json.load(file))
    except (OSError, TypeError, ValueError, RecursionError):
        raise DataError(f"{folder} holds no readable meta.json: "
                        "remove the folder and prepare it again") from None


@contextmanager
def reading(folder: Path):
    """A context for files of a prepared folder: what damaged ones raise becomes a DataError."""
    try:
        yield
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder} is not a prepared folder ({error}): "
                        "remove the folder and prepare it again") from None


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, also for a pipe or a device: these may never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))
    return open(path, "rb")


def sha256(path: str | Path) -> str:
    """The hex digest of a file's content, read in pieces. Raises OSError."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


WHOLE = 2**28  # bytes of a file that are all compared when it is opened: about 0.4 s
PIECES, PIECE = 256, 2**14  # of a larger one: so many pieces of so many bytes


def checksums(folder: Path) -> dict[str, dict[str, str]]:
    """sha256: that of each file in the folder. samples: that of pieces of each large one."""
    files = sorted(folder.iterdir())
    large = [path for path in files if path.stat().st_size > WHOLE]
    return {"sha256": {path.name: sha256(path) for path in files},
            "samples": {path.name: sample_sha256(path) for path in large}}


def check(folder: Path, meta: dict):
    """Raises DataError where a file is not the one whose `checksums` are in meta, or OSError.

    All of a file of at most WHOLE bytes is compared, a sample of a larger one: a change of a few
    places of it can go unseen. Folders of earlier versions have no samples.
    """
    samples = meta.get("samples", {})
    for name, digest in meta["sha256"].items():
        path = folder / name
        same = path.is_file()
        if same and path.stat().st_size <= WHOLE:
            same = sha256(path) == digest
        elif same and name in samples:
            same = sample_sha256(path) == samples[name]
        if not same:
            raise DataError(f"{path} is not what was prepared: "
                            f"delete {folder} and prepare it again")


def sample_sha256(path: Path) -> str:
    """The hex digest of PIECES pieces of a large file, from its first byte to its last."""
    last = path.stat().st_size - PIECE
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(PIECES):
            file.seek(i * last // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()
