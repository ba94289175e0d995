"""Vision: classify images, detect objects, segment instances, with or without preconditioned attention.

    python train_vision.py detect                              # boxes around generated shapes, minutes on two CPU cores
    python train_vision.py detect --precond=True               # the same, preconditioned
    python train_vision.py segment                             # instance masks
    python train_vision.py classify --source=cifar-10-python.tar.gz --image_size=32 --patch_size=4
    python train_vision.py detect --source=coco --image_size=256 --patch_size=16 --queries=100
    python train_vision.py detect --eval_only --show=8         # draw predictions of the best checkpoint

The models are small ViT, YOLOS and EoMT (vision.py). Without a --source the images are generated (data/shapes.py); a source is
CIFAR-10's archive (classify), or a folder in COCO's format (detect, segment; see data/coco.py). The metric is accuracy, or average
precision of boxes or masks as pycocotools computes it, in percent, on images that training does not see. A token is a patch. The losses
of detect and segment divide by the objects of a forward pass, so training depends a little on how a step's images are split into them.
"""
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from engine import checkpoint, options
from data import coco
from engine.options import DataError
from data.images import open_data
from engine.device import Compute
from engine.options import DATA, FREE, at_least
from engine.run import open_run
from engine.trainer import Task, Trainer, TrainerConfig
from vision.models import TASKS, Vision, VisionConfig, detections

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito's
SHOWN_SCORE, SHOWN_SIDE = 0.5, 384  # a drawn prediction's least score; a drawing's least side in pixels
TITLE, GAP = 26, 8  # height of a drawing's title, pixels between its halves


@dataclass
class Config(TrainerConfig, VisionConfig):
    source: Annotated[str, "CIFAR-10's archive, or a COCO folder; empty: generated shapes",
                      DATA] = ""
    data_dir: Annotated[str, "where data that was read is kept"] = "data"
    n_val: Annotated[int, "generated validation images", DATA, at_least(1)] = 500
    show: Annotated[int, "draw the predictions on this many validation images, as PNG in out_dir",
                    FREE, at_least(0)] = 0
    # Other defaults than train.py's.
    out_dir: str = "out-vision-detect"
    batch_size: int = 16
    max_iters: int = 5000
    learning_rate: float = 1e-3
    min_lr: float = 1e-5
    warmup_iters: int = 200
    eval_interval: int = 1000
    log_interval: int = 50


class VisionTask(Task):
    """The task: a label, boxes or masks for each image."""

    def __init__(self, config: Config):
        self.config, self.seed, self.classify = config, config.seed, config.task == "classify"
        self.data = open_data(config.task, config.source, config.data_dir, config.image_size, config.seed, config.n_val)
        n = min(config.eval_iters * config.batch_size, len(self.data.val))
        self.evaluated = np.arange(n) * len(self.data.val) // n
        if not self.classify and not set(self.evaluated) & {a["image_id"] for a in self.data.truth["annotations"] if not a["iscrowd"]}:
            raise DataError(f"none of the {n} validation images that are evaluated has an object: raise --eval_iters")
        self.values_per_token = 3 * config.patch_size**2
        self.train_metrics = ("train_loss", "train_accuracy") if self.classify else ("train_loss",)
        self.objective = "val_accuracy" if self.classify else "val_ap"

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, ...]:
        return self.data.train.batch(self.data.train.order(first, count, self.seed))

    def loss(self, model, images, *targets):
        outputs, loss = model(images, *targets)
        if self.classify:
            return loss, (outputs[0].argmax(dim=-1) == targets[0]).float().mean()
        return (loss,)

    @torch.no_grad()
    def evaluate(self, model, compute: Compute) -> dict[str, float]:
        """Batches, not samples, go round the processes, so that a loss that divides by a batch's objects does not depend on their number.
        EoMT's loss draws random points: the same ones each time, apart from training's."""
        size, indices, n = self.config.batch_size, self.evaluated, len(self.evaluated)
        total, right, found = 0.0, 0, []
        with torch.random.fork_rng([compute.device] if compute.device.type == "cuda" else []):
            for i in range(compute.rank * size, n, compute.world * size):
                torch.manual_seed(i)
                images, *targets = compute.move(*self.data.val.batch(indices[i:i + size]))
                with compute.autocast():
                    outputs, loss = model(images, *targets)
                total += float(loss) * len(images)
                if self.classify:
                    right += int((outputs[0].argmax(dim=-1) == targets[0]).sum())
                else:
                    found += detections(self.config.task, outputs, [self.data.truth["images"][j] for j in indices[i:i + size]])
        total, right = compute.reduce([total, right])
        if self.classify:
            return {"val_loss": total / n, "val_accuracy": right / n}
        found = [d for part in compute.gather(found) for d in part]
        ap = coco.average_precision(self.data.truth, found, "bbox" if self.config.task == "detect" else "segm", indices.tolist())
        return {"val_loss": total / n} | {f"val_{name}": value for name, value in ap.items()}

    def probe(self, model, compute: Compute):
        images, = compute.move(self.data.val.batch(np.arange(min(4, len(self.data.val))))[0])
        model(images)

    def crowded(self) -> int:
        """How many validation images have more objects than can be found."""
        objects = Counter(a["image_id"] for a in self.data.truth["annotations"] if not a["iscrowd"]) if not self.classify else {}
        return sum(n > self.config.queries for n in objects.values())

    def state(self) -> dict:
        return self.data.state


@torch.no_grad()
def show(task: VisionTask, model: Vision, compute: Compute, count: int, folder: Path):
    """Validation images with the truth (left) and the predictions whose score is above SHOWN_SCORE (right), a PNG for each."""
    from PIL import Image, ImageDraw

    config, classes = task.config, task.data.classes
    indices = np.arange(min(count, len(task.data.val)))
    images, *targets = task.data.val.batch(indices)
    with compute.autocast():
        outputs, _ = model(*compute.move(images))
    side = config.image_size * -(-SHOWN_SIDE // config.image_size)
    for i in indices:
        picture = Image.fromarray(images[i].permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST)
        path = folder / f"val_{i}.png"
        if task.classify:
            answer, label = classes[outputs[0][i].argmax()], classes[targets[0][i]]
            said = f"predicted {answer}, label {label}" + ("" if answer == label else "  (wrong)")
            panels = {said: picture}
        else:
            true = true_objects(task, i, side)
            found = detections(config.task, tuple(o[i:i + 1] for o in outputs), [{"id": 0, "width": side, "height": side}])
            found = [d for d in found if d["score"] > SHOWN_SCORE]
            said = f"{len(true)} objects (left), {len(found)} found with a score above {SHOWN_SCORE:.0%} (right)"
            panels = {f"truth: {len(true)}": draw(picture, true, classes),
                      f"found, score above {SHOWN_SCORE:.0%}: {len(found)}": draw(picture, found, classes)}
        sheet = Image.new("RGB", ((side + GAP) * len(panels) - GAP, side + TITLE), "white")
        for x, (title, panel) in enumerate(panels.items()):
            sheet.paste(panel, (x * (side + GAP), TITLE))
            ImageDraw.Draw(sheet).text((x * (side + GAP) + 4, 4), title, fill="black", font_size=16)
        sheet.save(path)
        print(f"{path}: {said}")


def true_objects(task: VisionTask, i: int, side: int) -> list[dict]:
    """The objects of a validation image as `detections` gives them, in a picture of side x side pixels."""
    image = task.data.truth["images"][i]
    scale = np.array([side / image["width"], side / image["height"]] * 2)
    objects = []
    for a in task.data.truth["annotations"]:
        if a["image_id"] != i or a["iscrowd"]:
            continue
        objects.append({"category_id": a["category_id"], "bbox": a["bbox"] * scale})
        if task.config.task == "segment":
            objects[-1]["segmentation"] = coco.encode(coco.shrink(coco.rle.decode(a["segmentation"]), side)[None])[0]
    return objects


def draw(picture, objects: list[dict], classes: list[str]):
    """A copy of the picture with outlined masks, or boxes where there are none, and names with scores."""
    from PIL import Image, ImageColor, ImageDraw, ImageFilter

    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    placed = []  # where names are
    objects = [d for d in objects if "segmentation" not in d or coco.rle.area(d["segmentation"])]
    for d in objects:
        colour = COLOURS[d["category_id"] % len(COLOURS)]
        if "segmentation" in d:
            mask = Image.fromarray(coco.rle.decode(d["segmentation"]) * np.uint8(255))
            edge = Image.fromarray((np.asarray(mask) > np.asarray(mask.filter(ImageFilter.MinFilter(7)))) * np.uint8(255))
            picture.paste(ImageColor.getrgb(colour), mask=mask.point(lambda value: value // 4))
            picture.paste(ImageColor.getrgb(colour), mask=edge)
        else:
            x, y, w, h = d["bbox"]
            pen.rectangle([x, y, x + w, y + h], outline=colour, width=3)
    for d in objects:
        name = classes[d["category_id"]] + (f" {d['score']:.0%}" if "score" in d else "")
        if "segmentation" in d:  # at the pixel of the object that is nearest to its middle
            pixels = np.argwhere(coco.rle.decode(d["segmentation"]))[:, ::-1]
            x, y = pixels[((pixels - pixels.mean(axis=0)) ** 2).sum(axis=1).argmin()] - [pen.textlength(name, font_size=16) / 2, 9]
        else:
            x, y = d["bbox"][0] + 4, d["bbox"][1] + 2
        x, y = min(max(x, 0), picture.width - pen.textlength(name, font_size=16) - 4), max(y, 0)
        while any(abs(x - other_x) < 80 and abs(y - other_y) < 16 for other_x, other_y in placed):
            y += 16
        placed.append((x, y))
        pen.text((x, y), name, fill="white", stroke_width=2, stroke_fill="black", font_size=16)
    return picture


def preset_of_task(argv: list[str]) -> list[str]:
    return options.preset_of_task(argv, TASKS, "vision")


def open(config: Config, compute: Compute) -> tuple[VisionTask, Vision]:
    """The task, its data prepared where it was not, and a model with its first weights."""
    task = compute.once_per_node(lambda: VisionTask(config))
    torch.manual_seed(config.seed)
    return task, Vision(config, len(task.data.classes))


def main():
    run = open_run(Config, preset_of_task(sys.argv[1:]), __doc__)
    config = run.config
    with run.compute() as compute:
        task, model = open(config, compute)
        if compute.main:
            print(f"data: {config.source or 'generated shapes'}, {len(task.data.val):,} "
                  f"validation images, {len(task.data.classes)} classes\n"
                  f"model: {type(model.network).__name__}, {model.n_parameters():,} parameters, "
                  f"{config.describe_precond()}\n"
                  f"compute: {compute.describe()}", flush=True)
            if more := task.crowded():
                print(f"{more:,} of the validation images have more than "
                      f"queries={config.queries} objects: raise --queries to find them all")
        if config.eval_only:
            run.evaluate(task, model, compute)
        else:
            run.finish(Trainer(config, task, model, compute, run.saved).run(), compute)
            if compute.main:
                print(f"""\
next: python train_vision.py --eval_only --show=8 --out_dir={config.out_dir}   # draw predictions
      python plot.py {config.out_dir}        # figures
      python compare.py train_vision.py {config.task} --vary precond=False,True --seeds=3""")
        if config.show and compute.main:
            best = checkpoint.read(checkpoint.choose(run.folder, best=True))
            checkpoint.restore_model(model, task, best, run.folder)
            show(task, model.eval(), compute, config.show, run.folder)


if __name__ == "__main__":
    options.run(main)
