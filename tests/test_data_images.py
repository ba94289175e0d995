"""Batches of generated and of stored images; CIFAR-10."""
import json
import os
import pickle

import numpy as np
import pytest
import torch

EXTRA = "pip install -r requirements-extra.txt"
pytest.importorskip("PIL", reason=EXTRA)
pytest.importorskip("pycocotools", reason=EXTRA)

import coco_folder  # noqa: E402
from data import folders, images, shapes  # noqa: E402
from engine.options import DataError  # noqa: E402

# From pycocotools with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def cifar(tmp_path):
    """A folder with the batches of CIFAR-10, and what is in them."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batches[name] = {b"data": rng.integers(0, 256, (4, 3072), np.uint8),
                         b"labels": rng.integers(0, 10, 4).tolist()}
        (folder / name).write_bytes(pickle.dumps(batches[name]))
    return folder.parent, batches


def test_cifar10(cifar, tmp_path):
    folder, batches = cifar
    data = images.open_data("classify", str(folder), str(tmp_path / "data"), 32, 1, 0)
    assert (len(data.train), len(data.val)) == (20, 4)
    assert data.classes[3] == "cat" and data.truth is None
    batch, labels = data.train.batch([5, 18])
    first = batches["data_batch_2"][b"data"][1]
    assert np.array_equal(batch[0], first.reshape(3, 32, 32))
    assert labels.tolist() == [batches["data_batch_2"][b"labels"][1],
                               batches["data_batch_5"][b"labels"][2]]
    batch, labels = data.val.batch([3])
    assert np.array_equal(batch[0], batches["test_batch"][b"data"][3].reshape(3, 32, 32))
    larger = images.open_data("classify", str(folder), str(tmp_path / "data"), 64, 1, 0)
    assert larger.val.batch([0])[0].shape == (1, 3, 64, 64)
    mean = larger.val.batch([0])[0].float().mean()
    assert abs(mean - data.val.batch([0])[0].float().mean()) < 2


def test_epochs_of_stored_samples(tmp_path):
    source = coco_folder.make(tmp_path / "coco")
    data = coco_folder.prepared(source, tmp_path / "data")
    whole = data.train.order(0, 18, seed=1)
    epochs = [sorted(whole[i:i + 6]) for i in (0, 6, 12)]
    assert epochs == [list(range(6))] * 3 and not np.array_equal(whole[:6], whole[6:12])
    fresh = coco_folder.prepared(source, tmp_path / "data")
    assert np.array_equal(fresh.train.order(4, 5, seed=1), whole[4:9])  # the same from any start
    assert not np.array_equal(fresh.train.order(0, 18, seed=2), whole)


def test_generated_batches():
    """Boxes and masks of a batch are the samples'.

    The label to classify is that of the shape of which most is seen.
    """
    data = {task: images.open_data(task, "", "data", 48, 5, 6)
            for task in ("classify", "detect", "segment")}
    indices = data["detect"].train.order(10, 4, seed=5)
    batch, counts, labels, boxes = data["detect"].train.batch(indices)
    masks = data["segment"].train.batch(indices)[3]
    answers = data["classify"].train.batch(indices)[1]
    for i, index in enumerate(indices):
        image, true, m = shapes.sample(6, int(index), 48)
        n = counts[i]
        assert n == len(true) and np.array_equal(labels[i, :n], true)
        assert np.array_equal(batch[i].permute(1, 2, 0), image)
        assert np.array_equal(masks[i, :n], m) and not masks[i, n:].any()
        assert answers[i] == true[np.argmax([x.sum() for x in m])]
        for box, mask in zip(boxes[i], m):
            y, x = np.nonzero(mask)
            expected = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            corners = np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
            np.testing.assert_allclose(48 * corners, expected, atol=1e-4)
    # Validation does not depend on the run's seed.
    other = images.open_data("detect", "", "data", 48, 7, 6)
    assert torch.equal(other.val.batch([2])[0], data["detect"].val.batch([2])[0])
    assert not torch.equal(other.train.batch([2])[0], data["detect"].train.batch([2])[0])


def only(folder):
    """The one prepared folder in a data_dir."""
    found, = folder.glob("vision_*")
    return found


def overwrite(path, at: int = -1):
    """Change a byte in place: size and name stay."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_prepared_files_that_were_overwritten_are_refused(tmp_path):
    source = coco_folder.make(tmp_path / "coco")
    coco_folder.prepared(source, tmp_path / "data", "segment")
    folder = only(tmp_path / "data")
    names = [path.name for path in folder.iterdir() if path.name != "meta.json"]
    assert len(names) == 11
    for name in names:
        overwrite(folder / name)
        with pytest.raises(DataError, match=f"{name} is not what was prepared: delete .*vision_"):
            coco_folder.prepared(source, tmp_path / "data", "segment")
        overwrite(folder / name)
    coco_folder.prepared(source, tmp_path / "data", "segment")
    (folder / "val.json").unlink()
    with pytest.raises(DataError, match="val.json is not what was prepared"):
        coco_folder.prepared(source, tmp_path / "data", "segment")
    (folder / "meta.json").write_text("[]")
    with pytest.raises(DataError, match="delete it and prepare it again|remove the folder"):
        coco_folder.prepared(source, tmp_path / "data", "segment")


def test_a_sample_of_large_files_is_checked(tmp_path, monkeypatch):
    source = coco_folder.make(tmp_path / "coco")
    monkeypatch.setattr(folders, "WHOLE", 10000)  # the images have more, all else less
    monkeypatch.setattr(folders, "PIECE", 16)
    coco_folder.prepared(source, tmp_path / "data")
    folder = only(tmp_path / "data")
    large = folder / "train_images.bin"
    assert large.stat().st_size == 6 * 32 * 32 * 3
    for at in (0, 15, -1, -16):
        overwrite(large, at)
        with pytest.raises(DataError, match="train_images.bin is not what was prepared"):
            coco_folder.prepared(source, tmp_path / "data")
        overwrite(large, at)
    overwrite(large, 40)  # between two pieces
    coco_folder.prepared(source, tmp_path / "data")
    overwrite(large, 0)
    meta = json.loads((folder / "meta.json").read_text())
    assert list(meta["samples"]) == ["train_images.bin", "val_images.bin"]
    del meta["samples"]  # as earlier versions wrote it
    (folder / "meta.json").write_text(json.dumps(meta))
    coco_folder.prepared(source, tmp_path / "data")


@pytest.mark.parametrize("label", [10, -1])
def test_labels_outside_the_classes_are_refused(cifar, tmp_path, label):
    arguments = ("classify", str(cifar[0]), str(tmp_path / "data"), 32, 1, 0)
    images.open_data(*arguments)
    folder = only(tmp_path / "data")
    labels = np.load(folder / "train_labels.npy")
    labels[3] = label
    np.save(folder / "train_labels.npy", labels)
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"]["train_labels.npy"] = folders.sha256(folder / "train_labels.npy")
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="its train labels are not of 20 images and 10 classes"):
        images.open_data(*arguments)


def test_batches_of_cifar10_that_change_are_noticed(cifar, tmp_path):
    """Also where the source is the folder above them; but not what macOS leaves beside them."""
    batches = cifar[0] / "cifar-10-batches-py"
    for source in cifar[0], batches:
        arguments = ("classify", str(source), str(tmp_path / source.name), 32, 1, 0)
        images.open_data(*arguments)
        (batches / "._test_batch").write_text("hidden")
        images.open_data(*arguments)
        os.utime(batches / "test_batch", (1, 1))
        with pytest.raises(DataError, match="has changed since .* was made of it"):
            images.open_data(*arguments)
        os.utime(batches / "test_batch")
