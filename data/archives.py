"""Released archives, read as they are or from the folder that they were unpacked to.

    release = Release(("aclImdb_v1.tar.gz", "80 MiB", "https://..."), "aclImdb", ("test/",))
    for name, file in files(find(release, Path("data")), release):
        print(name, len(file.read()))

An archive is a tar, gzipped or not. It is read once, from front to back: nothing is unpacked, and
no data set needs to fit into memory. What file managers leave behind is never read: hidden files,
such as macOS's ._* beside every file, and LEFT_BEHIND.
"""
import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from engine.options import DataError

INFLATED = 2**26  # bytes that any archive may inflate to, beside 100 times its own size
LEFT_BEHIND = ("__macosx", "thumbs.db", "desktop.ini")  # in any case
LONGEST_LINE = 2**26  # bytes: a longer "line" is no line of a release, and would fill the memory


@dataclass(frozen=True)
class Release:
    """What is published, and what of it is read."""
    archive: tuple[str, str, str]  # name, size, home page
    folder: str  # in the archive
    parts: tuple[str, ...]  # files, and folders with a / at their end, that must be in it


@contextmanager
def complete(source: Path | None):
    """A context for reading an archive: a broken one is a DataError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise DataError(f"{source} is not a complete archive ({error}): "
                        "download it again") from None


def find(release: Release, data_dir: Path) -> Path:
    """The archive, or data_dir itself where the archive was unpacked into it.

    Raises DataError: what to download, and where to put it.
    """
    name, size, home = release.archive
    if inner_folder(data_dir, release):
        return data_dir
    if (data_dir / name).is_file():
        return data_dir / name
    raise DataError(f"download {name} ({size}) from {home} into {data_dir}, or give --source=PATH: "
                    f"neither it nor an unpacked {release.folder} is there")


def inner_folder(source: Path, release: Release) -> Path | None:
    """The first folder, of the usual depths below source, that has any of the release's parts."""
    inner = Path(release.folder).parts
    # Long Range Arena's archive holds some folders twice: the inner copy comes first
    depths = [("lra_release", "lra_release", *inner), ("lra_release", *inner)]
    depths += [inner[i:] for i in range(len(inner) + 1)]
    for depth in depths:
        folder = source.joinpath(*depth)
        if any((folder / part).exists() for part in release.parts):
            return folder
    return None


def files(source: Path, release: Release) -> Iterator[tuple[str, BinaryIO]]:
    """(name inside the release's folder, open file) of each file of its parts.

    They come in the order of the parts (a folder) or of the archive. Raises DataError where a part
    is missing, and within `complete` where the archive is broken.
    """
    seen = set()
    reader = _folder_files if source.is_dir() else _archive_files
    for name, file in reader(source, release):
        if name in seen:  # a part that is a file
            raise DataError(f"{source} holds {name} twice: it is not {release.archive[0]}")
        seen.add(_part(name, release))
        yield name, file
        if name in release.parts and len(seen) == len(release.parts):
            return  # all parts are files, and all were had: the rest of a large archive can wait
    missing = [f"{release.folder}/{part}" for part in release.parts if part not in seen]
    if missing:
        name, size, home = release.archive
        raise DataError(f"{source} lacks {', '.join(missing)}: it should hold what {name} holds "
                        f"({size}, {home})")


def stamps(files: dict[str, Path]) -> dict[str, list[int]]:
    """Size and time of each file: others when it has been changed."""
    found = {name: path.stat() for name, path in files.items()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def check_unchanged(source: Path | str, files: dict[str, Path], folder: Path, meta: dict):
    """Raises DataError where the files of a source are not as they were when `folder` was made.

    They may be gone: the prepared folder is enough. Older folders do not say how they were.
    """
    now = stamps(files)
    if now and now != meta.get("stamps", now):
        raise DataError(f"{source} has changed since {folder} was made of it: delete {folder} to "
                        "read it again")


def read_from(source: Path, release: Release) -> dict[str, Path]:
    """The archive, or those parts of the folder it was unpacked to that are files, by their names.

    Empty where they are gone, and for a folder of folders, such as images.
    """
    if source.is_file():
        return {source.name: source}
    folder = inner_folder(source, release)
    parts = release.parts if folder else ()
    return {part: folder / part for part in parts if (folder / part).is_file()}


def _part(name: str, release: Release) -> str | None:
    """The part that a file belongs to; None for files that are not read."""
    for word in name.split("/"):
        if word.startswith(".") or word.lower() in LEFT_BEHIND:
            return None
    for part in release.parts:
        if name == part or part.endswith("/") and name.startswith(part):
            return part
    return None


def _folder_files(source: Path, release: Release):
    folder = inner_folder(source, release)
    for part in release.parts if folder else ():
        paths = sorted((folder / part).rglob("*")) if part.endswith("/") else [folder / part]
        for path in paths:
            name = path.relative_to(folder).as_posix()
            if path.is_file() and _part(name, release):
                with open(path, "rb") as file:
                    yield name, file


def _archive_files(source: Path, release: Release):
    copy = None  # where the release's folder is: of several copies the first is taken
    try:
        with (open(source, "rb") as raw, _Gzip(fileobj=raw) if _is_gzip(raw) else raw as stream,
              tarfile.open(fileobj=stream, mode="r|") as archive):
            while member := archive.next():
                # tarfile keeps every member: gigabytes for the millions of images of some releases
                archive.members = []
                before, found, name = f"/{member.name}".rpartition(f"/{release.folder}/")
                if not found or "__macosx" in before.lower() or copy not in (None, before):
                    continue
                wrong = None
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    wrong = "would lie outside of the folder it is unpacked in"
                elif member.isdir() or not _part(name, release):
                    continue
                elif not member.isfile() or member.issparse():
                    wrong = "is a link, a device or sparse, no plain file"
                if wrong:
                    raise DataError(f"{source}: its {member.name[:100]!r} {wrong}: it is not "
                                    f"{release.archive[0]}")
                copy = before
                yield name, archive.extractfile(member)
            while stream.read(2**20):  # to the end, where gzip checks that the archive is complete
                pass
    except ValueError as error:  # tarfile, for some headers
        raise tarfile.ReadError(f"a broken header: {error}") from None


def _is_gzip(file: BinaryIO) -> bool:
    start = file.read(2)
    file.seek(0)
    return start == b"\x1f\x8b"


class _Gzip(gzip.GzipFile):
    """Two megabytes can inflate to two gigabytes, but those of a release inflate to a few."""

    def read(self, size=-1):
        packed = os.fstat(self.fileobj.fileno()).st_size
        if self.tell() > INFLATED + 100 * packed:
            raise tarfile.ReadError(f"its {packed:,} bytes inflate to over {self.tell():,}")
        return super().read(size)


def lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Lines without their ends, LF or CRLF, one at a time. Raises DataError for an endless one."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise DataError(f"{name} has a line longer than {LONGEST_LINE:,} bytes: it is not a "
                            "file of this release")
        yield line.rstrip(b"\r\n")


def read_label(value, classes: int, where: str) -> int:
    """A class as the releases write it: an integer, or the bytes 1 or 1.0. Raises DataError."""
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        number = -1
    if number not in range(classes):
        raise DataError(f"{where}: label {repr(value)[:60]} is not one of 0 to {classes - 1}")
    return int(number)
