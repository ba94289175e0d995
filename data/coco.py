"""COCO's format: read its annotation files (boxes, polygons, run-length masks), and its average precision.

Lin et al. 2014. A source is a folder as it is released: annotations/instances_train*.json and annotations/instances_val*.json, and the
images of instances_NAME.json in NAME/, images/NAME/, images/, or the folder itself. Masks and the metric are pycocotools'.
"""
import contextlib
import io
import json
from collections import defaultdict
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
        raise DataError("detection and segmentation need pycocotools: pip install -r requirements-extra.txt")


def average_precision(truth: dict, detections: list[dict], kind: str, image_ids=None) -> dict[str, float]:
    """AP (mean over IoU 0.50, 0.55, ..., 0.95), AP50 and AP75, in percent, all areas, up to 100 detections an image.

    truth: a COCO data set. detections: image_id, category_id, score, and bbox [x, y, width, height] or a segmentation as RLE, in pixels.
    kind: "bbox" or "segm". image_ids: the images that count (None: all of truth's). Without detections the values are 0.
    """
    require()
    if not detections:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([dict(d) for d in detections]), kind)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]  # (IoU threshold, recall, class); -1: a class without objects

    def mean(p):
        return 100 * float(p[p > -1].mean())

    return {"ap": mean(precision), "ap50": mean(precision[0]), "ap75": mean(precision[5])}


def encode(masks: np.ndarray) -> list[dict]:
    """(n, H, W) bool -> run-length encodings that JSON can hold."""
    encoded = rle.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": e["size"], "counts": e["counts"].decode("ascii")} for e in encoded]


class Annotations:
    """One split of a source, checked. `classes`: names in the order of category ids. `unreadable`: images that `samples` left out, each
    with the reason; `vanished`: how many objects it did, because they have no area or are too small; `cut`: boxes that reach outside."""

    def __init__(self, source: Path, split: str, masks: bool):
        require()
        found = sorted((source / "annotations").glob(f"instances_{split}*.json"))
        if len(found) != 1:
            raise DataError(f"{source} holds {len(found)} files annotations/instances_{split}*.json, not one: give --source=FOLDER as COCO "
                            "is released, with annotations/instances_train*.json and annotations/instances_val*.json")
        self.path, self.source, self.masks = found[0], source, masks
        self.unreadable, self.vanished, self.cut = [], 0, 0
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.images = {image["id"]: image for image in content["images"]}
            categories = {category["id"]: category["name"] for category in content["categories"]}
            self.of_image = defaultdict(list)
            for a in content["annotations"]:
                self._check(a, categories)
                self.of_image[a["image_id"]].append(a)
            for image in self.images.values():
                if min(image["width"], image["height"]) < 1 or not isinstance(image["file_name"], str):
                    raise DataError(f"{self.path}: image {image['id']} has no usable width, height or file_name")
        except OSError as e:
            raise DataError(f"cannot read {self.path}: {e.strerror}") from None
        except KeyError as e:
            raise DataError(f"{self.path} is not a COCO annotation file: something in it has no {e.args[0]!r}") from None
        except (TypeError, AttributeError) as e:
            raise DataError(f"{self.path} is not a COCO annotation file: {e}") from None
        except json.JSONDecodeError as e:
            raise DataError(f"{self.path} is not valid JSON ({e}): download it again") from None
        self.ids = sorted(categories)
        self.classes = [categories[i] for i in self.ids]

    def _check(self, a: dict, categories: dict):
        where = f"{self.path}: annotation {a['id']}"
        if a["category_id"] not in categories:
            known = ", ".join(map(str, sorted(categories)[:5])) + (", ..." if len(categories) > 5 else "")
            raise DataError(f"{where}: category_id {a['category_id']} is not the id of one of the file's {len(categories)} categories ({known})")
        if a["image_id"] not in self.images:
            raise DataError(f"{where}: there is no image {a['image_id']}")
        if len(a["bbox"]) != 4 or not all(isinstance(v, int | float) for v in a["bbox"]):
            raise DataError(f"{where}: bbox {a['bbox']} is not [x, y, width, height]")
        if self.masks:
            s = a.get("segmentation")
            polygons = isinstance(s, list) and s and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in s)
            if not polygons and not (isinstance(s, dict) and {"counts", "size"} <= s.keys()):
                raise DataError(f"{where} has no mask (segmentation: polygons or run lengths): use the detect task, which needs none")

    def samples(self, size: int) -> Iterator[tuple]:
        """(image (size, size, 3) uint8, labels, boxes, masks, record) of each readable image, squeezed to a square.

        labels (n,), boxes (n, 4) as centre, width and height in units of the image, masks (n, size, size) bool or None: without
        crowds and objects that vanish. record: the image and its annotations as `average_precision` takes them, in pixels of the original,
        without those that have no area in it.
        """
        from PIL import Image

        folder = self._folder()
        for image in self.images.values():
            try:
                with Image.open(folder / image["file_name"]) as file:
                    if file.size != (image["width"], image["height"]):
                        raise ValueError(f"it has {file.size} pixels, in the annotations {image['width'], image['height']} (width, height)")
                    pixels = np.asarray(file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
            except (OSError, SyntaxError, ValueError) as e:  # what Pillow raises for files that are missing, cut off or no images
                self.unreadable.append(f"{folder / image['file_name']}: {e.strerror if getattr(e, 'strerror', None) else e}")
                continue
            yield pixels, *self._objects(image, size)

    def _folder(self) -> Path:
        name = self.path.stem.removeprefix("instances_")
        first = next((image["file_name"] for image in self.images.values()), "")
        folders = [self.source / name, self.source / "images" / name, self.source / "images", self.source]
        return next((folder for folder in folders if (folder / first).is_file()), folders[0])

    def _objects(self, image: dict, size: int):
        labels, boxes, masks, annotations = [], [], [], []
        w, h = image["width"], image["height"]
        for a in self.of_image[image["id"]]:
            label, crowd = self.ids.index(a["category_id"]), a.get("iscrowd", 0)
            x1, y1, width, height = a["bbox"]
            self.cut += x1 < -1 or y1 < -1 or x1 + width > w + 1 or y1 + height > h + 1
            left, right, top, bottom = *np.clip([x1 / w, (x1 + width) / w], 0, 1), *np.clip([y1 / h, (y1 + height) / h], 0, 1)
            if right <= left or bottom <= top:
                self.vanished += 1
                continue
            annotations.append({"category_id": label, "bbox": a["bbox"], "area": a.get("area", width * height), "iscrowd": crowd})
            if self.masks:
                encoded = self._encode(a, h, w)
                annotations[-1]["segmentation"] = encoded | {"counts": encoded["counts"].decode("ascii")}
            if crowd:
                continue
            mask = shrink(rle.decode(encoded), size) if self.masks else None
            if self.masks and not mask.any():
                self.vanished += 1
                continue
            labels.append(label)
            boxes.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
            masks.append(mask)
        shape = np.stack(masks) if masks and self.masks else np.zeros((0, size, size), bool) if self.masks else None
        record = {"image": {"width": w, "height": h}, "annotations": annotations}
        return np.array(labels, np.int64), np.array(boxes, np.float32).reshape(-1, 4), shape, record

    def _encode(self, a: dict, h: int, w: int) -> dict:
        s = a["segmentation"]
        try:
            if isinstance(s, list):
                return rle.merge(rle.frPyObjects(s, h, w))
            encoded = rle.frPyObjects(s, h, w) if isinstance(s["counts"], list) else s | {"counts": s["counts"].encode("ascii")}
        except (TypeError, ValueError) as e:
            raise DataError(f"{self.path}: annotation {a['id']} has an unreadable mask: {e}") from None
        if list(encoded["size"]) != [h, w]:
            raise DataError(f"{self.path}: annotation {a['id']} has a mask of {encoded['size']}, its image is {[h, w]} (height, width)")
        return encoded


def shrink(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask (H, W) -> (size, size) bool: the pixels of which it covers at least half."""
    from PIL import Image

    return np.asarray(Image.fromarray(mask * np.uint8(255)).resize((size, size), Image.Resampling.BOX)) >= 128
