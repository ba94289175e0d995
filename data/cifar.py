"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of 32 x 32 pixels in ten classes.

    label, image = cifar10(Path("cifar-10-python.tar.gz"))["train"][0]
    CLASSES[label], image.shape     # (3, 32, 32) uint8

The release is a tar of pickles that Python 2 wrote. Unpickling calls whatever a file names. Here a
file can name nothing but what makes a numpy array, and a stand-in is called in its place.
"""
import io
import pickle
import pickletools
from pathlib import Path

import numpy as np

from data.archives import Release, files, read_label
from engine.options import DataError

ARCHIVE = ("cifar-10-python.tar.gz", "163 MiB", "https://www.cs.toronto.edu/~kriz/cifar.html")
RELEASE = Release(ARCHIVE, "cifar-10-batches-py",
                  (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"))
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ARRAY = ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct",
         "numpy._core.multiarray._reconstruct")  # what makes a numpy array
# what loading a file that is no such pickle may raise
WRONG = (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, MemoryError,
         OverflowError, TypeError, ValueError)


def cifar10(source: Path) -> dict[str, list]:
    """{"train": samples, "val": samples}: (label, image (3, 32, 32) uint8) each.

    "val" is the release's test batch. source: the archive for Python, or where it was unpacked to.
    Raises DataError, within archives.complete.
    """
    batches = {name: _batch(file.read(), name) for name, file in files(source, RELEASE)}
    *train, test = RELEASE.parts
    return {"train": sum((batches[name] for name in train), []), "val": batches[test]}


def _batch(content: bytes, name: str) -> list[tuple]:
    try:
        for opcode, argument, _ in pickletools.genops(content):
            # an index into a table that the unpickler makes as long as that: ten bytes, gigabytes
            if opcode.name.endswith("PUT") and argument > len(content):
                raise pickle.UnpicklingError(f"it remembers object {argument:,}")
        batch = _StandIns(io.BytesIO(content), encoding="bytes").load()
        labels = batch[b"labels"]
        if not isinstance(labels, list) or any(type(label) is not int for label in labels):
            raise TypeError("its labels are no list of integers")
        _, _, dtype, fortran, pixels = batch[b"data"].state
        if dtype.arguments[0] not in ("u1", b"u1") or fortran:
            raise TypeError("its pixels are no rows of bytes")
        # each row: 1,024 bytes of red, then green, then blue
        images = np.frombuffer(pixels, np.uint8).reshape(len(labels), 3, 32, 32)
        samples = list(zip(np.array(labels, np.int64).tolist(), images))
    except WRONG as error:
        raise DataError(f"{name} is not a batch of CIFAR-10 ({type(error).__name__}: "
                        f"{str(error)[:100]}): download it again") from None
    return [(read_label(label, len(CLASSES), f"{name}, image {i}"), image)
            for i, (label, image) in enumerate(samples)]


class _StandIn:
    """Keeps what a pickle says of an array or of its type. Nothing of numpy is called."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state  # of an array: version, shape, type, in Fortran's order?, bytes


class _StandIns(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" in ARRAY:
            return _StandIn
        raise pickle.UnpicklingError(f"nothing was run: it asks for {f'{module}.{name}'!r}")
