"""COCO's format (Lin et al. 2014): its annotation files, and its average precision.

A source is a folder as COCO is released: annotations/instances_train*.json and
annotations/instances_val*.json, with boxes and, as polygons or run lengths, masks. The images of
instances_NAME.json are in NAME/, images/NAME/, images/, or in the folder itself: in the one that
holds the most of them. Masks and the metric are pycocotools'.

Every field that is used is checked where its file is read. pycocotools believes what it is given:
run lengths that do not fill a mask leave in it what was in memory, and a polygon's point that is
not a number or far away ends the process.
"""
import contextlib
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from reprlib import repr as shortened

import numpy as np

from data.folders import open_file
from engine.options import DataError

with contextlib.suppress(ImportError):  # data/images.py says what is missing
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

LARGEST = 1e12  # number in an annotation file: NaN, Infinity and 1e999 are not below it
LARGEST_SIDE = 65535  # of an image: its pixels can be counted in 32 bits


def average_precision(truth: dict, detections: list[dict], kind: str,
                      image_ids=None) -> dict[str, float]:
    """AP (mean over IoU 0.50, 0.55, ..., 0.95), AP50 and AP75, in percent; 0 without detections.

    They are over all areas and up to 100 detections an image. truth: a COCO data set. detections:
    image_id, category_id, score, and bbox [x, y, width, height] or a segmentation as RLE, in
    pixels. kind: "bbox" or "segm". image_ids: the images that count (None: all of truth's).
    """
    if not detections:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        coco = index(truth)
        evaluation = COCOeval(coco, coco.loadRes([dict(d) for d in detections]), kind)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.params.areaRng = [[0, math.inf]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75, *_ = 100 * evaluation.stats
    return {"ap": float(ap), "ap50": float(ap50), "ap75": float(ap75)}


def index(dataset: dict) -> "COCO":
    """pycocotools' view of a data set that is in memory, not in a file."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def encode(masks: np.ndarray) -> list[dict]:
    """(n, H, W) bool -> run-length encodings that JSON can hold."""
    encoded = rle.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [as_text(e) for e in encoded]


def as_text(encoded: dict) -> dict:
    return encoded | {"counts": encoded["counts"].decode("ascii")}


def decode_runs(text: str) -> list[int] | None:
    """The numbers in COCO's compressed run lengths; None where the text is garbled.

    A character is 48 + six bits: five of a number, lowest first, and whether more of it follow. The
    number's highest bit is its sign. From the fourth run on it is the difference from the run two
    before.
    """
    runs, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
        value = shift = 0
    return None if shift else runs


def is_number(value, low: float = -LARGEST, high: float = LARGEST) -> bool:
    return type(value) in (int, float) and low <= value <= high


class Annotations:
    """One split of a source, checked.

    classes: names, in the order of category ids. What `samples` leaves out or changes is kept too:
    unreadable: images, each with the reason. turned: how many images were turned as their EXIF
    orientation says. vanished: how many objects have no area, or are too small. cut: how many boxes
    reach outside their image. tiny: how many are narrower than a pixel. records: of the validation
    images, each with its annotations as `average_precision` takes them, in pixels of the original,
    without those that have no area in it.
    """

    def __init__(self, source: Path, split: str, masks: bool):
        pattern = f"annotations/instances_{split}*.json"
        found = sorted(source.glob(pattern))
        if len(found) != 1:
            raise DataError(
                f"{source} holds {len(found)} files {pattern}, not one: give --source=FOLDER as "
                "COCO is released, with annotations/instances_train*.json and "
                "annotations/instances_val*.json")
        self.path, = found
        self.split, self.masks = split, masks
        self.unreadable, self.records = [], []
        self.turned = self.vanished = self.cut = self.tiny = 0
        content = self._read()
        self.images = self._by_id(content, "images")
        self.categories = self._by_id(content, "categories")
        for image in self.images.values():
            self._check_image(image)
        for category in self.categories.values():
            self._demand(isinstance(category.get("name"), str), "category", category, "name",
                         "a text")
        for annotation in self._by_id(content, "annotations").values():
            self._check_annotation(annotation)
            if masks:
                self._check_mask(annotation)
        self.coco = index(content)
        self.ids = sorted(self.categories)
        self.classes = [self.categories[i]["name"] for i in self.ids]
        self.folder = self._folder(source)

    def _read(self):
        try:
            with open_file(self.path) as file:
                return json.load(file)  # finds out which UTF it is
        except OSError as e:
            raise DataError(f"cannot read {self.path}: {e.strerror}") from None
        except (ValueError, RecursionError) as e:
            raise DataError(f"{self.path} is not valid JSON in UTF-8 ({e}): convert it, or "
                            "download it again") from None

    def _by_id(self, content, kind: str) -> dict[int, dict]:
        """The records of one of the file's lists."""
        records = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise DataError(f"{self.path} is not a COCO annotation file: it has no list of {kind}")
        by_id = {}
        for record in records:
            key = record.get("id") if isinstance(record, dict) else None
            if type(key) is not int:
                raise DataError(f"{self.path}: {shortened(record)}, one of the {kind}, has no id "
                                "that is a whole number")
            if key in by_id:
                raise DataError(f"{self.path}: two of the {kind} have the id {key}")
            by_id[key] = record
        return by_id

    def _demand(self, sound: bool, kind, record, field, expected):
        """Raises DataError unless a record's field is sound."""
        if not sound:
            value = shortened(record[field]) if field in record else "(missing)"
            raise DataError(f"{self.path}: {kind} {record['id']}: {field} {value} is not "
                            f"{expected}")

    def _check_image(self, image: dict):
        for field in "width", "height":
            side = image.get(field)
            self._demand(type(side) is int and 1 <= side <= LARGEST_SIDE, "image", image, field,
                         f"a whole number from 1 to {LARGEST_SIDE}")
        # Links are followed: who owns the disk made them. A name comes from whoever made the file.
        name = image.get("file_name")
        path = PurePath(name if isinstance(name, str) else "")
        self._demand(path.name and not path.anchor and ".." not in path.parts, "image", image,
                     "file_name", "a name inside the folder of images")

    def _check_annotation(self, a: dict):
        for field, kind in ("category_id", "categories"), ("image_id", "images"):
            records = getattr(self, kind)
            if type(a.get(field)) is not int or a[field] not in records:
                known = shortened(tuple(sorted(records)))
                self._demand(False, "annotation", a, field,
                             f"the id of one of the file's {len(records)} {kind} {known}")
        box = a.get("bbox")
        self._demand(isinstance(box, list) and len(box) == 4 and all(map(is_number, box)),
                     "annotation", a, "bbox", "four finite numbers: x, y, width, height")
        self._demand(is_number(a.get("area", 0), low=0), "annotation", a, "area",
                     "a finite number of at least 0")
        self._demand(a.get("iscrowd", 0) in (0, 1), "annotation", a, "iscrowd", "0 or 1")

    def _check_mask(self, a: dict):
        """Make sure of polygons; leave run lengths of both forms as pycocotools' own."""
        image = self.images[a["image_id"]]
        h, w = image["height"], image["width"]
        shape = a.get("segmentation")
        if isinstance(shape, dict):
            self._demand(shape.get("size") == [h, w], "annotation", a, "segmentation",
                         f"a mask of its image, whose size is {[h, w]} (height, width)")
            runs = shape.get("counts")
            if isinstance(runs, str):
                runs = decode_runs(runs)
            whole = isinstance(runs, list) and all(type(n) is int and n >= 0 for n in runs)
            self._demand(whole and sum(runs) == h * w, "annotation", a, "segmentation",
                         f"a mask whose run lengths, none negative, sum to {h} x {w}")
            a["segmentation"] = rle.frPyObjects({"size": [h, w], "counts": runs}, h, w)
            return
        polygons = shape if isinstance(shape, list) else []
        if not polygons or not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0
                                   for p in polygons):
            raise DataError(f"{self.path}: annotation {a['id']} has no mask (segmentation: "
                            "polygons or run lengths): use the detect task, which needs none")
        for polygon in polygons:
            across = all(is_number(x, -w, 2 * w) for x in polygon[::2])
            down = all(is_number(y, -h, 2 * h) for y in polygon[1::2])
            self._demand(across and down, "annotation", a, "segmentation",
                         f"polygons in or near their image of {w} x {h} pixels")

    def _folder(self, source: Path) -> Path:
        name = self.path.stem.removeprefix("instances_")
        images = source / "images"
        folders = [source / name, images / name, images, source]

        def held(folder: Path) -> int:
            return sum(os.path.isfile(folder / i["file_name"]) for i in self.images.values())

        return max(folders, key=held)

    def files(self) -> set[Path]:
        return {self.folder / image["file_name"] for image in self.images.values()}

    def samples(self, size: int) -> Iterator[tuple]:
        """(image, labels, boxes, masks) of each readable image, squeezed to a square.

        image: (size, size, 3) uint8. labels: (n,) int64. boxes: (n, 4) float32, centre, width and
        height in units of the image. masks: (n, size, size) bool or None. They leave out crowds
        and objects that vanish.
        """
        from PIL.Image import DecompressionBombError

        for image in self.images.values():
            path = self.folder / image["file_name"]
            try:
                pixels, turned = read_image(path, (image["width"], image["height"]), size)
            # What Pillow raises for files that are missing, cut off, no images or too large.
            except (OSError, EOFError, SyntaxError, ValueError, RuntimeError,
                    DecompressionBombError) as e:
                self.unreadable.append(f"{path}: {getattr(e, 'strerror', None) or e}")
                continue
            self.turned += turned
            labels, boxes, masks, record = self._objects(image, size)
            if self.split == "val":
                self.records.append(record)  # also without objects: a model can be mistaken
            elif not len(labels):
                continue  # an image without objects has nothing to teach
            yield pixels, labels, boxes, masks

    def _objects(self, image: dict, size: int) -> tuple:
        labels, boxes, masks, annotations = [], [], [], []
        w, h = image["width"], image["height"]
        sides = np.array([w, h, w, h])
        for a in self.coco.imgToAnns[image["id"]]:
            x, y, width, height = a["bbox"]
            corners = np.array([x, y, x + width, y + height])
            outside = (corners < -1) | (corners > sides + 1)
            self.cut += int(outside.any())
            left, top, right, bottom = np.clip(corners / sides, 0, 1)
            if right <= left or bottom <= top:
                self.vanished += 1
                continue
            self.tiny += int(min(width, height) < 1)
            known = {"category_id": self.ids.index(a["category_id"]), "bbox": a["bbox"],
                     "area": a.get("area", width * height), "iscrowd": int(a.get("iscrowd", 0))}
            annotations.append(known)
            if self.masks:
                known["segmentation"] = as_text(self.coco.annToRLE(a))
            if known["iscrowd"]:
                continue
            if self.masks:
                mask = shrink(rle.decode(known["segmentation"]), size)
                if not mask.any():
                    self.vanished += 1
                    continue
                masks.append(mask)
            labels.append(known["category_id"])
            boxes.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        masks = np.array(masks, bool).reshape(-1, size, size) if self.masks else None
        record = {"image": {"width": w, "height": h}, "annotations": annotations}
        return np.array(labels, np.int64), boxes, masks, record


def read_image(path: Path, sides: tuple[int, int], size: int) -> tuple[np.ndarray, bool]:
    """-> (an image file as (size, size, 3) uint8, whether its EXIF orientation turned it).

    sides: its width and height as the annotations have them. A camera that is held upright stores
    a picture that lies and the orientation, which programs that show it apply: so it is applied
    unless only the picture as stored has these sides. Raises what Pillow does, and ValueError.
    """
    from PIL import ExifTags, Image, ImageOps

    with open_file(path) as opened, Image.open(opened) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.size != sides:
            picture = file
        if picture.size != sides:
            raise ValueError(f"it has {picture.size} pixels, in the annotations {sides} "
                             "(width, height)")
        bits = getattr(file, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))  # of a TIFF
        if picture.mode in ("I", "F") or 12 in bits:
            raise ValueError(f"its values have 12 or 32 bits (Pillow's mode {picture.mode}): which "
                             "of them is white is not known. Save it with 8 or 16 bits")
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        small = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
    return np.asarray(small), picture is not file and orientation != 1


def shrink(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask (H, W) -> (size, size) bool: the pixels of which it covers at least half."""
    from PIL import Image

    image = Image.fromarray(mask * np.uint8(255)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(image) >= 128
