"""Vision data: batches of generated and stored samples, COCO's files against pycocotools, its average precision, CIFAR-10, bad files."""
import copy
import json
import pickle

import numpy as np
import pytest
import torch

EXTRA = "pip install -r requirements-extra.txt"
Image = pytest.importorskip("PIL.Image", reason=EXTRA)
pytest.importorskip("pycocotools", reason=EXTRA)

from pycocotools import mask as rle  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

from data import coco, images as vision, shapes  # noqa: E402
from engine.options import DataError  # noqa: E402

SIZE = 32
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools with numpy 2


@pytest.fixture
def source(tmp_path):
    """A COCO folder with images that are not square: polygons, both run-length forms, a crowd, an object out of sight, a broken image."""
    rng = np.random.default_rng(0)
    root = tmp_path / "coco"
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(6):
            w, h = 80, 48 + 16 * (i % 2)
            Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)).save(root / split / f"{i}.png")
            images.append({"id": 100 + i, "file_name": f"{i}.png", "width": w, "height": h})
            corner = np.zeros((h, w), np.uint8)
            corner[5:25, 10:50] = 1
            encoded = rle.encode(np.asfortranarray(corner))
            runs = np.diff(np.flatnonzero(np.diff(corner.T.ravel(), prepend=0, append=0)), prepend=0).tolist()
            runs.append(w * h - sum(runs))
            polygon = [[20.0, 10.0, 60.0, 10.0, 60.0, 40.0, 20.0, 40.0]]
            for category, box, segmentation, crowd in [
                (7, [10, 5, 40, 20], {"size": [h, w], "counts": encoded["counts"].decode()}, 0), (3, [20, 10, 40, 30], polygon, 0),
                (7, [10, 5, 40, 20], {"size": [h, w], "counts": runs}, 1), (3, [0, 0, 0.2, 0.2], [[0, 0, 0.2, 0, 0, 0.2]], 0)]:
                annotations.append({"id": len(annotations) + 1, "image_id": 100 + i, "category_id": category, "bbox": box,
                                    "area": box[2] * box[3], "iscrowd": crowd, "segmentation": segmentation})
        images.append({"id": 200, "file_name": "empty.png", "width": 10, "height": 10})
        Image.new("RGB", (10, 10)).save(root / split / "empty.png")
        images.append({"id": 300, "file_name": "broken.png", "width": 80, "height": 48})
        (root / split / "broken.png").write_bytes((root / split / "0.png").read_bytes()[:500])
        images.append({"id": 301, "file_name": "missing.png", "width": 80, "height": 48})
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def change(source, split="train2017", **changes):
    """Edit the first annotation of a split; ... removes a key."""
    path = source / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    content["annotations"][0] = {k: v for k, v in (content["annotations"][0] | changes).items() if v is not ...}
    path.write_text(json.dumps(content))


def test_coco_folder(source, tmp_path, capsys):
    data = vision.open_data("segment", str(source), str(tmp_path / "data"), SIZE, seed=1, n_val=0)
    out = capsys.readouterr().out
    assert "skipped 4 unreadable images, 1 training images without objects, 12 objects without an area or too small at 32 x 32" in out
    assert "missing.png: No such file" in out and "broken.png: " in out
    assert data.classes == ["dog", "cat"] and (len(data.train), len(data.val)) == (6, 7)  # one without objects is evaluated, not learned
    images, counts, labels, masks = data.train.batch([1, 0])
    assert images.shape == (2, 3, SIZE, SIZE) and images.dtype == torch.uint8
    with Image.open(source / "train2017" / "1.png") as picture:
        expected = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(images[0], expected)
    assert counts.tolist() == [2, 2] and labels.tolist() == [[1, 0], [1, 0]]  # without the crowd and the speck
    expected = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    expected[5:20, 8:24] = True  # image 1 has 64 rows and 80 columns: the polygon's 10..40 and 20..60 are 5..20 and 8..24 of 32
    assert torch.equal(masks[0, 1], expected)
    again = vision.open_data("segment", str(source), str(tmp_path / "data"), SIZE, seed=1, n_val=0)
    assert "preparing" not in capsys.readouterr().out and again.state == data.state
    change(source, bbox=[10, 5, 30, 20])
    with pytest.raises(DataError, match="has changed since .* was made of it"):
        vision.open_data("segment", str(source), str(tmp_path / "data"), SIZE, seed=1, n_val=0)
    other = vision.open_data("segment", str(source), str(tmp_path / "other"), SIZE, seed=1, n_val=0)
    assert other.state != data.state and other.state["counts"] == data.state["counts"]  # a box is another
    source.rename(tmp_path / "gone")
    vision.open_data("segment", str(source), str(tmp_path / "other"), SIZE, seed=1, n_val=0)
    (tmp_path / "gone").rename(source)

    boxes = vision.open_data("detect", str(source), str(tmp_path / "data"), SIZE, seed=1, n_val=0)
    _, counts, labels, centred = boxes.train.batch([0])
    assert counts.tolist() == [3]  # a speck has a box, if not a mask
    np.testing.assert_allclose(centred[0, 1], [0.5, 25 / 48, 0.5, 30 / 48], rtol=1e-6)


def test_boxes_without_an_area_are_no_objects_and_sizes_are_checked(source, tmp_path, capsys):
    for box in ([10, 5, 0, 20], [10, 5, -3, 4], [90, 5, 10, 10]):  # none, negative, outside
        change(source, "val2017", bbox=box)
        data = vision.open_data("detect", str(source), str(tmp_path / f"data{box}"), SIZE, seed=1, n_val=0)
        assert len([a for a in data.truth["annotations"] if a["image_id"] == 0]) == 3  # of four
        assert "skipped 4 unreadable images, 1 training images without objects, 1 objects without an area" in capsys.readouterr().out
    change(source, "val2017", bbox=[70, 5, 40, 20])
    path = source / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"][3]["width"] = 1000
    path.write_text(json.dumps(content))
    vision.open_data("detect", str(source), str(tmp_path / "more"), SIZE, seed=1, n_val=0)
    out = capsys.readouterr().out
    assert "1 boxes reach outside their image and are cut there" in out
    assert "3.png: it has (80, 64) pixels, in the annotations (1000, 64) (width, height)" in out


@pytest.mark.parametrize("task, kind", [("detect", "bbox"), ("segment", "segm")])
def test_average_precision_equals_pycocotools_on_its_files(source, tmp_path, capsys, task, kind):
    """On the same annotation file, read by pycocotools alone: identical numbers, crowds and several sizes of error included."""
    data = vision.open_data(task, str(source), str(tmp_path / "data"), SIZE, seed=1, n_val=0)
    path = source / "annotations" / "instances_val2017.json"
    official = COCO(str(path))
    rng = np.random.default_rng(1)
    ids = [100, 101, 102, 103, 104, 105, 200]  # in the order of the file: image i is ours
    theirs, ours = [], []
    for a in official.dataset["annotations"]:
        for _ in range(3):
            x, y, w, h = a["bbox"] + rng.normal(0, 3, 4)
            category = rng.choice([3, 7]) if rng.random() < 0.3 else a["category_id"]
            image = official.imgs[a["image_id"]]
            found = {"image_id": a["image_id"], "category_id": int(category), "score": float(rng.random()),
                     "bbox": [x, y, abs(w) + 1, abs(h) + 1]}
            if kind == "segm":
                moved = np.roll(official.annToMask(a), rng.integers(-4, 5, 2), axis=(0, 1)).astype(bool)
                if not moved.any():
                    continue
                del found["bbox"]
                found["segmentation"] = coco.encode(moved[None])[0]
                assert found["segmentation"]["size"] == [image["height"], image["width"]]
            theirs.append(found)
            ours.append(found | {"image_id": ids.index(a["image_id"]), "category_id": [3, 7].index(category)})
    (tmp_path / "results.json").write_text(json.dumps(theirs))
    evaluation = COCOeval(official, official.loadRes(str(tmp_path / "results.json")), kind)
    evaluation.params.imgIds = ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    expected = dict(zip(("ap", "ap50", "ap75"), 100 * evaluation.stats[:3]))
    got = coco.average_precision(data.truth, copy.deepcopy(ours), kind)
    assert got == pytest.approx(expected, abs=1e-12) and 5 < got["ap"] < got["ap50"] < 95
    evaluation.params.imgIds = ids[:2]
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert coco.average_precision(data.truth, ours, kind, [0, 1])["ap"] == pytest.approx(100 * evaluation.stats[0], abs=1e-12)


def test_average_precision_by_hand():
    """Two objects; found, in order of score: right, wrong, right. Precision 1 up to recall 1/2, then 2/3, at 101 recalls."""
    truth = vision.make_truth([{"image": {"width": 40, "height": 40}, "annotations": [
        {"category_id": 0, "bbox": [x, 0, 10, 10], "area": 100, "iscrowd": 0}]} for x in (0, 20)], ["box"])
    found = [{"image_id": i, "category_id": 0, "bbox": box, "score": score} for i, box, score in
             [(0, [0, 0, 10, 10], 0.9), (0, [30, 30, 5, 5], 0.8), (1, [20, 0, 10, 7], 0.7)]]  # the last with an IoU of 0.7
    half, full = (51 + 50 * 2 / 3) / 101, 51 / 101
    got = coco.average_precision(truth, found, "bbox")
    assert got == pytest.approx({"ap": 100 * (5 * half + 5 * full) / 10, "ap50": 100 * half, "ap75": 100 * full})
    assert coco.average_precision(truth, [], "bbox") == {"ap": 0, "ap50": 0, "ap75": 0}


@pytest.mark.parametrize("changes, words", [
    (dict(category_id=99), r"annotation 1: category_id 99 is not the id of one of the file's 2 categories \(3, 7\)"),
    (dict(image_id=99), "annotation 1: there is no image 99"),
    (dict(segmentation=...), "annotation 1 has no mask .*use the detect task"),
    (dict(segmentation=[]), "annotation 1 has no mask"),
    (dict(segmentation=[[1, 2, 3]]), "annotation 1 has no mask"),
    (dict(segmentation={"size": [9, 9], "counts": [81]}), r"annotation 1 has a mask of \[9, 9\], its image is \[48, 80\]"),
    (dict(bbox=[1, 2, 3]), r"annotation 1: bbox \[1, 2, 3\]"),
    (dict(bbox=...), "something in it has no 'bbox'"),
    (dict(bbox=None), "is not a COCO annotation file"),
])
def test_bad_annotations(source, tmp_path, changes, words):
    change(source, **changes)
    with pytest.raises(DataError, match=words):
        vision.open_data("segment", str(source), str(tmp_path / "data"), SIZE, 1, 0)
    assert not list((tmp_path / "data").glob("vision_*"))


def test_bad_sources(source, tmp_path):
    def problem(task="detect"):
        with pytest.raises(DataError) as e:
            vision.open_data(task, str(source), str(tmp_path / "data"), SIZE, 1, 0)
        return str(e.value)
    val = source / "annotations" / "instances_val2017.json"
    whole = val.read_text()
    change(source, "val2017", segmentation=...)
    vision.open_data("detect", str(source), str(tmp_path / "boxes"), SIZE, 1, 0)  # boxes need no masks
    content = json.loads(whole)
    val.write_text(json.dumps(content | {"annotations": []}))
    assert "no readable image has an object" in problem()
    val.write_text(json.dumps(content | {"categories": content["categories"][::-1] + [{"id": 9, "name": "cow"}]}))
    assert "different categories" in problem()
    val.write_text(whole[:1000])
    assert "is not valid JSON" in problem()
    val.write_text("[]")
    assert "is not a COCO annotation file" in problem()
    (val.parent / "instances_val2014.json").write_text("{}")
    assert "2 files annotations/instances_val*.json" in problem()
    val.unlink(), (val.parent / "instances_val2014.json").unlink()
    assert "0 files annotations/instances_val*.json" in problem()
    source = tmp_path / "nothere"
    assert "nothere: there is nothing of that name" in problem()
    assert "nothere: there is nothing of that name" in problem("classify")


def test_without_pycocotools(monkeypatch):
    monkeypatch.setattr(coco, "rle", None)
    with pytest.raises(DataError, match="pip install -r requirements-extra.txt"):
        vision.open_data("detect", "", "data", SIZE, 1, 4)
    assert len(vision.open_data("classify", "", "data", SIZE, 1, 4).val) == 4  # which needs none


def test_cifar10(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batches = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batches[name] = {b"data": rng.integers(0, 256, (4, 3072), np.uint8), b"labels": rng.integers(0, 10, 4).tolist()}
        (folder / name).write_bytes(pickle.dumps(batches[name]))
    data = vision.open_data("classify", str(tmp_path), str(tmp_path / "data"), 32, 1, 0)
    assert (len(data.train), len(data.val)) == (20, 4) and data.classes[3] == "cat" and data.truth is None
    images, labels = data.train.batch([5, 18])
    assert np.array_equal(images[0], batches["data_batch_2"][b"data"][1].reshape(3, 32, 32))
    assert labels.tolist() == [batches["data_batch_2"][b"labels"][1], batches["data_batch_5"][b"labels"][2]]
    images, labels = data.val.batch([3])
    assert np.array_equal(images[0], batches["test_batch"][b"data"][3].reshape(3, 32, 32))
    larger = vision.open_data("classify", str(tmp_path), str(tmp_path / "data"), 64, 1, 0)
    assert larger.val.batch([0])[0].shape == (1, 3, 64, 64)
    assert abs(larger.val.batch([0])[0].float().mean() - data.val.batch([0])[0].float().mean()) < 2


def test_epochs_of_stored_samples(source, tmp_path):
    data = vision.open_data("detect", str(source), str(tmp_path / "data"), SIZE, 1, 0)
    whole = data.train.order(0, 18, seed=1)
    epochs = [sorted(whole[i:i + 6]) for i in (0, 6, 12)]
    assert epochs == [list(range(6))] * 3 and not np.array_equal(whole[:6], whole[6:12])
    fresh = vision.open_data("detect", str(source), str(tmp_path / "data"), SIZE, 1, 0)
    assert np.array_equal(fresh.train.order(4, 5, seed=1), whole[4:9])  # the same from any start
    assert not np.array_equal(fresh.train.order(0, 18, seed=2), whole)


def test_generated_batches():
    """Boxes and masks of a batch are the samples'; the label to classify is that of the shape of which most is seen."""
    data = {task: vision.open_data(task, "", "data", 48, 5, 6) for task in ("classify", "detect", "segment")}
    indices = data["detect"].train.order(10, 4, seed=5)
    images, counts, labels, boxes = data["detect"].train.batch(indices)
    masks = data["segment"].train.batch(indices)[3]
    answers = data["classify"].train.batch(indices)[1]
    for i, index in enumerate(indices):
        image, true, m = shapes.sample(6, int(index), 48)
        n = counts[i]
        assert n == len(true) and np.array_equal(images[i].permute(1, 2, 0), image) and np.array_equal(labels[i, :n], true)
        assert np.array_equal(masks[i, :n], m) and not masks[i, n:].any()
        assert answers[i] == true[np.argmax([x.sum() for x in m])]
        for box, mask in zip(boxes[i], m):
            y, x = np.nonzero(mask)
            corners = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            np.testing.assert_allclose(48 * np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2]), corners, atol=1e-4)
    other = vision.open_data("detect", "", "data", 48, 7, 6)
    assert torch.equal(other.val.batch([2])[0], data["detect"].val.batch([2])[0])  # validation does not depend on the run's seed
    assert not torch.equal(other.train.batch([2])[0], data["detect"].train.batch([2])[0])
