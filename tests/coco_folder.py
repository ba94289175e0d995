"""A small COCO folder for tests, and ways to change it."""
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from data import images

SIZE = 32
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def make(root: Path) -> Path:
    """Images that are not square, with polygons, both run-length forms, a crowd and a speck.

    One image has no objects, one is broken, one is missing.
    """
    rng = np.random.default_rng(0)
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        records, annotations = [], []
        for i in range(6):
            w, h = 80, 48 + 16 * (i % 2)
            pixels = rng.integers(0, 255, (h, w, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            records.append({"id": 100 + i, "file_name": f"{i}.png", "width": w, "height": h})
            corner = np.zeros((h, w), np.uint8)
            corner[5:25, 10:50] = 1
            text = rle.encode(np.asfortranarray(corner))["counts"].decode()
            changes = np.flatnonzero(np.diff(corner.T.ravel(), prepend=0, append=0))
            runs = np.diff(changes, prepend=0).tolist()
            runs.append(w * h - sum(runs))
            polygon = [[20.0, 10.0, 60.0, 10.0, 60.0, 40.0, 20.0, 40.0]]
            for category, box, segmentation, crowd in [
                    (7, [10, 5, 40, 20], {"size": [h, w], "counts": text}, 0),
                    (3, [20, 10, 40, 30], polygon, 0),
                    (7, [10, 5, 40, 20], {"size": [h, w], "counts": runs}, 1),
                    (3, [0, 0, 0.2, 0.2], [[0, 0, 0.2, 0, 0, 0.2]], 0)]:
                annotations.append({
                    "id": len(annotations) + 1, "image_id": 100 + i, "category_id": category,
                    "bbox": box, "area": box[2] * box[3], "iscrowd": crowd,
                    "segmentation": segmentation})
        records.append({"id": 200, "file_name": "empty.png", "width": 10, "height": 10})
        Image.new("RGB", (10, 10)).save(root / split / "empty.png")
        records.append({"id": 300, "file_name": "broken.png", "width": 80, "height": 48})
        whole = (root / split / "0.png").read_bytes()
        (root / split / "broken.png").write_bytes(whole[:500])
        records.append({"id": 301, "file_name": "missing.png", "width": 80, "height": 48})
        write(root, split, {"images": records, "annotations": annotations,
                            "categories": CATEGORIES})
    return root


def file_of(root: Path, split: str = "train2017") -> Path:
    return root / "annotations" / f"instances_{split}.json"


def read(root: Path, split: str = "train2017") -> dict:
    return json.loads(file_of(root, split).read_text())


def write(root: Path, split: str, content):
    file_of(root, split).parent.mkdir(exist_ok=True)
    file_of(root, split).write_text(json.dumps(content))


def change(root: Path, split: str = "train2017", kind: str = "annotations", at: int = 0, **fields):
    """Edit a record of a split, the first annotation unless said; ... removes a field."""
    content = read(root, split)
    record = content[kind][at] | fields
    content[kind][at] = {name: value for name, value in record.items() if value is not ...}
    write(root, split, content)


def prepared(root: Path, folder: Path, task: str = "detect") -> images.Data:
    return images.open_data(task, str(root), str(folder), SIZE, seed=1, n_val=0)
