"""Folders of prepared data: complete or absent, whatever is killed and however many ask for one."""
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.options import DataError

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two preparations of a folder can collide
    fcntl = None


def ensure(folder: Path, fill: Callable[[Path], dict]):
    """Make `folder` unless it exists. Raises what `fill` raises, and OSError.

    fill(work) writes the files into an empty folder and returns what goes into meta.json. The work
    is done in .tmp beside `folder` and renamed when complete. A second process waits for the first;
    what a killed one left is removed by the next.
    """
    if folder.exists():
        return
    if _missing:
        raise DataError(_missing)
    work = folder.parent / ".tmp" / folder.name
    work.parent.mkdir(parents=True, exist_ok=True)
    with _locked(work.with_name(work.name + ".lock")):
        if folder.exists():  # another process may have made it while this one waited
            return
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            meta = fill(work)
            if not all(is_right(meta) for is_right in _expected):
                raise DataError("the data is not what the run was trained on: restore it, or start "
                                "anew in another --out_dir")
            (work / "meta.json").write_text(json.dumps(meta, indent=1))
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


_expected: list[Callable[[dict], bool]] = []


@contextmanager
def expecting(identity: Callable[[dict], dict], saved: dict | None):
    """A context in which `ensure` keeps no other data than a checkpoint's, given as `saved`.

    A checkpoint may come from anywhere, and name any file of this machine as its data.
    identity(meta) is the part of meta.json that a checkpoint has as saved["task"].
    """
    if saved:
        _expected.append(lambda meta: identity(meta) == saved["task"])
    try:
        yield
    finally:
        if saved:
            _expected.pop()


def read_meta(folder: str | Path) -> dict:
    """What `fill` returned when the folder was made. Raises DataError where it is not readable."""
    try:
        with open_file(Path(folder) / "meta.json") as file:
            meta = json.load(file)
    except (OSError, ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise DataError(f"{folder} holds no readable meta.json: "
                        "remove the folder and prepare it again")
    return meta


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


@contextmanager
def _locked(path: Path):
    """One process at a time; the system lets go of the lock when its holder dies."""
    with open(path, "a+b") as file:  # does not empty what a link points to, nor wait for a pipe
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


_missing = None  # what `ensure` says instead of making a folder


@contextmanager
def only_prepared(missing: str):
    """A context in which `ensure` makes no folder: where there is none, DataError(missing)."""
    global _missing
    _missing = missing
    try:
        yield
    finally:
        _missing = None


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
        if not path.is_file():
            same = False
        elif path.stat().st_size <= WHOLE:
            same = sha256(path) == digest
        else:
            same = name not in samples or sample_sha256(path) == samples[name]
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
