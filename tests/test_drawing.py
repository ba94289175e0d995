"""Drawings of predictions: outlines are where the objects are, in the colour of their class."""
import numpy as np
import pytest

EXTRA = "pip install -r requirements-extra.txt"
for package in ("transformers", "pycocotools", "PIL"):
    pytest.importorskip(package, reason=EXTRA)

from PIL import Image, ImageColor  # noqa: E402

from data import coco, images  # noqa: E402
from vision import drawing  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
COLOURS = [ImageColor.getrgb(colour) for colour in drawing.COLOURS]


def test_boxes_and_masks_are_outlined():
    ground = Image.new("RGB", (200, 100))
    mask = np.zeros((1, 100, 200), bool)
    mask[0, 40:80, 20:60] = True
    objects = [{"category_id": 1, "bbox": [100, 30, 50, 40], "score": 0.5},
               {"category_id": 0, "segmentation": coco.encode(mask)[0]}]
    pixels = np.asarray(drawing.draw(ground, objects, ["a", "b"]))
    assert not np.asarray(ground).any()  # what is drawn on is a copy
    assert tuple(pixels[65, 100]) == tuple(pixels[65, 150]) == tuple(pixels[70, 125]) == COLOURS[1]
    assert not pixels[65, 125].any() and not pixels[90].any()
    assert tuple(pixels[70, 21]) == tuple(pixels[79, 40]) == COLOURS[0]
    inside = np.array(COLOURS[0]) / 4  # a mask is tinted, so that what it covers is seen
    np.testing.assert_allclose(pixels[70, 40], inside, atol=2)
    assert (pixels[32:44, 105:120] == 255).all(axis=-1).any()  # a name


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_the_objects_of_an_image_are_those_of_the_evaluation(task):
    data = images.open_data(task, "", "data", 32, 1, 3)
    targets = data.val.batch(range(3))[1:]
    for i in range(3):
        truth = [a for a in data.truth["annotations"] if a["image_id"] == i]
        drawn = drawing.true_objects(task, [t[i] for t in targets], 96)
        assert [a["category_id"] for a in truth] == [d["category_id"] for d in drawn]
        for a, d in zip(truth, drawn):
            box = d["bbox"] if task == "detect" else coco.rle.toBbox(d["segmentation"])
            np.testing.assert_allclose(box, 3 * np.array(a["bbox"]), atol=1e-4)
            if task == "segment":
                assert coco.rle.area(d["segmentation"]) == 9 * a["area"]
