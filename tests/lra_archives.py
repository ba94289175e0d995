"""Small archives of the released form, made by the tests, and what a prepared folder holds."""
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.cifar import RELEASE
from data.lra import SPLITS, load


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


def stored(folder):
    """{split: [(label, bytes of each tower, ...)]}, through Split.batch."""
    _, splits = load(folder)
    result = {}
    for name, split in splits.items():
        x, mask, y = split.batch(np.arange(len(split)))
        x, mask = (a if a.dim() == 3 else a[:, None] for a in (x, mask))
        assert not x[~mask].any()
        result[name] = []
        for *towers, label in zip(x, mask, y):
            sequences = (bytes(row[real].tolist()) for row, real in zip(*towers))
            result[name].append((int(label), *sequences))
    return result


def nested(text):
    """`[MAX 3 4 ]` -> `( ( ( [MAX 3 ) 4 ) ] )`."""
    def node(symbols):
        symbol = symbols.pop(0)
        if not symbol.startswith("["):
            return symbol
        while symbols[0] != "]":
            symbol = f"( {symbol} {node(symbols)} )"
        return f"( {symbol} {symbols.pop(0)} )"
    return node(text.split())


TREES = {"train": [("[MAX 3 4 ]", "4"), ("[MIN [SM 9 9 ] 9 1 ]", "1.0"), ("[MED 1 2 ]", "1")],
         "val": [("[SM 1 2 3 ]", "6")],
         "test": [("[MAX 9 [MIN 0 1 ] ]", "9"), ("[MAX 1 2 ]", "2")]}


def listops_files(prefix="lra_release/lra_release/", trees=TREES):
    files = {}
    for split in SPLITS:
        lines = "".join(f"{nested(text)}\t{label}\r\n" for text, label in trees[split])
        files[f"{prefix}listops-1000/basic_{split}.tsv"] = f"Source\tTarget\r\n{lines}".encode()
    return files


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


def pathfinder_files(n=20, size=32):
    image = pytest.importorskip("PIL.Image", reason="pip install -r requirements-extra.txt")
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (n, size, size), np.uint8)
    labels = random.integers(0, 2, n)
    files = {}
    root = f"lra_release/lra_release/pathfinder{size}/curv_contour_length_14"
    for batch in range(2):
        lines = []
        for i in range(batch, n, 2):
            png = io.BytesIO()
            image.fromarray(pictures[i]).save(png, "png")
            files[f"{root}/imgs/{batch}/sample_{i}.png"] = png.getvalue()
            lines.append(f"imgs/{batch} sample_{i}.png {i} {labels[i]} 1.0 14 4 2 0.5 1 1")
        files[f"{root}/metadata/{batch}.npy"] = "\n".join(lines).encode()
    return files, [(int(label), picture.tobytes()) for label, picture in zip(labels, pictures)]


RELEASES = {"listops": listops_files, "text": imdb_files, "retrieval": retrieval_files,
            "image": lambda: cifar()[2], "pathfinder": lambda: pathfinder_files()[0]}
