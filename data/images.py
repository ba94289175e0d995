"""Images for train_vision.py: generated shapes, CIFAR-10 (classify), COCO's format (the others).

    data = open_data("segment", source="coco", data_dir="data", size=64, seed=1, n_val=500)
    images, counts, labels, masks = data.train.batch([3, 1, 4])

A batch is a tuple of tensors. Images come first: (B, 3, size, size) uint8. classify adds labels
(B). The others add counts (B), the number of objects of an image, and labels (B, M), padded to the
largest count M. detect then has boxes (B, M, 4): centre x, centre y, width, height, in units of the
image. segment has masks (B, M, size, size) bool. Real data is read once and stored, at the size
asked for, in data_dir/vision_<task>_<hash>. Its files are compared with their checksums whenever
they are opened (see data/folders.py).
"""
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import coco, shapes
from data.archives import check_unchanged, complete, read_from, stamps
from data.cifar import ARCHIVE, CLASSES, RELEASE, cifar10
from data.folders import check, checksums, ensure, read_meta, reading
from data.order import Shuffled
from engine.options import DataError, need

NAMED = 5  # unreadable images that are named; all are counted


@dataclass
class Data:
    """Both splits of a task's data.

    truth: the validation split as a COCO data set (None for classify). state: identifies the data.
    """
    train: "Images"
    val: "Images"
    classes: list[str]
    truth: dict | None
    state: dict


def open_data(task: str, source: str, data_dir: str, size: int, seed: int, n_val: int) -> Data:
    """The data of a task. Raises DataError.

    source: CIFAR-10's archive or folder, whose test batch is the validation split, or a COCO
    folder. Empty: generated shapes. Their training split is endless, drawn from `seed`; the n_val
    images to validate on are always the same.
    """
    if task != "classify":
        need("pycocotools.mask", f"the task {task} needs the package")
    if not source:
        classes = list(shapes.CLASSES)
        val = Shapes(task, size, n_val, seed=0)
        train = Shapes(task, size, None, seed + 1)
        truth = None if task == "classify" else val.truth()
        state = {"task": task, "size": size, "n_val": n_val, "classes": classes}
        return Data(train, val, classes, truth, state)
    folder = prepare(task, Path(source), Path(data_dir), size)
    meta = read_meta(folder)
    with reading(folder):
        check(folder, meta)
        truth = None if task == "classify" else json.loads((folder / "val.json").read_text())
        train, val = (Stored(folder, split, meta) for split in ("train", "val"))
        check_unchanged(source, made_from(task, Path(source)), folder, meta)
        return Data(train, val, meta["classes"], truth, identity(meta))


def identity(meta: dict) -> dict:
    """What identifies prepared data: of its meta.json, what a checkpoint keeps."""
    names = ("task", "size", "counts", "classes", "sha256")  # not where it was read from
    return {name: meta[name] for name in names}


class Images:
    """A split. sample(i): the image, the labels of its objects, and their boxes or masks."""

    def __init__(self, task: str, size: int, count: int | None):
        self.task, self.size, self.count = task, size, count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices) -> tuple[torch.Tensor, ...]:
        images, labels, targets = zip(*(self.sample(int(i)) for i in indices))
        pixels = torch.from_numpy(np.stack(images))  # (B, size, size, 3)
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
        if self.task == "classify":  # an image is one object
            return pixels, torch.from_numpy(np.concatenate(labels))
        counts = torch.tensor([len(row) for row in labels])
        return pixels, counts, _pad(labels), _pad(targets)


class Shapes(Images):
    """Generated samples; count None: endless."""

    def __init__(self, task: str, size: int, count: int | None, seed: int):
        super().__init__(task, size, count)
        self.seed = seed

    def sample(self, i: int) -> tuple[np.ndarray, ...]:
        image, labels, masks = shapes.sample(self.seed, i, self.size)
        if self.task == "segment":
            return image, labels, masks
        if self.task == "classify":  # the shape of which most is seen
            largest = masks.sum(axis=(1, 2)).argmax()
            return image, labels[[largest]], None
        return image, labels, boxes_of(masks)

    def order(self, first: int, count: int, seed: int) -> np.ndarray:
        """Every sample is new: `seed` is in them already."""
        return np.arange(first, first + count)

    def truth(self) -> dict:
        records = []
        for i in range(self.count):
            _, labels, masks = shapes.sample(self.seed, i, self.size)
            pixels = boxes_of(masks) * self.size
            pixels[:, :2] -= pixels[:, 2:] / 2
            objects = zip(labels.tolist(), pixels.tolist(), masks, coco.encode(masks))
            annotations = []
            for label, box, mask, encoded in objects:
                annotations.append({"category_id": label, "bbox": box, "area": float(mask.sum()),
                                    "iscrowd": 0, "segmentation": encoded})
            records.append({"image": {"width": self.size, "height": self.size},
                            "annotations": annotations})
        return make_truth(records, list(shapes.CLASSES))


class Stored(Images):
    """A split of a prepared folder, memory-mapped.

    `order`: samples of epochs, each a permutation drawn from (seed, epoch).
    """

    def __init__(self, folder: Path, split: str, meta: dict):
        super().__init__(meta["task"], meta["size"], meta["counts"][split])
        self.order = Shuffled(self.count).indices
        size = self.size
        self.images = np.memmap(folder / f"{split}_images.bin", np.uint8, "r",
                                shape=(self.count, size, size, 3))
        self.labels = np.load(folder / f"{split}_labels.npy")
        self.offsets = np.load(folder / f"{split}_offsets.npy")
        classes = len(meta["classes"])
        if len(self.offsets) != self.count + 1 or self.offsets[-1] != len(self.labels) \
                or self.labels.min() < 0 or self.labels.max() >= classes:
            raise ValueError(f"its {split} labels are not of {self.count} images and {classes} "
                             "classes")
        if self.task == "segment":  # a bit a pixel
            self.masks = np.memmap(folder / f"{split}_masks.bin", np.uint8, "r",
                                   shape=(len(self.labels), math.ceil(size * size / 8)))
        else:
            self.boxes = np.load(folder / f"{split}_boxes.npy")

    def sample(self, i: int) -> tuple[np.ndarray, ...]:
        objects = slice(self.offsets[i], self.offsets[i + 1])
        image, labels = self.images[i], self.labels[objects]
        if self.task != "segment":
            return image, labels, self.boxes[objects]
        bits = np.unpackbits(self.masks[objects], axis=1, count=self.size**2)
        return image, labels, bits.reshape(-1, self.size, self.size).astype(bool)


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Masks (n, S, S), none empty -> boxes (n, 4) float32.

    A box is centre x, centre y, width, height, in units of the image.
    """
    left, top, width, height = coco.rle.toBbox(coco.encode(masks)).T
    x = left + width / 2
    y = top + height / 2
    boxes = np.stack([x, y, width, height], axis=1)
    return (boxes / masks.shape[-1]).astype(np.float32)


def _pad(arrays: list[np.ndarray]) -> torch.Tensor:
    """Arrays (n, ...) -> (B, M, ...): zeros follow, up to the largest n and at least one."""
    longest = max(1, *map(len, arrays))
    shape = (len(arrays), longest, *arrays[0].shape[1:])
    padded = np.zeros(shape, arrays[0].dtype)
    for row, array in zip(padded, arrays):
        row[:len(array)] = array
    return torch.from_numpy(padded)


def make_truth(records: list[dict], classes: list[str]) -> dict:
    """A COCO data set of records (see data.coco.Annotations).

    An image's id is its index, a category's that of its class.
    """
    annotations = []
    for i, record in enumerate(records):
        for a in record["annotations"]:
            annotations.append(a | {"image_id": i, "id": len(annotations) + 1})
    return {"images": [record["image"] | {"id": i} for i, record in enumerate(records)],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(classes)]}


def prepare(task: str, source: Path, data_dir: Path, size: int) -> Path:
    """The folder that holds `source` at this size. Raises DataError.

    Unless it is there it is made, with a line that says so.
    """
    parameters = {"task": task, "source": str(source.resolve()), "size": size}
    digest = hashlib.sha256(json.dumps(parameters).encode()).hexdigest()
    folder = data_dir / f"vision_{task}_{digest[:10]}"

    def fill(work: Path) -> dict:
        if not source.is_file() and not source.is_dir():
            name, megabytes, home = ARCHIVE
            hint = f"; {name} ({megabytes}) is at {home}" if task == "classify" else ""
            raise DataError(f"--source={source}: there is nothing of that name to read{hint}")
        print(f"preparing {task} in {folder}: reading {source}", flush=True)
        made_of = stamps(made_from(task, source))  # before it is read: a change meanwhile counts
        with complete(source):
            if task == "classify":
                found = _fill_cifar10(work, source, size)
            else:
                found = _fill_coco(work, source, task == "segment", size)
        counts = found["counts"]
        skipped = ", ".join(f"{n:,} {what}" for what, n in found["skipped"].items())
        print(f"prepared {task}: {counts['train']:,} training and {counts['val']:,} validation "
              f"images; skipped {skipped}", flush=True)
        return parameters | found | checksums(work) | {"stamps": made_of}

    need("PIL", "reading images needs")
    ensure(folder, fill, task)
    return folder


def made_from(task: str, source: Path) -> dict[str, Path]:
    """CIFAR-10's archive or batches, or COCO's annotations, by their names; empty if gone."""
    if task == "classify":
        return read_from(source, RELEASE)
    files = [file for split in ("train", "val")
             for file in source.glob(f"annotations/instances_{split}*.json")]
    return {file.name: file for file in files}


def _fill_cifar10(work: Path, source: Path, size: int) -> dict:
    """Store CIFAR-10; -> what meta.json says of it."""
    from PIL import Image

    def samples(batch):
        for label, image in batch:
            image = image.transpose(1, 2, 0)  # (3, 32, 32) -> (32, 32, 3)
            picture = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
            yield np.asarray(picture), np.array([label]), np.zeros((1, 4), np.float32), None

    counts = {}
    for split, batch in cifar10(source).items():
        counts[split], _ = _write(work, split, samples(batch))
    if not all(counts.values()):
        raise DataError(f"{source} has no images: download it again")
    return {"classes": CLASSES, "counts": counts, "skipped": {"unreadable images": 0}}


def _fill_coco(work: Path, source: Path, masks: bool, size: int) -> dict:
    """Store a COCO folder; -> what meta.json says of it. Names images that cannot be read."""
    train, val = (coco.Annotations(source, split, masks) for split in ("train", "val"))
    if (train.ids, train.classes) != (val.ids, val.classes):
        raise DataError(f"{val.path} and {train.path} have different categories")
    n_train, train_objects = _write(work, "train", train.samples(size))
    n_val, val_objects = _write(work, "val", val.samples(size))
    unreadable = train.unreadable + val.unreadable
    for line in unreadable[:NAMED]:
        print(f"cannot read {line}")
    if len(unreadable) > NAMED:
        print(f"and {len(unreadable) - NAMED:,} more", flush=True)
    for annotations, objects in (train, train_objects), (val, val_objects):
        if not objects:
            raise DataError(f"{annotations.path}: no readable image has an object that is seen at "
                            f"{size} x {size}; {len(annotations.unreadable)} of "
                            f"{len(annotations.images)} images cannot be read")
    (work / "val.json").write_text(json.dumps(make_truth(val.records, val.classes)))
    for count, what in (
            (train.cut + val.cut, "boxes reach outside their image and are cut there: are they x, "
                                  "y, width, height?"),
            (train.tiny + val.tiny, "boxes are narrower than a pixel: are they in pixels?"),
            (train.turned + val.turned, "images are turned as their EXIF orientation says"),
            (len(train.files() & val.files()), "images are in both splits: the metric is not that "
                                               "of unseen ones")):
        if count:
            print(f"{count:,} {what}", flush=True)
    empty = len(train.images) - len(train.unreadable) - n_train
    lost = f"objects without an area{f' or too small at {size} x {size}' if masks else ''}"
    skipped = {"unreadable images": len(unreadable), "training images without objects": empty,
               lost: train.vanished + val.vanished}
    counts = {"train": n_train, "val": n_val}
    return {"classes": val.classes, "counts": counts, "skipped": skipped}


def _write(folder: Path, split: str, samples) -> tuple[int, int]:
    """Store (image, labels, boxes, masks or None) one by one; -> number of images, of objects.

    Pixels go to the disk; only labels and boxes stay in memory.
    """
    labels, boxes, offsets = [], [], [0]
    with (open(folder / f"{split}_images.bin", "wb") as images,
          open(folder / f"{split}_masks.bin", "wb") as packed):
        for image, its_labels, its_boxes, its_masks in samples:
            images.write(image.tobytes())
            if its_masks is not None:
                rows = its_masks.reshape(-1, image.shape[0] * image.shape[1])
                packed.write(np.packbits(rows, axis=1).tobytes())
            labels.append(its_labels)
            boxes.append(its_boxes)
            offsets.append(offsets[-1] + len(its_labels))
    if labels:
        np.save(folder / f"{split}_labels.npy", np.concatenate(labels))
        np.save(folder / f"{split}_boxes.npy", np.concatenate(boxes))
        np.save(folder / f"{split}_offsets.npy", np.array(offsets))
    return len(labels), offsets[-1]
