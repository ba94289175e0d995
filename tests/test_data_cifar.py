"""data/cifar.py: pickles as Python 2 wrote them, protocol 2, and what else a pickle may hold."""
import struct

import pytest

from data.lra import SPLITS, load, prepare
from engine.options import DataError
from lra_archives import archive, cifar, python2_batch, stored, unpack


def test_image(tmp_path):
    images, labels, files = cifar()
    backwards = {"cifar-10-batches-py/batches.meta": b"not read", **dict(reversed(files.items()))}
    source = archive(tmp_path / "cifar-10-python.tar.gz", backwards)
    result = stored(prepare("image", tmp_path / "a", source=source))
    assert result == stored(prepare("image", tmp_path / "b", source=unpack(tmp_path, files)))
    assert [len(result[split]) for split in SPLITS] == [18, 2, 4]

    def grey(image):  # in whole thousandths, pixel by pixel
        planes = image[:1024].tolist(), image[1024:2048].tolist(), image[2048:].tolist()
        return bytes((299 * r + 587 * g + 114 * b) // 1000 for r, g, b in zip(*planes))

    def samples(batch):
        return [(label, grey(image)) for image, label in zip(images[batch], labels[batch])]

    assert result["test"] == samples("test_batch")
    train = [sample for i in range(1, 6) for sample in samples(f"data_batch_{i}")]
    assert sorted(result["train"] + result["val"]) == sorted(train)
    x, mask, _ = load(prepare("image", tmp_path / "a", source=source))[1]["test"].batch([0, 1])
    assert x.shape == (2, 1024) and mask.all()


@pytest.mark.parametrize("payload, words", [
    (b"cos\nsystem\n(S'touch executed'\ntR.", "asks for 'os.system'"),
    (b"\x80\x02cnumpy\nsave\n(U\x08executedK\x01tR.", "asks for 'numpy.save'"),
    (b"\x80\x02cbuiltins\neval\n(U\x01itR.", "asks for 'builtins.eval'"),
    (b"\x80\x02}.", "KeyError"),
    (b"\x80\x02cnumpy\n" + b"x" * 10**6 + b"\n.", "data_batch_2 is not a batch"),
    (b"\x80\x02Nr" + struct.pack("<I", 2**28) + b".", "it remembers object 268,435,456"),  # 4 GB
    # arrays of no state, in numpy a piece of the process's memory
    (b"\x80\x02}(U\6labels](K\1eU\4datacnumpy\nndarray\nM\0\x0c\x85Ru.", "no attribute 'state'"),
    (b"\x80\x02}(U\6labels](K\1eU\4datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
     b"K\1M\0\x0c\x86U\1B\x87Ru.", "no attribute 'state'"),
    (b"\x80\x02}(U\6labels](G\0\0\0\0\0\0\0\0eU\4dataNu.", "no list of integers"),
    (b"\x80\x02}(U\6labels](\x8a\x09" + b"\xff" * 8 + b"\0eU\4dataNu.", "no attribute 'state'"),
    (b"hello", "data_batch_2 is not a batch"),
    (b"", "data_batch_2 is not a batch"),
])
def test_image_pickle_with_a_payload_runs_nothing(tmp_path, monkeypatch, payload, words):
    monkeypatch.chdir(tmp_path)
    _, _, files = cifar()
    files["cifar-10-batches-py/data_batch_2"] = payload
    with pytest.raises(DataError, match=words) as error:
        prepare("image", tmp_path / "data",
                source=archive(tmp_path / "cifar-10-python.tar.gz", files))
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    assert not list(tmp_path.glob("executed*"))


def test_image_labels_sizes_and_cutting(tmp_path):
    images, labels, files = cifar()
    files["cifar-10-batches-py/test_batch"] = python2_batch(images["test_batch"], [0, 1, 10, 3])
    with pytest.raises(DataError, match="test_batch, image 2: label 10 is not one of 0 to 9"):
        prepare("image", tmp_path, source=unpack(tmp_path / "a", files))
    small = images["test_batch"][:, :3000]
    files["cifar-10-batches-py/test_batch"] = python2_batch(small, [0, 1, 2, 3])
    with pytest.raises(DataError, match="test_batch is not a batch of CIFAR-10"):
        prepare("image", tmp_path, source=unpack(tmp_path / "a", files))
    with pytest.raises(DataError, match="block_size of at least 1024, not 1000"):
        prepare("image", tmp_path, source=tmp_path / "a", block_size=1000)


def test_pixels_and_labels_of_another_type(tmp_path):
    _, labels, files = cifar()
    name = "cifar-10-batches-py/test_batch"
    first = b"](K%c" % labels["test_batch"][0]
    for old, new, words in ((b"U\2u1", b"U\2i1", "no rows of bytes"),
                            (first, b"](\x8a\x09" + b"\xff" * 8 + b"\0", "too large")):
        assert old in files[name]
        wrong = {**files, name: files[name].replace(old, new, 1)}
        with pytest.raises(DataError, match=f"test_batch is not a batch .*{words}"):
            prepare("image", tmp_path, source=unpack(tmp_path / "a", wrong))
