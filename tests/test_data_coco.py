"""COCO's files against pycocotools, its average precision, and files that are not in order."""
import copy
import json
import os
import signal
import struct
import sys

import numpy as np
import pytest
import torch

EXTRA = "pip install -r requirements-extra.txt"
Image = pytest.importorskip("PIL.Image", reason=EXTRA)
pytest.importorskip("pycocotools", reason=EXTRA)

from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

import coco_folder  # noqa: E402
from coco_folder import SIZE, change, prepared  # noqa: E402
from data import coco, images  # noqa: E402
from engine.options import DataError  # noqa: E402

# From pycocotools with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def source(tmp_path):
    return coco_folder.make(tmp_path / "coco")


def test_coco_folder(source, tmp_path, capsys):
    data = prepared(source, tmp_path / "data", "segment")
    out = capsys.readouterr().out
    assert ("skipped 4 unreadable images, 1 training images without objects, "
            "12 objects without an area or too small at 32 x 32") in out
    assert "missing.png: No such file" in out and "broken.png: " in out
    assert data.classes == ["dog", "cat"]
    assert (len(data.train), len(data.val)) == (6, 7)  # one has no objects: evaluated, not learned
    batch, counts, labels, masks = data.train.batch([1, 0])
    assert batch.shape == (2, 3, SIZE, SIZE) and batch.dtype == torch.uint8
    with Image.open(source / "train2017" / "1.png") as picture:
        expected = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    assert np.array_equal(batch[0], expected.transpose(2, 0, 1))
    assert counts.tolist() == [2, 2]  # without the crowd and the speck
    assert labels.tolist() == [[1, 0], [1, 0]]
    # Image 1 has 64 rows and 80 columns: the polygon's 10..40 and 20..60 are 5..20 and 8..24 of 32.
    expected = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    expected[5:20, 8:24] = True
    assert torch.equal(masks[0, 1], expected)
    again = prepared(source, tmp_path / "data", "segment")
    assert "preparing" not in capsys.readouterr().out and again.state == data.state
    change(source, bbox=[10, 5, 30, 20])
    with pytest.raises(DataError, match="has changed since .* was made of it"):
        prepared(source, tmp_path / "data", "segment")
    other = prepared(source, tmp_path / "other", "segment")
    assert other.state != data.state  # a box is another
    assert other.state["counts"] == data.state["counts"]
    source.rename(tmp_path / "gone")
    prepared(source, tmp_path / "other", "segment")
    (tmp_path / "gone").rename(source)

    boxes = prepared(source, tmp_path / "data")
    _, counts, labels, centred = boxes.train.batch([0])
    assert counts.tolist() == [3]  # a speck has a box, if not a mask
    np.testing.assert_allclose(centred[0, 1], [0.5, 25 / 48, 0.5, 30 / 48], rtol=1e-6)


def test_boxes_without_an_area_are_no_objects_and_sizes_are_checked(source, tmp_path, capsys):
    for box in ([10, 5, 0, 20], [10, 5, -3, 4], [90, 5, 10, 10]):  # none, negative, outside
        change(source, "val2017", bbox=box)
        data = prepared(source, tmp_path / f"data{box}")
        assert len([a for a in data.truth["annotations"] if a["image_id"] == 0]) == 3  # of four
        assert ("skipped 4 unreadable images, 1 training images without objects, "
                "1 objects without an area") in capsys.readouterr().out
    change(source, "val2017", bbox=[70, 5, 40, 20])
    change(source, "val2017", "images", 3, width=1000)
    prepared(source, tmp_path / "more")
    out = capsys.readouterr().out
    assert "1 boxes reach outside their image and are cut there" in out
    assert "11 boxes are narrower than a pixel: are they in pixels?" in out
    assert "3.png: it has (80, 64) pixels, in the annotations (1000, 64) (width, height)" in out


@pytest.mark.parametrize("task, kind", [("detect", "bbox"), ("segment", "segm")])
def test_average_precision_equals_pycocotools_on_its_files(source, tmp_path, capsys, task, kind):
    """On the same annotation file, read by pycocotools alone: identical numbers.

    Crowds and several sizes of error are among the detections.
    """
    data = prepared(source, tmp_path / "data", task)
    official = COCO(str(coco_folder.file_of(source, "val2017")))
    rng = np.random.default_rng(1)
    ids = [100, 101, 102, 103, 104, 105, 200]  # in the order of the file: image i is ours
    theirs, ours = [], []
    for a in official.dataset["annotations"]:
        for _ in range(3):
            x, y, w, h = a["bbox"] + rng.normal(0, 3, 4)
            category = rng.choice([3, 7]) if rng.random() < 0.3 else a["category_id"]
            image = official.imgs[a["image_id"]]
            found = {"image_id": a["image_id"], "category_id": int(category),
                     "score": float(rng.random()), "bbox": [x, y, abs(w) + 1, abs(h) + 1]}
            if kind == "segm":
                shift = rng.integers(-4, 5, 2)
                moved = np.roll(official.annToMask(a), shift, axis=(0, 1)).astype(bool)
                if not moved.any():
                    continue
                del found["bbox"]
                found["segmentation"] = coco.encode(moved[None])[0]
                assert found["segmentation"]["size"] == [image["height"], image["width"]]
            theirs.append(found)
            ours.append(found | {"image_id": ids.index(a["image_id"]),
                                 "category_id": [3, 7].index(category)})
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
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    two = coco.average_precision(data.truth, ours, kind, [0, 1])
    assert two["ap"] == pytest.approx(100 * evaluation.stats[0], abs=1e-12)


def test_average_precision_by_hand():
    """Two objects; found, in order of score: right, wrong, right.

    The precision is 1 up to recall 1/2, then 2/3, at 101 recalls.
    """
    truth = images.make_truth([{"image": {"width": 40, "height": 40}, "annotations": [
        {"category_id": 0, "bbox": [x, 0, 10, 10], "area": 100, "iscrowd": 0}]}
        for x in (0, 20)], ["box"])
    found = [{"image_id": i, "category_id": 0, "bbox": box, "score": score} for i, box, score in
             [(0, [0, 0, 10, 10], 0.9), (0, [30, 30, 5, 5], 0.8),
              (1, [20, 0, 10, 7], 0.7)]]  # the last with an IoU of 0.7
    half, full = (51 + 50 * 2 / 3) / 101, 51 / 101
    got = coco.average_precision(truth, found, "bbox")
    assert got == pytest.approx({"ap": 100 * (5 * half + 5 * full) / 10, "ap50": 100 * half,
                                 "ap75": 100 * full})
    assert coco.average_precision(truth, [], "bbox") == {"ap": 0, "ap50": 0, "ap75": 0}


@pytest.mark.slow
def test_compressed_runs_are_those_of_pycocotools():
    """Valid texts give the mask that pycocotools decodes; others, changed at random, no mask."""
    rng = np.random.default_rng(0)
    refused = 0
    for height, width in [(1, 1), (7, 5), (60, 90), (900, 700)]:
        for share in (0, 0.001, 0.5, 1):
            mask = (rng.random((height, width)) < share).astype(np.uint8)
            text = coco.rle.encode(np.asfortranarray(mask))["counts"].decode()
            numbers = coco.decode_runs(text)
            values = np.arange(len(numbers)) % 2
            assert np.array_equal(np.repeat(values, numbers).reshape(width, height).T, mask)
            for _ in range(20):
                changed = list(text)
                changed[rng.integers(len(text))] = chr(rng.integers(40, 120))
                numbers = coco.decode_runs("".join(changed))
                sound = numbers is not None and min(numbers) >= 0
                refused += not sound or sum(numbers) != height * width
    assert refused > 200
    for text in ("~", "p", " ", "o" * 7 + "0", "0o"):  # other characters, too long, cut off
        assert coco.decode_runs(text) is None


@pytest.fixture
def soon():
    """What waits for ever fails after 20 seconds."""
    def late(*_):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_pipes_are_not_waited_for(source, tmp_path, capsys, soon):
    (source / "train2017" / "0.png").unlink()
    os.mkfifo(source / "train2017" / "0.png")
    prepared(source, tmp_path / "data")
    assert "train2017/0.png: a pipe or a device, not a file" in capsys.readouterr().out
    coco_folder.file_of(source).unlink()
    os.mkfifo(coco_folder.file_of(source))
    with pytest.raises(DataError, match="instances_train2017.json: a pipe or a device"):
        prepared(source, tmp_path / "other")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="there is nothing of that name to read"):
        prepared(tmp_path / "pipe", tmp_path / "other")


def test_links_are_followed(source, tmp_path):
    """They are made by whoever owns the disk; a name in a file comes from anywhere."""
    expected = prepared(source, tmp_path / "data").state
    (source / "train2017").rename(tmp_path / "elsewhere")
    (source / "train2017").symlink_to(tmp_path / "elsewhere")
    assert prepared(source, tmp_path / "other").state == expected


def test_the_folder_that_holds_most_images_is_read(source, tmp_path, capsys):
    expected = prepared(source, tmp_path / "data").state["sha256"]
    (source / "images").mkdir()
    (source / "train2017").rename(source / "images" / "train2017")
    for folder in (source, source / "train2017"):  # a file of the first name is elsewhere too
        folder.mkdir(exist_ok=True)
        (folder / "0.png").write_text("")
    assert prepared(source, tmp_path / "other").state["sha256"] == expected
    (source / "images" / "train2017" / "0.png").unlink()
    assert prepared(source, tmp_path / "more").state["counts"]["train"] == 5
    assert "skipped 5 unreadable images" in capsys.readouterr().out


def upright(source, tmp_path, orientation: int, sides: tuple[int, int]) -> np.ndarray:
    """Store the first image with an EXIF orientation; -> how it is read where it has `sides`."""
    path = source / "train2017" / "0.png"
    with Image.open(path) as file:
        exif = file.getexif()
        exif[0x112] = orientation
        file.save(path, exif=exif)
    change(source, "train2017", "images", width=sides[0], height=sides[1])
    data = prepared(source, tmp_path / f"data{orientation}{sides}")
    return data.train.batch([0])[0][0].numpy().transpose(1, 2, 0)


def test_orientation(source, tmp_path, capsys):
    def small(image):
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))

    with Image.open(source / "train2017" / "0.png") as file:
        stored = file.convert("RGB")  # 80 x 48
    turned = stored.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(upright(source, tmp_path, 6, (48, 80)), small(turned))
    assert "1 images are turned as their EXIF orientation says" in capsys.readouterr().out
    assert np.array_equal(upright(source, tmp_path, 6, (80, 48)), small(stored))
    assert "are turned" not in capsys.readouterr().out
    flipped = stored.transpose(Image.Transpose.ROTATE_180)  # both have these sides
    assert np.array_equal(upright(source, tmp_path, 3, (80, 48)), small(flipped))
    assert np.array_equal(upright(source, tmp_path, 1, (80, 48)), small(stored))


def test_pixels_of_other_types(tmp_path):
    """Sixteen bits become eight; 32 are refused; what Pillow converts rightly stays as it does."""
    ramp = np.linspace(0, 65535, 80 * 48).reshape(48, 80)
    eight = Image.fromarray((ramp / 257).astype(np.uint8))
    expected = np.asarray(eight.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(">u2")).save(tmp_path / "grey.tif")
    for name in ("grey.png", "grey.tif"):
        pixels, _ = coco.read_image(tmp_path / name, (80, 48), SIZE)
        assert abs(pixels.astype(int) - expected).max() <= 1
    for mode, kind in ("F", np.float32), ("I", np.int32):
        Image.fromarray(ramp.astype(kind)).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match=f"its values have 12 or 32 bits .*mode {mode}"):
            coco.read_image(tmp_path / "x.tif", (80, 48), SIZE)
    tags = [(256, 80), (257, 48), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 48),
            (279, 120 * 48)]  # sides, bits, compression, ...: a TIFF with 12 bits a pixel
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "x.tif").write_bytes(header + b"\xff" * 120 * 48)
    with pytest.raises(ValueError, match="its values have 12 or 32 bits"):
        coco.read_image(tmp_path / "x.tif", (80, 48), SIZE)
    for mode in ("P", "LA", "1", "CMYK", "RGBA", "L"):
        picture = eight.convert("RGB").convert(mode)
        path = tmp_path / f"{mode}.tif"
        picture.save(path)
        expected = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        assert np.array_equal(coco.read_image(path, (80, 48), SIZE)[0], np.asarray(expected))


def test_very_large_images_are_skipped(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # an error from twice as many on
    with pytest.warns(Image.DecompressionBombWarning):
        data = prepared(source, tmp_path / "data")
    assert (len(data.train), len(data.val)) == (3, 4)  # those of 80 x 48
    out = capsys.readouterr().out
    assert "skipped 10 unreadable images" in out
    assert "1.png: Image size (5120 pixels) exceeds" in out


def test_reasons_are_given_when_no_image_can_be_read(source, tmp_path, capsys):
    for path in (source / "val2017").iterdir():
        path.write_text("text")
    with pytest.raises(DataError, match="instances_val2017.json: no readable image has an object "
                                        "that is seen at 32 x 32; 9 of 9 images cannot be read"):
        prepared(source, tmp_path / "data")
    out = capsys.readouterr().out
    assert "cannot read" in out and "val2017/0.png: cannot identify image file" in out
    assert "and 6 more" in out


def test_objects_that_all_vanish_are_an_error(source, tmp_path):
    content = coco_folder.read(source, "val2017")
    specks = [a for a in content["annotations"] if a["area"] < 1]
    coco_folder.write(source, "val2017", content | {"annotations": specks})
    prepared(source, tmp_path / "data", "detect")
    with pytest.raises(DataError, match="no readable image has an object that is seen at 32 x 32"):
        prepared(source, tmp_path / "data", "segment")


def test_images_of_both_splits_are_told(source, tmp_path, capsys):
    prepared(source, tmp_path / "data")
    assert "both splits" not in capsys.readouterr().out
    (source / "images").mkdir()
    for name in ("0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "empty.png"):
        (source / "train2017" / name).rename(source / "images" / name)
        (source / "val2017" / name).unlink()
    prepared(source, tmp_path / "other")
    assert "9 images are in both splits" in capsys.readouterr().out


def test_hidden_files_are_not_read(source, tmp_path):
    """macOS leaves a ._NAME beside each file."""
    hidden = source / "annotations" / "._instances_train2017.json"
    hidden.write_bytes(b"\0\5\x16\7")
    expected = prepared(source, tmp_path / "data").state
    hidden.write_bytes(b"another")
    assert prepared(source, tmp_path / "data").state == expected


def test_without_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(DataError, match="pip install -r requirements-extra.txt"):
        images.open_data("detect", "", "data", SIZE, 1, 4)
    data = images.open_data("classify", "", "data", SIZE, 1, 4)
    assert len(data.val) == 4  # which needs none
