"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of 32 x 32 pixels in ten classes.

    for split, samples in cifar10(Path("cifar-10-python.tar.gz")):
        label, image = samples[0]   # CLASSES[label], (3, 32, 32) uint8

The release is a tar of pickles that Python 2 wrote. Unpickling calls whatever a file names; here
a file can name nothing but what makes a numpy array.
"""
import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.archives import Release, files, read_label
from engine.options import DataError

ARCHIVE = ("cifar-10-python.tar.gz", "163 MiB", "https://www.cs.toronto.edu/~kriz/cifar.html")
RELEASE = Release(ARCHIVE, "cifar-10-batches-py",
                  (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"))
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# what loading a file that is no such pickle may raise
WRONG = (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, MemoryError,
         OverflowError, TypeError, ValueError)


def cifar10(source: Path) -> Iterator[tuple[str, list[tuple[int, np.ndarray]]]]:
    """("train", samples), then ("val", samples): (label, image (3, 32, 32) uint8) each.

    "val" is the release's test batch. source: the archive for Python, or where it was unpacked to.
    Raises DataError, and archives.DAMAGED.
    """
    batches = {}
    for name, file in files(source, RELEASE):
        batches[name] = _batch(file.read(), name)
    *train, test = RELEASE.parts
    yield "train", [sample for name in train for sample in batches[name]]
    yield "val", batches[test]


def _batch(content: bytes, name: str) -> list[tuple[int, np.ndarray]]:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        labels = batch[b"labels"]
        # each row: 1,024 bytes of red, then green, then blue
        images = np.asarray(batch[b"data"], np.uint8).reshape(len(labels), 3, 32, 32)
    except WRONG as error:
        raise DataError(f"{name} is not a batch of CIFAR-10 ({type(error).__name__}: {error}): "
                        "download it again") from None
    samples = []
    for i, (label, image) in enumerate(zip(labels, images)):
        samples.append((read_label(label, len(CLASSES), f"{name}, image {i}"), image))
    return samples


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module, name):
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r}, which no array needs: "
                                     "nothing was run")
