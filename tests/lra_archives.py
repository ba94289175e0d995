"""Small archives of the released form, made by the tests: IMDb, pairs of papers, CIFAR-10."""
import io
import struct
import tarfile
from pathlib import Path

import numpy as np

from data.cifar import RELEASE


def archive(path, files, compress=True):
    """A tar of {name: bytes}, folders and all."""
    with tarfile.open(path, "w:gz" if compress else "w") as tar:
        folders = {str(parent) for name in files for parent in list(Path(name).parents)[:-1]}
        for name in sorted(folders):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unpack(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def imdb_files(n=20):
    files = {"aclImdb/README": b"Large Movie Review Dataset",
             "aclImdb/train/unsup/0_0.txt": b"unlabelled",
             "aclImdb/train/labeledBow.feat": b"9 0:9"}
    for split in "train", "test":
        for sentiment, rating in ("pos", 9), ("neg", 2):
            for i in range(n // 2):
                review = f"{split} {sentiment} {i} caf\u00e9<br />".encode() * (1 + i)
                files[f"aclImdb/{split}/{sentiment}/{i}_{rating}.txt"] = review
    return files


def retrieval_files(lines=None):
    lines = lines or [b"1.0\t12\t34\tfirst text\tsecond one",
                      b"0\t5\t6\t\"quoted, not closed\t" + b"x" * 50,
                      b"0.0\t5\t7\t\t\xff\xfe", b"1\t5\t7\ta\tb"]
    files = {}
    for name in "train", "eval", "test":
        content = b"\n".join(lines) + b"\n" * (name != "eval")
        files[f"lra_release/lra_release/tsv_data/new_aan_pairs.{name}.tsv"] = content
    return files


def python2_batch(images, labels):
    """Opcodes as cPickle of Python 2 writes them: byte strings, and an array through
    numpy.core.multiarray._reconstruct."""
    def string(s):
        return b"U" + bytes([len(s)]) + s if len(s) < 256 else b"T" + struct.pack("<i", len(s)) + s

    def integer(i):
        if i < 256:
            return b"K" + bytes([i])
        return b"M" + struct.pack("<H", i) if i < 65536 else b"J" + struct.pack("<i", i)

    dtype = (b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R(" + integer(3)
             + string(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + integer(0) + b"tb")
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85"
             + string(b"b") + b"\x87R(" + integer(1) + integer(images.shape[0])
             + integer(images.shape[1]) + b"\x86" + dtype + b"\x89" + string(images.tobytes())
             + b"tb")
    names = b"".join(string(b"%d.png" % i) for i in range(len(labels)))
    return (b"\x80\x02}(" + string(b"batch_label") + string(b"training batch 1 of 5")
            + string(b"labels") + b"](" + b"".join(map(integer, labels)) + b"e" + string(b"data")
            + array + string(b"filenames") + b"](" + names + b"eu.")


def cifar(n=4):
    random = np.random.default_rng(0)
    names = RELEASE.parts
    images = {name: random.integers(0, 256, (n, 3072), np.uint8) for name in names}
    labels = {name: random.integers(0, 10, n).tolist() for name in names}
    files = {f"cifar-10-batches-py/{name}": python2_batch(images[name], labels[name])
             for name in names}
    return images, labels, files
