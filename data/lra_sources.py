"""Where Long Range Arena's samples come from: a reader for each release, and the two generators.

`samples` yields (split, label, sequence of bytes, ...) one after the other, so that no data set
needs to fit into memory; data/lra.py stores what comes out. To add a task, add it to TASKS.
"""
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from data import cifar, listops, pathfinder
from data.archives import Release, files, inner_folder, lines, read_label
from engine.options import DataError, need

SPLITS = ("train", "val", "test")
GENERATED_AT_ONCE = 2**28  # pixels
READING = "reading Pathfinder's PNGs needs"


def samples(task: str, source: Path | None, *, seed: int, block_size: int, generate: dict | None,
            scratch: Path) -> Iterator[tuple]:
    """(split, label, sequence, ...) of every sample; an unreadable one has an empty sequence.

    source None: generated. scratch: a folder that may be made and filled. Raises DataError with
    file and line, within archives.complete.
    """
    spec = TASKS[task]
    if source is None:
        counts = {split: generate[split] for split in SPLITS}
        options = {name: value for name, value in generate.items() if name not in SPLITS}
        return spec.generate(task, seed, counts, options, block_size)
    if spec.pixels:
        _check_size(task, spec.pixels, block_size)
    return spec.read(task, source, seed, scratch)


# Generated


def _generate_listops(task, seed, counts, options, block_size):
    """No tree is in two splits."""
    _check_options(task, options, ["max_depth", "max_args", "min_length", "max_length"])
    seen = set()
    for split in "test", "val", "train":  # so that the test set is the same for any training set
        trees = listops.generate(counts[split], seed=_seed(seed, split), exclude=seen, **options)
        seen.update(trees)
        for tree, value in trees.items():
            yield split, value, tree


def _generate_pathfinder(task, seed, counts, options, block_size):
    _check_options(task, options, [field.name for field in fields(pathfinder.Geometry)])
    options = {"size": round(TASKS[task].pixels ** 0.5), **options}
    pixels = pathfinder.geometry_of(**options).size ** 2
    _check_size(task, pixels, block_size)
    at_once = max(1, GENERATED_AT_ONCE // pixels)
    for split, count in counts.items():
        for first in range(0, count, at_once):
            images, labels = pathfinder.generate(
                min(at_once, count - first), seed=_seed(seed, split, first), **options)
            for label, image in zip(labels, images):
                yield split, label, image.tobytes()


def _seed(seed: int, split: str, first=0) -> int:
    sequence = np.random.SeedSequence([seed, SPLITS.index(split), first])
    return int(sequence.generate_state(1, np.uint64)[0])


def _check_options(task: str, options: dict, known: list[str]):
    for name, value in options.items():
        if name not in known or type(value) not in (int, float):
            raise DataError(f"{task}: no option {name}={value!r}; take train, val, test, "
                            f"{', '.join(known)}, each a number")


def _check_size(task: str, pixels: int, block_size: int):
    if pixels > block_size:
        raise DataError(f"{task}: images of {pixels} pixels need block_size of at least {pixels}, "
                        f"not {block_size}: images are not cut")


# Released


def _rows(source: Path, spec: "Spec", width: int, expected: str) -> Iterator[tuple]:
    """(file's name, line's number, columns) of files whose columns have tabs between them."""
    for name, file in files(source, spec.release):
        for number, line in enumerate(lines(file, name), 1):
            columns = line.split(b"\t")
            if len(columns) != width:
                raise DataError(f"{name}, line {number}: expected {expected}, got {len(columns)} "
                                "fields")
            yield name, number, columns


def _read_listops(task, source, seed, scratch):
    spec = TASKS[task]
    for name, number, columns in _rows(source, spec, 2, "an expression, a tab and a label"):
        where = f"{name}, line {number}"
        if number == 1:
            if columns != [b"Source", b"Target"]:
                raise DataError(f"{where}: expected the header Source<TAB>Target, "
                                f"got {str(columns)[:60]}")
            continue
        expression, label = columns
        try:
            tree = listops.tokenize(expression.decode("ascii", "replace"))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        split = name.removeprefix("basic_").removesuffix(".tsv")
        yield split, read_label(label, spec.classes, where), tree


def _read_text(task, source, seed, scratch):
    reviews = {"train": [], "test": []}
    for name, file in files(source, TASKS[task].release):
        if re.fullmatch(r"(train|test)/(pos|neg)/\d+_\d+\.txt", name):
            split, sentiment, _ = name.split("/")
            reviews[split].append((name, int(sentiment == "pos"), file.read()))
    for split, found in reviews.items():
        found.sort()  # archive and folder have different orders
        positive = sum(label for _, label, _ in found)
        negative = len(found) - positive
        if positive != negative:  # the release is balanced: an interrupted unpacking is not
            raise DataError(f"{source}: {split} holds {positive:,} positive and {negative:,} "
                            "negative reviews, not as many of both: unpack the archive again")
    for split, _, label, review in _hold_out(*reviews.values(), seed):
        yield split, label, review


def _read_retrieval(task, source, seed, scratch):
    spec = TASKS[task]
    form = "label, id1, id2, text1, text2 with tabs between them"
    for name, number, columns in _rows(source, spec, 5, form):
        label, _, _, text1, text2 = columns
        label = read_label(label, spec.classes, f"{name}, line {number}")
        yield SPLITS[spec.release.parts.index(name)], label, text1, text2


def _read_image(task, source, seed, scratch):
    """Grey = 0.299 R + 0.587 G + 0.114 B, cut to an integer, in exact arithmetic."""
    train, test = cifar.cifar10(source).values()
    for split, label, image in _hold_out(train, test, seed):
        red, green, blue = image.astype(np.uint32)
        grey = (299 * red + 587 * green + 114 * blue) // 1000
        yield split, label, grey.astype(np.uint8).tobytes()


def _read_pathfinder(task, source, seed, scratch):
    need("PIL.Image", READING)  # before gigabytes are read
    spec = TASKS[task]
    if source.is_dir():
        root = inner_folder(source, spec.release) or source
    else:
        root = scratch
        for name, file in files(source, spec.release):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with open(root / name, "wb") as out:
                shutil.copyfileobj(file, out)
    for split, path, label in _hold_out(read_metadata(root), None, seed):
        yield split, label, read_png(path, spec.pixels)


def read_metadata(root: Path) -> list[tuple[Path, int]]:
    """(PNG file, label) of each sample of a released Pathfinder folder, in its metadata's order.

    root: the folder that holds imgs and metadata. Raises DataError where its layout, a label or
    the name of a file is wrong.
    """
    # text, for all that the release calls it .npy
    tables = [path for path in (root / "metadata").glob("*.npy")
              if path.stem.isdecimal() and path.is_file()]
    released = []
    for table in sorted(tables, key=lambda path: int(path.stem)):
        for number, line in enumerate(table.read_text(errors="replace").splitlines(), 1):
            columns = line.split()  # folder, file, index, label, ...
            if len(columns) < 4 or columns[3] not in ("0", "1"):
                raise DataError(f"{table}, line {number}: expected folder, file, index and a label "
                                f"0 or 1, got {line[:60]!r}; take the plain-text metadata of the "
                                "release")
            name = Path(*columns[:2])
            if name.is_absolute() or ".." in name.parts:
                raise DataError(f"{table}, line {number}: {str(name)[:60]!r} is outside {root}: "
                                "take the metadata of the release")
            released.append((root / name, int(columns[3])))
    if not released:
        raise DataError(f"no samples in {root / 'metadata'}: give the folder that holds imgs and "
                        "metadata, such as pathfinder32/curv_contour_length_14, as released")
    return released


def read_png(path: Path, pixels: int) -> bytes:
    """An image's grey levels; b"" where the file is missing, empty or broken, as one released is.

    Raises DataError where the image has not that many pixels of 8 bits, or pillow is missing.
    """
    pillow = need("PIL.Image", READING)
    if not path.is_file():  # a pipe would wait for its writer
        return b""
    try:
        with pillow.open(path, formats=["PNG"]) as image:
            if image.width * image.height == pixels and image.mode[0] not in "IF":
                return image.convert("L").tobytes()
            found = f"{image.width} x {image.height} pixels, mode {image.mode}"
    # what pillow raises for a damaged PNG, or one of billions of pixels
    except (OSError, SyntaxError, ValueError, zlib.error, pillow.DecompressionBombError):
        return b""
    raise DataError(f"{path} has {found}, expected {pixels} pixels of 8 bits: take the release of "
                    "this task")


def _hold_out(train: list[tuple], test: list[tuple] | None, seed: int) -> Iterator[tuple]:
    """Put "train", "val" or "test" in front of each sample.

    "val" is a tenth of train, from the end of a seeded permutation; where there is no test split,
    "test" the tenth before it.
    """
    share = max(1, len(train) // 10)
    split = np.full(len(train), "train", object)
    order = np.random.default_rng(seed).permutation(len(train))
    split[order[-share:]] = "val"
    if test is None:
        split[order[-2 * share:-share]] = "test"
    for part, sample in zip(split, train):
        yield part, *sample
    for sample in test or ():
        yield "test", *sample


@dataclass(frozen=True)
class Spec:
    """What is known about a task before its data is seen."""
    classes: int
    vocab_size: int
    block_size: int  # the published length in tokens
    release: Release
    read: Callable  # (task, source, seed, scratch) -> samples
    generate: Callable = None  # (task, seed, counts, options, block_size); None: it is only read
    counts: tuple[int, ...] = ()  # samples to generate for train, val, test
    towers: int = 1  # sequences in a sample
    pixels: int = 0  # of an image


_LRA = ("lra_release.gz", "7.7 GiB", "https://github.com/google-research/long-range-arena")
_IMDB = ("aclImdb_v1.tar.gz", "80 MiB", "https://ai.stanford.edu/~amaas/data/sentiment/")


def _contours(side: int) -> Spec:
    folder = f"pathfinder{side}/curv_contour_length_14"
    return Spec(
        2, 256, side**2, Release(_LRA, folder, ("metadata/", "imgs/")),
        _read_pathfinder, _generate_pathfinder, (160_000, 20_000, 20_000), pixels=side**2)


TASKS = {
    "listops": Spec(
        10, 15, 2000,
        Release(_LRA, "listops-1000", ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")),
        _read_listops, _generate_listops, (96_000, 2_000, 2_000)),
    "text": Spec(
        2, 256, 4000,
        Release(_IMDB, "aclImdb", ("train/neg/", "train/pos/", "test/neg/", "test/pos/")),
        _read_text),
    "retrieval": Spec(
        2, 256, 4000,
        Release(_LRA, "tsv_data",
                tuple(f"new_aan_pairs.{part}.tsv" for part in ("train", "eval", "test"))),
        _read_retrieval, towers=2),
    "image": Spec(len(cifar.CLASSES), 256, 32**2, cifar.RELEASE, _read_image, pixels=32**2),
    "pathfinder": _contours(32),
    "pathx": _contours(128),
}
