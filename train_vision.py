"""Classify images, detect objects, segment instances, with or without preconditioned attention.

    python train_vision.py detect                          # boxes: minutes on two CPU cores
    python train_vision.py segment --precond=True          # instance masks, preconditioned
    python train_vision.py detect --eval_only --show=8     # draw the best checkpoint's predictions
    python train_vision.py classify --out_dir=out-cifar10 --source=cifar-10-python.tar.gz \\
        --image_size=32 --patch_size=4 --eval_iters=625
    python train_vision.py detect --out_dir=out-coco --source=coco --image_size=256 \\
        --patch_size=16 --queries=100 --eval_iters=313

The models are small ViT, YOLOS and EoMT (vision/models.py). Without --source the images are
generated (data/shapes.py). A source is CIFAR-10's archive (classify), or a folder in COCO's format
(detect, segment; see data/coco.py). The metric is accuracy, or average precision of boxes or masks
as pycocotools computes it, in percent, on images that training does not see. A token is a patch.
The losses of detect and segment divide by the objects of a forward pass. So training depends a
little on how the images of a step are split into passes.
"""
import engine.startup  # noqa: F401  (first: it answers mistakes before PyTorch is loaded)

# isort: split
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch

from data import coco
from data.folders import expecting
from data.images import identity, open_data
from data.order import spread
from engine import checkpoint, options
from engine.device import Compute
from engine.options import DATA, FREE, LOCAL, SOURCE, DataError, at_least, not_empty
from engine.run import open_run
from engine.trainer import Task, Trainer, TrainerConfig
from vision.drawing import show
from vision.models import TASKS, Vision, VisionConfig, detections


@dataclass
class Config(TrainerConfig, VisionConfig):
    source: Annotated[str, "CIFAR-10's archive, or a COCO folder; empty: generated shapes",
                      SOURCE] = ""
    data_dir: Annotated[str, "where data that was read is kept", LOCAL, not_empty] = "data"
    n_val: Annotated[int, "generated validation images", DATA, at_least(1)] = 500
    show: Annotated[int, "validation images whose predictions are drawn, as PNG in out_dir",
                    FREE, at_least(0)] = 0
    # Other defaults than train.py's.
    out_dir: str = "out-vision-detect"
    batch_size: int = 16
    optimizer: str = "muon"  # measured to be far better than adamw (BENCHMARKS.md)
    max_iters: int = 4000
    learning_rate: float = 1e-3
    min_lr: float = 1e-5
    warmup_iters: int = 200
    eval_interval: int = 1000
    log_interval: int = 50


class VisionTask(Task):
    """The task: a label, boxes or masks for each image."""

    def __init__(self, config: Config):
        self.config = config
        self.classify = config.task == "classify"
        self.data = open_data(config.task, config.source, config.data_dir, config.image_size,
                              config.seed, config.n_val)
        self.evaluated = spread(config.eval_iters * config.batch_size, len(self.data.val))
        annotations = [] if self.classify else self.data.truth["annotations"]
        self.objects = Counter(a["image_id"] for a in annotations if not a["iscrowd"])
        if not self.classify and not any(self.objects[i] for i in self.evaluated):
            raise DataError(f"none of the {len(self.evaluated)} validation images that are "
                            "evaluated has an object: raise --eval_iters")
        self.values_per_token = 3 * config.patch_size**2
        self.train_metrics = ("train_loss", "train_accuracy") if self.classify else ("train_loss",)
        self.objective = "val_accuracy" if self.classify else "val_ap"

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, ...]:
        return self.data.train.batch(self.data.train.order(first, count, self.config.seed))

    def loss(self, model, images, *targets):
        outputs, loss = model(images, *targets)
        if self.classify:
            return loss, (outputs[0].argmax(dim=-1) == targets[0]).float().mean()
        return (loss,)

    @torch.no_grad()
    def evaluate(self, model, compute: Compute) -> dict[str, float]:
        """The mean loss, and accuracy or average precision, over the evaluated images."""
        count = len(self.evaluated)
        total, right, found = 0.0, 0, []
        # EoMT's loss draws random points: the same ones each time, apart from training's.
        training = compute.random_state()
        # Processes take turns at whole batches: a loss divides by the objects of its batch, so it
        # would depend on their number if they shared one.
        for indices, n in compute.rounds(self.evaluated, self.config.batch_size):
            torch.manual_seed(int(indices[0]))
            images, *targets = compute.move(*self.data.val.batch(indices))
            with compute.autocast():
                outputs, loss = model(images, *targets)
            total += float(loss) * n
            if self.classify:
                right += int((outputs[0].argmax(dim=-1) == targets[0])[:n].sum())
            elif n:
                records = [self.data.truth["images"][j] for j in indices]
                found += detections(self.config.task, outputs, records)
        compute.set_random_state(training)
        total, right = compute.reduce([total, right])
        if self.classify:
            return {"val_loss": total / count, "val_accuracy": right / count}
        found = [d for part in compute.gather(found) for d in part]
        kind = "bbox" if self.config.task == "detect" else "segm"
        ap = coco.average_precision(self.data.truth, found, kind, self.evaluated.tolist())
        return {"val_loss": total / count} | {f"val_{name}": value for name, value in ap.items()}

    def probe(self, model, compute: Compute):
        images, = compute.move(self.data.val.batch(np.arange(min(4, len(self.data.val))))[0])
        model(images)

    def crowded(self) -> int:
        """How many validation images have more objects than can be found."""
        return sum(n > self.config.queries for n in self.objects.values())

    def state(self) -> dict:
        return self.data.state


def preset_of_task(argv: list[str]) -> list[str]:
    return options.preset_of_task(argv, TASKS, "vision")


def open(config: Config, compute: Compute) -> tuple[VisionTask, Vision]:
    """The task, its data prepared where it was not, and a model with its first weights."""
    task = compute.once_per_node(lambda: VisionTask(config))
    compute.check_same(task.state())
    torch.manual_seed(config.seed)
    return task, Vision(config, len(task.data.classes))


def main():
    run = open_run(Config, preset_of_task(sys.argv[1:]), __doc__)
    config = run.config
    expected = expecting(lambda meta: checkpoint.same_data(run.saved, identity(meta)))
    with run.compute() as compute, expected:
        if config.show:
            compute.on_main(lambda: options.need("PIL", "--show saves images with"))
        task, model = open(config, compute)
        if compute.main:
            print(f"data: {config.source or 'generated shapes'}, {len(task.data.classes)} classes, "
                  f"{len(task.evaluated):,} of {len(task.data.val):,} validation images evaluated\n"
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
                out = shlex.quote(config.out_dir)
                print(f"""\
next: python train_vision.py --eval_only --show=8 --out_dir={out}   # draw predictions
      python plot.py {out}        # figures
      python compare.py train_vision.py {out}/config.toml --vary precond=False,True --seeds=3""")
        if config.show and compute.main:
            if config.shard:
                whole = Vision(config, len(task.data.classes))
                model = whole.to(compute.device)
            best = checkpoint.read(checkpoint.choose(run.folder, best=True))
            checkpoint.restore_model(model, task, best, run.folder)
            show(task, model.eval(), compute, config.show, run.folder)


if __name__ == "__main__":
    options.run(main)
