"""Drawings of predictions: a PNG for each validation image, the truth on the left.

    python train_vision.py detect --eval_only --show=8

A classifier's answer and label stand above its image. Needs pillow.
"""
import itertools
from pathlib import Path

import numpy as np
import torch

from data import coco
from engine.device import Compute
from engine.run import writing
from vision.models import corners, detections

# Okabe and Ito's colours, which are told apart by most people who are colour-blind.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
SHOWN_SCORE = 0.5  # least score of a prediction that is drawn
SIDE = 384  # least side of a drawn image, in pixels
TITLE, GAP = 26, 8  # height of a title, space between the two halves
FONT = 16


@torch.no_grad()
def show(task, model, compute: Compute, count: int, folder: Path):
    """Draw the first `count` validation images of a train_vision.VisionTask as folder/val_*.png."""
    from PIL import Image, ImageDraw

    config, classes = task.config, task.data.classes
    zoom = -(-SIDE // config.image_size)
    side = zoom * config.image_size
    val = task.data.val
    for i in range(min(count, len(val))):
        images, *targets = val.batch([i])
        with compute.autocast():
            outputs, _ = model(*compute.move(images))
        pixels = images[0].permute(1, 2, 0).numpy()  # (3, S, S) -> (S, S, 3)
        picture = Image.fromarray(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1))
        path = folder / f"val_{i}.png"
        panels = {}  # by their titles
        if task.classify:
            answer, label = classes[outputs[0].argmax()], classes[targets[0]]
            wrong = "" if answer == label else "  (wrong)"
            panels[f"predicted {answer}, label {label}{wrong}"] = picture
        else:
            true = true_objects(config.task, [t[0] for t in targets], side)
            square = {"id": 0, "width": side, "height": side}
            found = detections(config.task, outputs, [square])
            found = [d for d in found if d["score"] > SHOWN_SCORE]
            panels[f"truth: {len(true)}"] = draw(picture, true, classes)
            title = f"found, score above {SHOWN_SCORE:.0%}: {len(found)}"
            panels[title] = draw(picture, found, classes)
        step = side + GAP
        sheet = Image.new("RGB", (step * len(panels) - GAP, side + TITLE), "white")
        pen = ImageDraw.Draw(sheet)
        for left, (title, panel) in zip(itertools.count(0, step), panels.items()):
            sheet.paste(panel, (left, TITLE))
            pen.text((left + 4, 4), title, fill="black", font_size=FONT)
        with writing(folder):
            sheet.save(path)
        print(f"{path}: {'; '.join(panels)}")


def true_objects(kind: str, targets: list[torch.Tensor], side: int) -> list[dict]:
    """An image's targets as `detections` gives objects, in a picture of side x side pixels."""
    count, labels, shapes = targets
    objects = [{"category_id": label} for label in labels[:count].tolist()]
    shapes = shapes[:count]
    if kind == "detect":
        return [d | {"bbox": box} for d, box in zip(objects, corners(shapes, side, side))]
    zoom = side // shapes.size(-1)
    masks = shapes.numpy().repeat(zoom, axis=1).repeat(zoom, axis=2)
    return [d | {"segmentation": mask} for d, mask in zip(objects, coco.encode(masks))]


def draw(picture, objects: list[dict], classes: list[str]):
    """A copy of the picture with outlined masks, or boxes where there are none, and their names."""
    from PIL import Image, ImageChops, ImageDraw, ImageFilter

    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    for d in objects:
        colour = COLOURS[d["category_id"] % len(COLOURS)]
        if "segmentation" in d:
            mask = Image.fromarray(coco.rle.decode(d["segmentation"]) * np.uint8(255))
            edge = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(7)))
            picture.paste(colour, mask=mask.point(lambda value: value // 4))
            picture.paste(colour, mask=edge)
        else:
            x, y, w, h = d["bbox"]
            pen.rectangle([x, y, x + w, y + h], outline=colour, width=3)
    placed = []  # where names are: another is not written over them
    for d in objects:
        left, top, *_ = coco.rle.toBbox(d["segmentation"]) if "segmentation" in d else d["bbox"]
        name = classes[d["category_id"]]
        if "score" in d:
            name += f" {d['score']:.0%}"
        furthest = picture.width - pen.textlength(name, font_size=FONT) - 4
        x = min(max(left + 4, 0), furthest)
        y = max(top + 2, 0)
        while any(abs(x - other_x) < 80 and abs(y - other_y) < FONT for other_x, other_y in placed):
            y += FONT
        placed.append((x, y))
        pen.text((x, y), name, "white", stroke_width=2, stroke_fill="black", font_size=FONT)
    return picture
