"""Images for train_vision.py: generated shapes, CIFAR-10 for `classify`, COCO's format for `detect` and `segment`.

    data = open_data("segment", source="coco", data_dir="data", size=64, seed=1, n_val=500)
    images, counts, labels, masks = data.train.batch([3, 1, 4])

A batch is a tuple of tensors, images first, (B, 3, size, size) uint8. classify adds labels (B). The others add counts (B), how many
objects an image has, labels (B, M), padded, and boxes (B, M, 4) as centre x, centre y, width, height in units of the image (detect), or
masks (B, M, size, size) bool (segment). Real data is read once and stored, at the size asked for, in data_dir/vision_<task>_<hash>.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import coco, shapes
from data.archives import DAMAGED
from data.cifar import ARCHIVE as CIFAR10_ARCHIVE
from data.cifar import CLASSES as CIFAR10
from data.cifar import cifar10
from data.folders import ensure
from data.order import Shuffled
from engine.options import DataError

NAMED = 5  # unreadable images that are named; all are counted


@dataclass
class Data:
    """Both splits; `truth` is the validation split as a COCO data set (None for classify), `state` identifies the data."""
    train: "Shapes | Stored"
    val: "Shapes | Stored"
    classes: list[str]
    truth: dict | None
    state: dict


def open_data(task: str, source: str, data_dir: str, size: int, seed: int, n_val: int) -> Data:
    """The data of a task; `source` empty: generated shapes, an endless training split drawn from `seed` and always the same n_val images
    to validate on. Otherwise CIFAR-10's archive or folder (its test batch is the validation split), or a COCO folder. Raises DataError."""
    if task != "classify":
        coco.require()
    if not source:
        val = Shapes(task, size, 0, n_val)
        return Data(Shapes(task, size, seed + 1, None), val, list(shapes.CLASSES), val.truth() if task != "classify" else None,
                    {"task": task, "source": "shapes", "size": size, "n_val": n_val, "classes": list(shapes.CLASSES)})
    folder = prepare(task, Path(source), Path(data_dir), size)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        truth = json.loads((folder / "val.json").read_text()) if task != "classify" else None
        train, val = (Stored(folder, split, task, size, meta["counts"][split]) for split in ("train", "val"))
        changed = stamps(Path(source)) not in ({}, meta["stamps"])  # without the source the prepared folder is enough
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f"{folder} is not a prepared folder ({e}): delete it and prepare it again") from None
    if changed:
        raise DataError(f"{source} has changed since {folder} was made of it: delete {folder} to read it again")
    state = {name: meta[name] for name in ("task", "source", "size", "counts", "classes", "sha256")}
    return Data(train, val, meta["classes"], truth, state)


class Shapes:
    """Generated samples; count None: endless."""

    def __init__(self, task: str, size: int, seed: int, count: int | None):
        self.task, self.size, self.seed, self.count = task, size, seed, count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices) -> tuple[torch.Tensor, ...]:
        images, labels, masks = zip(*(shapes.sample(self.seed, int(i), self.size) for i in indices))
        if self.task == "classify":  # the shape of which most is seen
            return _tensor(images), torch.tensor([row[m.sum((1, 2)).argmax()] for row, m in zip(labels, masks)])
        return _collate(self.task, images, labels, [boxes_of(m) for m in masks], masks)

    def order(self, first: int, count: int, seed: int) -> np.ndarray:
        """Every sample is new: `seed` is in them already."""
        return np.arange(first, first + count)

    def truth(self) -> dict:
        records = []
        for i in range(self.count):
            _, labels, masks = shapes.sample(self.seed, i, self.size)
            pixels = boxes_of(masks) * self.size
            pixels[:, :2] -= pixels[:, 2:] / 2
            annotations = [{"category_id": int(label), "bbox": box, "area": float(mask.sum()), "iscrowd": 0, "segmentation": encoded}
                           for label, box, mask, encoded in zip(labels, pixels.tolist(), masks, coco.encode(masks))]
            records.append({"image": {"width": self.size, "height": self.size}, "annotations": annotations})
        return make_truth(records, list(shapes.CLASSES))


class Stored:
    """A split of a prepared folder, memory-mapped."""

    def __init__(self, folder: Path, split: str, task: str, size: int, count: int):
        self.task, self.size, self.count, self.shuffled = task, size, count, Shuffled(count)
        self.images = np.memmap(folder / f"{split}_images.bin", np.uint8, "r", shape=(count, size, size, 3))
        self.labels, self.offsets = np.load(folder / f"{split}_labels.npy"), np.load(folder / f"{split}_offsets.npy")
        self.boxes = np.load(folder / f"{split}_boxes.npy")
        self.masks = None
        if task == "segment":
            self.masks = np.memmap(folder / f"{split}_masks.bin", np.uint8, "r", shape=(len(self.labels), -(-size * size // 8)))

    def __len__(self) -> int:
        return self.count

    def batch(self, indices) -> tuple[torch.Tensor, ...]:
        images = [self.images[i] for i in indices]
        if self.task == "classify":
            return _tensor(images), torch.from_numpy(self.labels[indices])
        objects = [slice(self.offsets[i], self.offsets[i + 1]) for i in indices]
        masks = None
        if self.masks is not None:
            masks = [np.unpackbits(self.masks[o], axis=1, count=self.size**2).reshape(-1, self.size, self.size) for o in objects]
        return _collate(self.task, images, [self.labels[o] for o in objects], [self.boxes[o] for o in objects], masks)

    def order(self, first: int, count: int, seed: int) -> np.ndarray:
        """Samples first, first + 1, ... of an endless sequence of epochs, each a permutation drawn from (seed, epoch)."""
        return self.shuffled.indices(first, count, seed)


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Masks (n, S, S), none empty -> boxes (n, 4) float32: centre x, centre y, width, height, in units of the image."""
    sides = []
    for seen in (masks.any(axis=1), masks.any(axis=2)):  # columns, rows
        first, last = seen.argmax(axis=1), seen.shape[1] - seen[:, ::-1].argmax(axis=1)
        sides.append(((first + last) / 2, last - first))
    (x, w), (y, h) = sides
    return (np.stack([x, y, w, h], axis=1) / masks.shape[-1]).astype(np.float32)


def _tensor(images) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _collate(task: str, images, labels, boxes, masks) -> tuple[torch.Tensor, ...]:
    counts = torch.tensor([len(row) for row in labels])
    targets = masks if task == "segment" else boxes
    shape = (len(labels), max(1, int(counts.max())))
    padded, target = torch.zeros(shape, dtype=torch.int64), torch.zeros((*shape, *targets[0].shape[1:]),
                                                                       dtype=torch.bool if task == "segment" else torch.float32)
    for i, (row, t) in enumerate(zip(labels, targets)):
        padded[i, :len(row)], target[i, :len(row)] = torch.from_numpy(row), torch.from_numpy(t)
    return _tensor(images), counts, padded, target


def make_truth(records: list[dict], classes: list[str]) -> dict:
    """A COCO data set of records (data.coco.Annotations.samples); an image's id is its index, a category's that of its class."""
    annotations = [a | {"image_id": i} for i, record in enumerate(records) for a in record["annotations"]]
    return {"images": [record["image"] | {"id": i} for i, record in enumerate(records)],
            "annotations": [a | {"id": i} for i, a in enumerate(annotations, 1)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(classes)]}


def prepare(task: str, source: Path, data_dir: Path, size: int) -> Path:
    """The folder that holds `source` at this size; made, with a line that says so, unless it is there. Raises DataError."""
    parameters = {"task": task, "source": str(source.resolve()), "size": size}
    folder = data_dir / f"vision_{task}_{hashlib.sha256(json.dumps(parameters).encode()).hexdigest()[:10]}"

    def fill(work: Path) -> dict:
        if not source.exists():
            name, megabytes, home = CIFAR10_ARCHIVE
            raise DataError(f"--source={source}: there is nothing of that name"
                            + (f"; {name} ({megabytes}) is at {home}" if task == "classify" else ""))
        print(f"preparing {task} in {folder}: reading {source}", flush=True)
        try:
            classes, counts, skipped, unreadable = (_fill_cifar10 if task == "classify" else _fill_coco)(work, source, task, size)
        except DAMAGED as e:
            raise DataError(f"{source} is not a complete archive ({e}): download it again") from None
        for split, n in counts.items():
            if not n:
                raise DataError(f"{source}: the {split} split has no image that can be used")
        print(f"prepared {task}: {counts['train']:,} training and {counts['val']:,} validation images; skipped "
              + ", ".join(f"{n:,} {what}" for what, n in skipped.items()), flush=True)
        for line in unreadable[:NAMED]:
            print(f"  {line}")
        if len(unreadable) > NAMED:
            print(f"  and {len(unreadable) - NAMED:,} more", flush=True)
        return parameters | {"stamps": stamps(source), "classes": classes, "counts": counts, "skipped": skipped,
                             "sha256": {path.name: content(path) for path in sorted(work.iterdir())}}

    try:
        import PIL  # noqa: F401
    except ImportError:
        raise DataError("reading images needs pillow: pip install -r requirements-extra.txt") from None
    try:
        ensure(folder, fill)
    except OSError as e:
        raise DataError(f"cannot prepare {task} in {folder}: {e}") from None
    return folder


def stamps(source: Path) -> dict[str, list[int]]:
    """Size and time of the archive, the annotations or CIFAR-10's batches; empty where they are gone."""
    files = [source] if source.is_file() else [*(source / "annotations").glob("*.json"), *source.glob("*_batch*")]
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def content(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill_cifar10(work: Path, source: Path, task: str, size: int):
    from PIL import Image

    def sized(image):
        image = image.transpose(1, 2, 0)  # (3, 32, 32) -> (32, 32, 3)
        return image if size == 32 else np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))

    counts = {}
    for split, batch in cifar10(source):
        samples = ((sized(image), np.array([label]), np.zeros((1, 4), np.float32), None) for label, image in batch)
        counts[split] = _write(work, split, samples)
    return list(CIFAR10), counts, {"unreadable images": 0}, []


def _fill_coco(work: Path, source: Path, task: str, size: int):
    """-> classes, images in each split, how many of what was skipped, and a line for each unreadable image."""
    splits = {split: coco.Annotations(source, split, masks=task == "segment") for split in ("train", "val")}
    classes = splits["train"].classes
    if (splits["train"].ids, classes) != (splits["val"].ids, splits["val"].classes):
        raise DataError(f"{splits['val'].path} and {splits['train'].path} have different categories")
    records, counts, empty = [], {}, 0
    for split, annotations in splits.items():
        def wanted():
            nonlocal empty
            for *sample, record in annotations.samples(size):
                if split == "val":
                    records.append(record)
                if split == "val" or len(sample[1]):  # an image without objects has nothing to teach, but can be mistaken
                    yield sample
                else:
                    empty += 1
        counts[split] = _write(work, split, wanted())
    if not any(not a["iscrowd"] for record in records for a in record["annotations"]):
        raise DataError(f"{splits['val'].path}: no readable image has an object: there is nothing to evaluate on")
    (work / "val.json").write_text(json.dumps(make_truth(records, classes)))
    unreadable = [line for annotations in splits.values() for line in annotations.unreadable]
    if cut := sum(a.cut for a in splits.values()):
        print(f"{cut:,} boxes reach outside their image and are cut there: are they x, y, width, height?", flush=True)
    return classes, counts, {"unreadable images": len(unreadable), "training images without objects": empty,
                             f"objects without an area or too small at {size} x {size}": sum(a.vanished for a in splits.values())}, unreadable


def _write(folder: Path, split: str, samples) -> int:
    """Store (image, labels, boxes, masks or None) one by one; -> how many. Pixels go to the disk, only labels and boxes stay in memory."""
    labels, boxes, offsets = [], [], [0]
    with open(folder / f"{split}_images.bin", "wb") as images, open(folder / f"{split}_masks.bin", "wb") as packed:
        for image, its_labels, its_boxes, its_masks in samples:
            images.write(image.tobytes())
            if its_masks is not None:
                packed.write(np.packbits(its_masks.reshape(-1, image.shape[0] * image.shape[1]), axis=1).tobytes())
            labels.append(its_labels)
            boxes.append(its_boxes)
            offsets.append(offsets[-1] + len(its_labels))
    if labels:
        np.save(folder / f"{split}_labels.npy", np.concatenate(labels))
        np.save(folder / f"{split}_boxes.npy", np.concatenate(boxes))
        np.save(folder / f"{split}_offsets.npy", np.array(offsets))
    return len(labels)
