"""COCO files with mistakes: one line that names the file, the record, the field and its value."""
import json

import pytest

EXTRA = "pip install -r requirements-extra.txt"
pytest.importorskip("PIL", reason=EXTRA)
pytest.importorskip("pycocotools", reason=EXTRA)

import coco_folder  # noqa: E402
from coco_folder import change, prepared  # noqa: E402
from engine.options import DataError  # noqa: E402

# From pycocotools with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def source(tmp_path):
    return coco_folder.make(tmp_path / "coco")


def runs(counts) -> dict:
    return {"segmentation": {"size": [48, 80], "counts": counts}}


NO_RUNS = r"annotation 1: segmentation .* is not a mask whose run lengths, .* sum to 48 x 80"
NO_BOX = "annotation 1: bbox .* is not four finite numbers: x, y, width, height"
NO_AREA = "annotation 1: area .* is not a finite number of at least 0"
FAR = "annotation 1: segmentation .* is not polygons in or near their image of 80 x 48 pixels"


@pytest.mark.parametrize("changes, words", [
    (dict(category_id=99), r"annotation 1: category_id 99 is not the id of one of the file's "
                           r"2 categories \(3, 7\)"),
    (dict(category_id=True), "annotation 1: category_id True is not the id"),
    (dict(category_id=[7]), r"annotation 1: category_id \[7\] is not the id"),
    (dict(image_id=99), r"annotation 1: image_id 99 is not the id of one of the file's 9 images"),
    (dict(image_id=...), r"annotation 1: image_id \(missing\) is not the id"),
    (dict(bbox=[1, 2, 3]), r"annotation 1: bbox \[1, 2, 3\]"),
    (dict(bbox=...), r"annotation 1: bbox \(missing\)"),
    (dict(bbox=None), NO_BOX),
    (dict(bbox=[1, 2, 3, float("nan")]), NO_BOX),
    (dict(bbox=[1, 2, float("inf"), 4]), NO_BOX),
    (dict(bbox=[1, 2, 10**400, 4]), NO_BOX),
    (dict(bbox=[1, 2, "3", 4]), NO_BOX),
    (dict(bbox=[1, 2, None, 4]), NO_BOX),
    (dict(area=None), NO_AREA),
    (dict(area="800"), NO_AREA),
    (dict(area=-1), NO_AREA),
    (dict(area=float("nan")), NO_AREA),
    (dict(iscrowd=None), "annotation 1: iscrowd None is not 0 or 1"),
    (dict(iscrowd="0"), "annotation 1: iscrowd '0' is not 0 or 1"),
    (dict(iscrowd=2), "annotation 1: iscrowd 2 is not 0 or 1"),
    (dict(segmentation=...), "annotation 1 has no mask .*use the detect task"),
    (dict(segmentation=[]), "annotation 1 has no mask"),
    (dict(segmentation=[[1, 2, 3]]), "annotation 1 has no mask"),
    (dict(segmentation=[[1, 2, 30, 40, 5, float("nan")]]), FAR),
    (dict(segmentation=[[1, 2, 30, 40, 5, None]]), FAR),
    (dict(segmentation=[[1, 2, 30, 40, 5, "6"]]), FAR),
    (dict(segmentation=[[1, 2, 30, 40, 1e9, 6]]), FAR),
    (dict(segmentation=[[1, 2, 30, 40, 5, -49]]), FAR),
    (dict(segmentation={"size": [9, 9], "counts": [81]}),
     r"'size': \[9, 9\]} is not a mask of its image, whose size is \[48, 80\]"),
    (dict(segmentation={"counts": [3840]}), "is not a mask of its image"),
    (runs([10, 20]), NO_RUNS),
    (runs([]), NO_RUNS),
    (runs(""), NO_RUNS),
    (runs(None), NO_RUNS),
    (runs([10, 2000000]), NO_RUNS),
    (runs([10, -5, 3835]), NO_RUNS),
    (runs([10, 2.0, 3828]), NO_RUNS),
    (runs([10, True, 3829]), NO_RUNS),
    (runs("garbage~~~~"), NO_RUNS),
    (runs("PPo"), NO_RUNS),  # ends within a number
    (runs("o" * 50 + "0"), NO_RUNS),
    (runs("\u00e9"), NO_RUNS),
])
def test_bad_annotations(source, tmp_path, changes, words):
    change(source, **changes)
    with pytest.raises(DataError, match=f"instances_train2017.json: .*{words}"):
        prepared(source, tmp_path / "data", "segment")
    assert not list((tmp_path / "data").glob("vision_*"))


@pytest.mark.parametrize("kind, changes, words", [
    ("images", dict(width=0), "image 100: width 0 is not a whole number from 1 to 65535"),
    ("images", dict(height="48"), "image 100: height '48' is not a whole number"),
    ("images", dict(height=48.5), "image 100: height 48.5 is not a whole number"),
    ("images", dict(width=...), r"image 100: width \(missing\) is not a whole number"),
    ("images", dict(file_name="../../0.png"), "image 100: file_name '../../0.png' is not a name"),
    ("images", dict(file_name="a/../0.png"), "image 100: file_name 'a/../0.png' is not a name"),
    ("images", dict(file_name="/0.png"), "image 100: file_name '/0.png' is not a name inside"),
    ("images", dict(file_name=""), "image 100: file_name '' is not a name inside the folder"),
    ("images", dict(file_name=7), "image 100: file_name 7 is not a name inside the folder"),
    ("images", dict(id=101), "two of the images have the id 101"),
    ("images", dict(id="100"), "one of the images, has no id that is a whole number"),
    ("categories", dict(id=3), "two of the categories have the id 3"),
    ("categories", dict(id=True), "one of the categories, has no id that is a whole number"),
    ("categories", dict(name=None), "category 7: name None is not a text"),
    ("annotations", dict(id=2), "two of the annotations have the id 2"),
    ("annotations", dict(id=...), "one of the annotations, has no id that is a whole number"),
])
def test_bad_records(source, tmp_path, kind, changes, words):
    change(source, "train2017", kind, **changes)
    with pytest.raises(DataError, match=words):
        prepared(source, tmp_path / "data")


@pytest.mark.parametrize("content, words", [
    (b"[]", "is not a COCO annotation file: it has no list of images"),
    (b'{"images": {}}', "it has no list of images"),
    (b'{"images": [], "categories": [], "annotations": null}', "it has no list of annotations"),
    (b'{"images": ["a"]}', "'a', one of the images, has no id"),
    ('{"images": ["\u00e9"]}'.encode("latin-1"), "is not valid JSON in UTF-8 .*: convert it"),
    (b"[" * 100000, "is not valid JSON"),
    (b"9" * 5000, "is not valid JSON"),
    (b'{"images": [', "is not valid JSON"),
])
def test_files_of_other_content(source, tmp_path, content, words):
    coco_folder.file_of(source).write_bytes(content)
    with pytest.raises(DataError, match=words):
        prepared(source, tmp_path / "data")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_are_read(source, tmp_path, encoding):
    path = coco_folder.file_of(source)
    expected = prepared(source, tmp_path / "data")
    path.write_text(path.read_text(), encoding=encoding)
    assert prepared(source, tmp_path / "other").state == expected.state


def test_bad_sources(source, tmp_path):
    def problem(task="detect"):
        with pytest.raises(DataError) as e:
            prepared(source, tmp_path / "data", task)
        return str(e.value)
    val = coco_folder.file_of(source, "val2017")
    whole = val.read_text()
    change(source, "val2017", segmentation=...)
    prepared(source, tmp_path / "boxes")  # boxes need no masks
    content = json.loads(whole)
    val.write_text(json.dumps(content | {"annotations": []}))
    assert "no readable image has an object" in problem()
    more = content["categories"][::-1] + [{"id": 9, "name": "cow"}]
    val.write_text(json.dumps(content | {"categories": more}))
    assert "different categories" in problem()
    val.write_text(whole[:1000])
    assert "is not valid JSON" in problem()
    val.write_text("[]")
    assert "is not a COCO annotation file" in problem()
    (val.parent / "instances_val2014.json").write_text("{}")
    assert "2 files annotations/instances_val*.json" in problem()
    val.unlink()
    (val.parent / "instances_val2014.json").unlink()
    assert "0 files annotations/instances_val*.json" in problem()
    source = tmp_path / "nothere"
    assert "nothere: there is nothing of that name" in problem()
    assert "nothere: there is nothing of that name" in problem("classify")
