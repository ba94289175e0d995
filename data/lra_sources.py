"""Where Long Range Arena's samples come from: readers of the files as they are released, and the two generators.

`samples` yields (split, label, sequence of bytes, ...) one after the other, so that no data set needs to fit into memory. A source is
an archive, read as a stream, or a folder in which the inner folder is found at any usual depth. data/lra.py stores what comes out.
"""
import gzip
import io
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data import listops
from engine.options import DataError

SPLITS = ("train", "val", "test")
LONGEST_LINE = 2**26  # bytes: a longer "line" is no line of these files, and would only fill the memory
GENERATED_AT_ONCE = 2**28  # pixels
_LRA = ("lra_release.gz", "7.7 GiB", "https://github.com/google-research/long-range-arena")


@dataclass(frozen=True)
class Task:
    """What is known about a task before its data is seen."""
    classes: int
    vocab_size: int
    block_size: int  # the published length in tokens
    archive: tuple[str, str, str]  # name, size, home page
    folder: str  # in the archive
    parts: tuple[str, ...]  # files or folders that must be in it
    towers: int = 1  # sequences in a sample
    counts: tuple[int, int, int] | None = None  # samples to generate for train, val, test; None: this task cannot be generated


TASKS = {
    "listops": Task(10, 15, 2000, _LRA, "listops-1000", ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"),
                    counts=(96_000, 2_000, 2_000)),
    "text": Task(2, 256, 4000, ("aclImdb_v1.tar.gz", "80 MiB", "https://ai.stanford.edu/~amaas/data/sentiment/"), "aclImdb",
                 ("train/neg", "train/pos", "test/neg", "test/pos")),
    "retrieval": Task(2, 256, 4000, _LRA, "tsv_data", ("new_aan_pairs.train.tsv", "new_aan_pairs.eval.tsv", "new_aan_pairs.test.tsv"),
                      towers=2),
    "image": Task(10, 256, 32**2, ("cifar-10-python.tar.gz", "163 MiB", "https://www.cs.toronto.edu/~kriz/cifar.html"),
                  "cifar-10-batches-py", (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")),
    "pathfinder": Task(2, 256, 32**2, _LRA, "pathfinder32/curv_contour_length_14", ("metadata", "imgs"), counts=(160_000, 20_000, 20_000)),
    "pathx": Task(2, 256, 128**2, _LRA, "pathfinder128/curv_contour_length_14", ("metadata", "imgs"), counts=(160_000, 20_000, 20_000)),
}


def samples(task: str, source: Path | None, *, seed: int, block_size: int, generate: dict | None, scratch: Path) -> Iterator[tuple]:
    """(split, label, sequence, ...) of every sample; an unreadable one has an empty sequence. source None: generated.

    scratch: a folder that may be made and filled. Raises DataError with file and line, and what a damaged archive raises (DAMAGED).
    """
    if source is None:
        counts = {split: generate[split] for split in SPLITS}
        options = {name: value for name, value in generate.items() if name not in SPLITS}
        return _generate_listops(seed, counts, options) if task == "listops" else _generate_images(task, seed, counts, options, block_size)
    if task in ("image", "pathfinder", "pathx"):
        _check_size(task, TASKS[task].block_size, block_size)
    if task in ("pathfinder", "pathx"):
        return _read_pathfinder(source, task, seed, scratch)
    return {"listops": _read_listops, "text": _read_text, "retrieval": _read_retrieval, "image": _read_image}[task](source, seed)


# Generated


def _generate_listops(seed: int, counts: dict, options: dict) -> Iterator[tuple]:
    """No tree is in two splits. The test set comes first, so that it does not depend on how much there is to train on."""
    _check_options("listops", options, ["max_depth", "max_args", "min_length", "max_length"])
    seen = set()
    for split in "test", "val", "train":
        tokens, offsets, labels, _ = listops.generate(counts[split], seed=_seed(seed, split), exclude=seen, **options)
        trees = [tokens[start:end].tobytes() for start, end in zip(offsets[:-1], offsets[1:])]
        seen.update(trees)
        for label, tree in zip(labels, trees):
            yield split, label, tree


def _generate_images(task: str, seed: int, counts: dict, options: dict, block_size: int) -> Iterator[tuple]:
    from data import pathfinder

    _check_options(task, options, [field.name for field in fields(pathfinder.Geometry)])
    options = {"size": 32 if task == "pathfinder" else 128, **options}
    _check_size(task, options["size"] ** 2, block_size)
    at_once = max(1, GENERATED_AT_ONCE // options["size"] ** 2)
    for split, count in counts.items():
        for first in range(0, count, at_once):
            images, labels = pathfinder.generate(min(at_once, count - first), seed=_seed(seed, split, first), **options)
            for label, image in zip(labels, images):
                yield split, label, image.tobytes()


def _seed(seed: int, split: str, first: int = 0) -> int:
    return int(np.random.SeedSequence([seed, SPLITS.index(split), first]).generate_state(1, np.uint64)[0])


def _check_options(task: str, options: dict, known: list[str]):
    for name, value in options.items():
        if name not in known or not isinstance(value, int | float):
            raise DataError(f"{task}: no option {name}={value!r}; take train, val, test, {', '.join(known)}, each a number")


def _check_size(task: str, pixels: int, block_size: int):
    if pixels > block_size:
        raise DataError(f"{task}: images of {pixels} pixels need block_size of at least {pixels}, not {block_size}: images are not cut")


# Released


def _read_listops(source: Path, seed: int) -> Iterator[tuple]:
    for name, file in _files(source, "listops"):
        for number, line in enumerate(_lines(file, name), 1):
            where = f"{name}, line {number}"
            fields = line.split(b"\t")
            if number == 1:
                if fields != [b"Source", b"Target"]:
                    raise DataError(f"{where}: expected the header Source<TAB>Target, got {line[:60]!r}")
                continue
            if len(fields) != 2:
                raise DataError(f"{where}: expected an expression, a tab and a label, got {line[:60]!r}")
            label = _label(fields[1], "listops", where)
            try:
                yield name[len("basic_"):-len(".tsv")], label, listops.tokenize(fields[0].decode("ascii", "replace")).tobytes()
            except DataError as error:
                raise DataError(f"{where}: {error}") from None


def _read_retrieval(source: Path, seed: int) -> Iterator[tuple]:
    for name, file in _files(source, "retrieval"):
        split = {"train": "train", "eval": "val", "test": "test"}[name.split(".")[1]]
        for number, line in enumerate(_lines(file, name), 1):
            where, fields = f"{name}, line {number}", line.split(b"\t")
            if len(fields) != 5:
                raise DataError(f"{where}: expected label, id1, id2, text1, text2 with tabs between them, got {len(fields)} fields")
            yield split, _label(fields[0], "retrieval", where), fields[3], fields[4]


def _read_text(source: Path, seed: int) -> Iterator[tuple]:
    reviews = {"train": [], "test": []}
    counts = dict.fromkeys(TASKS["text"].parts, 0)
    for name, file in _files(source, "text"):
        if not name.endswith(".txt"):
            continue
        split, sentiment = name.split("/")[:2]
        counts[f"{split}/{sentiment}"] += 1
        reviews[split].append((name, int(sentiment == "pos"), file.read()))
    for split in reviews:
        if counts[f"{split}/pos"] != counts[f"{split}/neg"]:  # the release is balanced: an interrupted unpacking is not
            raise DataError(f"{source}: {split} holds {counts[f'{split}/pos']:,} positive and {counts[f'{split}/neg']:,} negative reviews, "
                            "not as many of both: unpack the archive again")
        reviews[split].sort()  # archive and folder have different orders
    yield from _hold_out([sample for _, *sample in reviews["train"]], len(reviews["train"]), ("val",), seed)
    for _, label, review in reviews["test"]:
        yield "test", label, review


def _read_image(source: Path, seed: int) -> Iterator[tuple]:
    """Grey = 0.299 R + 0.587 G + 0.114 B, cut to an integer, in exact arithmetic."""
    for split, batch in cifar10(source):
        samples = []
        for label, image in batch:
            red, green, blue = image.astype(np.uint32)
            samples.append((label, ((299 * red + 587 * green + 114 * blue) // 1000).astype(np.uint8).tobytes()))
        if split == "train":
            yield from _hold_out(samples, len(samples), ("val",), seed)
        else:
            yield from (("test", *sample) for sample in samples)


def cifar10(source: Path) -> Iterator[tuple[str, list[tuple[int, np.ndarray]]]]:
    """("train", samples), then ("val", samples) of CIFAR-10: (label, image (3, 32, 32) uint8), val being its test batch.

    source: its archive for Python, or where it was unpacked to. Raises DataError, and what a damaged archive raises (DAMAGED).
    """
    batches = {name: _images(file, name) for name, file in _files(source, "image")}
    yield "train", [sample for name in TASKS["image"].parts[:-1] for sample in batches[name]]
    yield "val", batches["test_batch"]


def _images(file: BinaryIO, name: str) -> list[tuple[int, np.ndarray]]:
    """(label, image (3, 32, 32) uint8) of a CIFAR-10 batch."""
    content = file.read()  # before the try: what fails here is the archive
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        labels = batch[b"labels"]
        data = np.asarray(batch[b"data"], np.uint8).reshape(len(labels), 3, 32, 32)
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, MemoryError, OverflowError, TypeError,
            ValueError) as error:
        raise DataError(f"{name} is not a batch of CIFAR-10 ({type(error).__name__}: {error}): download it again") from None
    return [(_label(label, "image", f"{name}, image {i}"), image) for i, (label, image) in enumerate(zip(labels, data))]


class _ArraysOnly(pickle.Unpickler):
    """Unpickling calls whatever the file names; here a file can name what makes a numpy array and nothing else."""

    def find_class(self, module, name):
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r}, which no array needs: nothing was run")


def _read_pathfinder(source: Path, task: str, seed: int, scratch: Path) -> Iterator[tuple]:
    from data import pathfinder

    if source.is_dir():
        root = _folder(source, TASKS[task]) or source
    else:
        root = scratch
        for name, file in _files(source, task):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with open(root / name, "wb") as out:
                shutil.copyfileobj(file, out)
    released = pathfinder.read_released(root)
    count = sum(len(file.read_bytes().splitlines()) for file in (root / "metadata").glob("*.npy"))
    pixels = TASKS[task].block_size

    def images():
        for i, (image, label) in enumerate(released):
            if image is not None and image.size != pixels:
                raise DataError(f"{source}: image {i} has {image.size} pixels, expected {pixels}: this is not the release of {task}")
            yield label, b"" if image is None else image.tobytes()

    yield from _hold_out(images(), count, ("val", "test"), seed)


def _hold_out(samples, count: int, parts: tuple[str, ...], seed: int) -> Iterator[tuple]:
    """Put "train" or one of `parts` in front of each of `count` samples: 10% to each part, the last of a seeded permutation."""
    share = max(1, count // 10)
    split = np.full(count, "train", object)
    order = np.random.default_rng(seed).permutation(count)
    for i, part in enumerate(parts):
        split[order[max(0, count - (i + 1) * share):count - i * share]] = part
    for part, sample in zip(split, samples):
        yield part, *sample


# Files


DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)  # what reading a truncated or broken archive raises


def find(task: str, data_dir: Path) -> Path:
    """The task's archive, or the folder it was unpacked to, in data_dir. Raises DataError: what to download, and where to put it."""
    spec = TASKS[task]
    name, size, home = spec.archive
    if _folder(data_dir, spec):
        return data_dir
    if (data_dir / name).is_file():
        return data_dir / name
    raise DataError(f"{task}: found neither {name} nor an unpacked {spec.folder} in {data_dir}: download {name} ({size}) from {home} "
                    f"into {data_dir}, or give --source=PATH")


def _folder(source: Path, spec: Task) -> Path | None:
    """The first folder of the usual depths that has any of the parts; the inner of the release's two copies comes first."""
    inner = Path(spec.folder).parts
    depths = [("lra_release", "lra_release", *inner), ("lra_release", *inner), *(inner[i:] for i in range(len(inner) + 1))]
    folders = [source.joinpath(*depth) for depth in depths]
    return next((folder for folder in folders if any((folder / part).exists() for part in spec.parts)), None)


def _files(source: Path, task: str) -> Iterator[tuple[str, BinaryIO]]:
    """(name inside the task's folder, open file) of every file of its parts, in the order of parts or of the archive."""
    spec = TASKS[task]
    seen = set()
    for name, file in _folder_files(source, spec) if source.is_dir() else _archive_files(source, spec):
        seen.add(next(part for part in spec.parts if f"{name}/".startswith(f"{part}/")))
        yield name, file
        if name in spec.parts and len(seen) == len(spec.parts):
            return  # they are all files, and all had: no need to read the rest of a large archive
    missing = [f"{spec.folder}/{part}" for part in spec.parts if part not in seen]
    if missing:
        raise DataError(f"{source} lacks {', '.join(missing)}: it should hold what {spec.archive[0]} holds "
                        f"({spec.archive[1]}, {spec.archive[2]})")


def _folder_files(source: Path, spec: Task) -> Iterator[tuple[str, BinaryIO]]:
    folder = _folder(source, spec)
    for part in spec.parts if folder else ():
        for path in [folder / part] if (folder / part).is_file() else sorted((folder / part).rglob("*.*")):
            if path.is_file():
                with open(path, "rb") as file:
                    yield path.relative_to(folder).as_posix(), file


def _archive_files(source: Path, spec: Task) -> Iterator[tuple[str, BinaryIO]]:
    """A tar, gzipped or not, read once from front to back. Of several copies of the task's folder the first is taken."""
    with open(source, "rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.open(raw) if gzipped else raw as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            copy = None
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile would keep them all: gigabytes for the millions of images in lra_release.gz
                before, found, name = f"/{member.name}".rpartition(f"/{spec.folder}/")
                if not found or not member.isfile() or ".." in name.split("/") or copy not in (None, before):
                    continue
                if any(f"{name}/".startswith(f"{part}/") for part in spec.parts):
                    copy = before
                    yield name, archive.extractfile(member)
            while stream.read(2**20):  # to the end, where gzip checks that the archive is complete
                pass


def _lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Lines without their ends, LF or CRLF, one at a time."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise DataError(f"{name} has a line longer than {LONGEST_LINE:,} bytes: it is not a file of this release")
        yield line.rstrip(b"\r\n")


def _label(value, task: str, where: str) -> int:
    """A label as the files have them, an integer or the bytes 1 or 1.0. Raises DataError where it is not one of the task's."""
    try:
        label = float(value)
    except (TypeError, ValueError):
        label = -1
    if label not in range(TASKS[task].classes):
        raise DataError(f"{where}: label {value!r} is not one of 0 to {TASKS[task].classes - 1}")
    return int(label)
