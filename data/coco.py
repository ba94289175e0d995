"""COCO's format (Lin et al. 2014): its annotation files, and its average precision.

A source is a folder as COCO is released: annotations/instances_train*.json and
annotations/instances_val*.json, with boxes and, as polygons or run lengths, masks. The images of
instances_NAME.json are in NAME/, images/NAME/, images/, or in the folder itself. Masks and the
metric are pycocotools'.
"""
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.options import DataError

try:
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    rle = None


def require():
    """Raises DataError where pycocotools is missing."""
    if rle is None:
        raise DataError("detection and segmentation need pycocotools: "
                        "pip install -r requirements-extra.txt")


def average_precision(truth: dict, detections: list[dict], kind: str,
                      image_ids=None) -> dict[str, float]:
    """AP (mean over IoU 0.50, 0.55, ..., 0.95), AP50 and AP75, in percent; 0 without detections.

    They are over all areas and up to 100 detections an image. truth: a COCO data set. detections:
    image_id, category_id, score, and bbox [x, y, width, height] or a segmentation as RLE, in
    pixels. kind: "bbox" or "segm". image_ids: the images that count (None: all of truth's).
    """
    require()
    if not detections:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        coco = index(truth)
        evaluation = COCOeval(coco, coco.loadRes([dict(d) for d in detections]), kind)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    # (IoU threshold, recall, class); -1: a class without objects
    precision = evaluation.eval["precision"][..., 0, -1]

    def mean(p):
        return 100 * float(p[p > -1].mean())

    return {"ap": mean(precision), "ap50": mean(precision[0]), "ap75": mean(precision[5])}


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
    return [e | {"counts": e["counts"].decode("ascii")} for e in encoded]


class Annotations:
    """One split of a source, checked.

    classes: names, in the order of category ids. What `samples` leaves out or changes is kept too:
    unreadable: images, each with the reason. vanished: how many objects have no area, or are too
    small. cut: how many boxes reach outside their image.
    """

    def __init__(self, source: Path, split: str, masks: bool):
        require()
        found = sorted((source / "annotations").glob(f"instances_{split}*.json"))
        if len(found) != 1:
            raise DataError(
                f"{source} holds {len(found)} files annotations/instances_{split}*.json, not one: "
                "give --source=FOLDER as COCO is released, with annotations/instances_train*.json "
                "and annotations/instances_val*.json")
        self.path, = found
        self.source, self.masks = source, masks
        self.unreadable, self.vanished, self.cut = [], 0, 0
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.images = {image["id"]: image for image in content["images"]}
            self.categories = {c["id"]: c["name"] for c in content["categories"]}
            for a in content["annotations"]:
                self._check(a)
            for image in self.images.values():
                if min(image["width"], image["height"]) < 1 \
                        or not isinstance(image["file_name"], str):
                    raise DataError(f"{self.path}: image {image['id']} has no usable width, "
                                    "height or file_name")
        except OSError as e:
            raise DataError(f"cannot read {self.path}: {e.strerror}") from None
        except KeyError as e:
            raise DataError(f"{self.path} is not a COCO annotation file: "
                            f"something in it has no {e.args[0]!r}") from None
        except (TypeError, AttributeError) as e:
            raise DataError(f"{self.path} is not a COCO annotation file: {e}") from None
        except json.JSONDecodeError as e:
            raise DataError(f"{self.path} is not valid JSON ({e}): download it again") from None
        self.coco = index(content)
        self.ids = sorted(self.categories)
        self.classes = [self.categories[i] for i in self.ids]

    def _check(self, a: dict):
        where = f"{self.path}: annotation {a['id']}"
        if a["category_id"] not in self.categories:
            known = ", ".join(map(str, sorted(self.categories)[:5]))
            known += ", ..." if len(self.categories) > 5 else ""
            raise DataError(f"{where}: category_id {a['category_id']} is not the id of one of the "
                            f"file's {len(self.categories)} categories ({known})")
        if a["image_id"] not in self.images:
            raise DataError(f"{where}: there is no image {a['image_id']}")
        if len(a["bbox"]) != 4 or not all(isinstance(v, int | float) for v in a["bbox"]):
            raise DataError(f"{where}: bbox {a['bbox']} is not [x, y, width, height]")
        s = a.get("segmentation")
        if not self.masks or isinstance(s, dict) and {"counts", "size"} <= s.keys():
            return
        polygons = s if isinstance(s, list) else []
        if not polygons or not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0
                                   for p in polygons):
            raise DataError(f"{where} has no mask (segmentation: polygons or run lengths): "
                            "use the detect task, which needs none")

    def samples(self, size: int) -> Iterator[tuple]:
        """(image, labels, boxes, masks, record) of each readable image, squeezed to a square.

        image: (size, size, 3) uint8. labels: (n,) int64. boxes: (n, 4) float32, centre, width and
        height in units of the image. masks: (n, size, size) bool or None. They leave out crowds
        and objects that vanish. record: the image and its annotations as `average_precision` takes
        them, in pixels of the original, without those that have no area in it.
        """
        from PIL import Image

        folder = self._folder()
        for image in self.images.values():
            path, sides = folder / image["file_name"], (image["width"], image["height"])
            try:
                with Image.open(path) as file:
                    if file.size != sides:
                        raise ValueError(f"it has {file.size} pixels, in the annotations {sides} "
                                         "(width, height)")
                    small = file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            # What Pillow raises for files that are missing, cut off or no images.
            except (OSError, SyntaxError, ValueError) as e:
                self.unreadable.append(f"{path}: {getattr(e, 'strerror', None) or e}")
                continue
            yield np.asarray(small), *self._objects(image, size)

    def _folder(self) -> Path:
        name = self.path.stem.removeprefix("instances_")
        first = next((image["file_name"] for image in self.images.values()), "")
        images = self.source / "images"
        folders = [self.source / name, images / name, images, self.source]
        return next((folder for folder in folders if (folder / first).is_file()), folders[0])

    def _objects(self, image: dict, size: int) -> tuple:
        labels, boxes, masks, annotations = [], [], [], []
        w, h = image["width"], image["height"]
        for a in self.coco.imgToAnns[image["id"]]:
            x, y, width, height = a["bbox"]
            self.cut += x < -1 or y < -1 or x + width > w + 1 or y + height > h + 1
            left, right = np.clip([x / w, (x + width) / w], 0, 1)
            top, bottom = np.clip([y / h, (y + height) / h], 0, 1)
            if right <= left or bottom <= top:
                self.vanished += 1
                continue
            known = {"category_id": self.ids.index(a["category_id"]), "bbox": a["bbox"],
                     "area": a.get("area", width * height), "iscrowd": a.get("iscrowd", 0)}
            annotations.append(known)
            if self.masks:
                known["segmentation"] = self._encode(a, h, w)
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
        stacked = np.array(masks, bool).reshape(-1, size, size) if self.masks else None
        record = {"image": {"width": w, "height": h}, "annotations": annotations}
        return (np.array(labels, np.int64), np.array(boxes, np.float32).reshape(-1, 4), stacked,
                record)

    def _encode(self, a: dict, h: int, w: int) -> dict:
        try:
            encoded = self.coco.annToRLE(a)
        except (TypeError, ValueError) as e:
            raise DataError(f"{self.path}: annotation {a['id']} has an unreadable mask: "
                            f"{e}") from None
        if list(encoded["size"]) != [h, w]:
            raise DataError(f"{self.path}: annotation {a['id']} has a mask of {encoded['size']}, "
                            f"its image is {[h, w]} (height, width)")
        counts = encoded["counts"]
        return encoded | {"counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def shrink(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask (H, W) -> (size, size) bool: the pixels of which it covers at least half."""
    from PIL import Image

    image = Image.fromarray(mask * np.uint8(255)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(image) >= 128
