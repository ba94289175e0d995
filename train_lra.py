"""Long Range Arena: classify long sequences, with or without preconditioned attention.

    python train_lra.py                    # ListOps up to 128 symbols: minutes on two CPU cores
    python train_lra.py listops --precond=True --out_dir=out-lra-on  # the same, preconditioned
    python train_lra.py pathfinder --attention=nystrom               # a task's laptop preset
    python train_lra.py config/lra_listops.toml --attention=nystrom  # the real task
    python train_lra.py config/lra_image.toml --source=cifar-10-python.tar.gz    # downloaded data
    python train_lra.py listops --eval_only --show=5                 # look at predictions

Tasks: listops, text, retrieval, image, pathfinder, pathx (Tay et al. 2020, arXiv 2011.04006). The
metric is accuracy. The best checkpoint is chosen on the validation split; the test split is read
once, for that checkpoint.
"""
import engine.startup  # noqa: F401  (first: it answers mistakes before PyTorch is loaded)

# isort: split
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from data import listops, lra
from data.folders import expecting
from data.order import Shuffled, spread
from engine import checkpoint, options
from engine.device import Compute
from engine.options import DATA, FREE, LOCAL, SOURCE, at_least, not_empty
from engine.run import RESULT, open_run, writing
from engine.trainer import Task, Trainer, TrainerConfig
from model import Classifier, ModelConfig

TASKS = tuple(lra.TASKS)
IMAGES = ("image", "pathfinder", "pathx")
PATHFINDER = ("size", "contour_length", "distractors", "seed_distance")
GENERATED = {  # the options that each generator takes
    "listops": ("min_length", "max_length", "max_depth", "max_args"),
    "pathfinder": PATHFINDER,
    "pathx": PATHFINDER,
}


@dataclass
class Config(TrainerConfig, ModelConfig):
    task: Annotated[Literal[TASKS], "what to classify", DATA] = "listops"
    source: Annotated[str, "released archive or folder to read; empty: generate, or look in "
                           "data_dir", SOURCE] = ""
    data_dir: Annotated[str, "where prepared data is kept and downloads are looked for",
                        LOCAL, not_empty] = "data"
    n_train: Annotated[int, "generated training samples", DATA] = 50000
    n_val: Annotated[int, "generated validation samples", DATA] = 2000
    n_test: Annotated[int, "generated test samples", DATA] = 2000
    min_length: Annotated[int, "listops: keep trees longer than this", DATA] = 8
    max_length: Annotated[int, "listops: and shorter than this", DATA] = 129
    max_depth: Annotated[int, "listops: deepest level", DATA] = 4
    max_args: Annotated[int, "listops: most arguments of an operator", DATA] = 5
    size: Annotated[int, "pathfinder, pathx: pixels a side", DATA] = 32
    contour_length: Annotated[int, "pathfinder, pathx: paddles of a target snake", DATA] = 14
    distractors: Annotated[int, "pathfinder, pathx: number of distractor snakes", DATA] = 5
    seed_distance: Annotated[int, "pathfinder, pathx: pixels between the starts of the two "
                                  "targets", DATA] = 7
    show: Annotated[int, "with eval_only: show this many test inputs with prediction and label",
                    FREE, at_least(0)] = 0
    # Other defaults than train.py's, for the small ListOps (BENCHMARKS.md); AdamW wants a
    # learning_rate of 2e-3.
    out_dir: str = "out-lra-listops-small"
    optimizer: str = "muon"
    batch_size: int = 32
    max_iters: int = 4000
    learning_rate: float = 1e-3
    matrix_interval: int = 3
    min_lr: float = 2e-5
    eval_interval: int = 500
    block_size: int = 128
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64
    n_inner: int = 128
    bias: bool = True
    landmarks: int = 16


class Classification(Task):
    """One label a sequence."""
    train_metrics = ("train_loss", "train_accuracy")
    objective = "val_accuracy"

    def __init__(self, config: Config, folder: Path):
        self.folder = folder
        self.seed = config.seed
        self.batch_size = config.batch_size
        self.eval_limit = config.eval_iters * config.batch_size
        self.meta, self.splits = lra.load(folder)
        self.shuffled = Shuffled(len(self.splits["train"]))

    def batch(self, first, count):
        """Of an endless sequence of epochs, each a permutation: tokens, mask, labels."""
        return self.splits["train"].batch(self.shuffled.indices(first, count, self.seed))

    def loss(self, model, x, mask, y):
        logits, loss = model(x, mask, y)
        right = logits.argmax(dim=-1) == y  # (B,)
        return loss, right.float().mean()

    @torch.no_grad()
    def predict(self, model, compute: Compute, split: str, indices) -> tuple[float, torch.Tensor]:
        """-> (mean loss, predictions (n,) on the CPU) of a few samples."""
        x, mask, y = compute.move(*self.splits[split].batch(indices))
        with compute.autocast():
            logits, loss = model(x, mask, y)
        return float(loss), logits.argmax(dim=-1).cpu()

    def score(self, model, compute: Compute, split: str,
              limit: int | None = None) -> tuple[float, float]:
        """(mean loss, accuracy) over a split, each sample counted once over all processes.

        Over `limit` samples spread evenly, if given.
        """
        size = len(self.splits[split])
        indices = spread(limit or size, size)
        total = right = 0.0
        for few, count in compute.rounds(indices, self.batch_size):
            loss, predicted = self.predict(model, compute, split, few)
            total += loss * count
            right += (predicted.numpy() == self.splits[split].labels[few])[:count].sum()
        total, right = compute.reduce([total, float(right)])
        return total / len(indices), right / len(indices)

    def evaluate(self, model, compute: Compute) -> dict[str, float]:
        loss, accuracy = self.score(model, compute, "val", self.eval_limit)
        return {"val_loss": loss, "val_accuracy": accuracy}

    def probe(self, model, compute: Compute):
        few = np.arange(min(4, len(self.splits["val"])))
        x, mask, _ = compute.move(*self.splits["val"].batch(few))
        model(x, mask)
        return mask.view(-1, mask.size(-1))  # the towers of a pair are sequences of their own

    def state(self) -> dict:
        return identity(self.meta)


def identity(meta: dict) -> dict:
    """What identifies prepared data: of its meta.json, what a checkpoint keeps."""
    names = ("task", "classes", "vocab_size", "towers", "block_size", "seed", "counts", "sizes",
             "sha256")
    return {name: meta[name] for name in names}


def prepare(config: Config) -> Path:
    generate = None
    if not config.source and config.task in GENERATED:
        generate = {"train": config.n_train, "val": config.n_val, "test": config.n_test}
        generate |= {name: getattr(config, name) for name in GENERATED[config.task]}
    return lra.prepare(config.task, config.data_dir, source=config.source or None,
                       block_size=config.block_size, generate=generate)


def open(config: Config, compute: Compute) -> tuple[Classification, Classifier]:
    """The task, its data prepared where it was not, and a model with its first weights."""
    folder = compute.once_per_node(lambda: prepare(config))
    task = Classification(config, folder)
    compute.check_same(task.state())
    return task, new_model(config, task, compute)


def new_model(config: Config, task: Classification, compute: Compute) -> Classifier:
    torch.manual_seed(config.seed)
    sizes = [task.meta[name] for name in ("vocab_size", "classes", "towers")]
    return Classifier(config, *sizes).to(compute.device)


def test(config: Config, task: Classification, model: Classifier, compute: Compute):
    """The test accuracy of the best checkpoint, beside answers that read no sequence."""
    folder = Path(config.out_dir)
    best = checkpoint.read(folder / "best.pt")
    checkpoint.restore_model(model, task, best, folder)
    loss, accuracy = task.score(model.eval(), compute, "test")
    compute.on_main(lambda: report(config, task, model, compute, best, loss, accuracy))


def report(config: Config, task: Classification, model: Classifier, compute: Compute, best: dict,
           loss: float, accuracy: float):
    """Print the test result of the checkpoint `best`.

    It is also written to the run's folder unless an evaluation changes the preconditioner. Raises
    UserError where that cannot be written to.
    """
    folder = Path(config.out_dir)
    guesses = {name: values["test"] for name, values in task.meta["baselines"].items()}
    samples = len(task.splits["test"])
    print(f"test accuracy {accuracy:.1%} on {samples:,} samples (best checkpoint by validation "
          f"accuracy, step {best['step']})")
    names = {"majority": "the most frequent class",
             "root": "the most frequent class of the root operator"}
    for name, value in guesses.items():
        print(f"  {value:6.1%} by guessing {names[name]}")
    theirs = options.resume(Config, best["config"], {})  # with what is newer than it
    same = all(getattr(config, name) == getattr(theirs, name) for name in asdict(config)
               if name.startswith("precond"))
    result = {"step": best["step"], "val_accuracy": best["best"]["value"],
              "test_accuracy": accuracy, "test_loss": loss, "test_samples": samples,
              "baselines": guesses}
    if same:
        with writing(folder):
            (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    if config.show:
        show(config, task, model, compute)


def show(config: Config, task: Classification, model: Classifier, compute: Compute):
    """The first test inputs with prediction and label: text, or images as PNG in out_dir."""
    indices = np.arange(min(config.show, len(task.splits["test"])))
    x, mask, y = task.splits["test"].batch(indices)
    size = config.batch_size
    predicted = torch.cat([task.predict(model, compute, "test", indices[i:i + size])[1]
                           for i in range(0, len(indices), size)])
    for i, label, answer in zip(indices, y.tolist(), predicted.tolist()):
        said = f"predicted {answer}, label {label}" + ("" if answer == label else "  (wrong)")
        if config.task in IMAGES:
            path = Path(config.out_dir) / f"test_{i}_predicted_{answer}_label_{label}.png"
            save_image(x[i].numpy(), path)
            print(f"{path}: {said}")
        elif config.task == "listops":
            print(f"{said}: {listops.to_text(x[i][mask[i]].numpy())}")
        else:
            towers = zip(x[i].view(-1, x.size(-1)), mask[i].view(-1, x.size(-1)))
            texts = [bytes(t[m].tolist()).decode("utf-8", "replace") for t, m in towers]
            print(f"{said}: " + "\n  and: ".join(texts))


def save_image(grey: np.ndarray, path: Path):
    """A square image, (pixels,) of grey levels, as a PNG large enough to look at."""
    from PIL import Image

    side = round(len(grey) ** 0.5)
    picture = Image.fromarray(grey.reshape(side, side).astype(np.uint8))
    with writing(path.parent):
        picture.resize((512, 512), Image.Resampling.NEAREST).save(path)


def preset_of_task(argv: list[str]) -> list[str]:
    return options.preset_of_task(argv, TASKS, "lra")


def main():
    run = open_run(Config, preset_of_task(sys.argv[1:]), __doc__)
    config = run.config
    expected = expecting(lambda meta: checkpoint.same_data(run.saved, identity(meta)))
    with run.compute() as compute, expected:
        if config.show and config.task in IMAGES:
            compute.on_main(lambda: options.need("PIL", "--show saves images with"))
        task, model = open(config, compute)
        if compute.main:
            meta = task.meta
            counts = ", ".join(f"{n:,} {split}" for split, n in meta["counts"].items())
            print(f"data: {task.folder}, {meta['made']}, {counts}, "
                  f"{sum(meta['cut'].values()):,} cut at block_size={config.block_size}\n"
                  f"model: {model.n_parameters():,} parameters, attention={config.attention}, "
                  f"{config.describe_precond()}\n"
                  f"compute: {compute.describe()}", flush=True)
        if not config.eval_only:
            run.finish(Trainer(config, task, model, compute, run.saved).run(), compute)
            if config.shard:
                model = new_model(config, task, compute)  # this one is whole
        test(config, task, model, compute)
        if compute.main and not config.eval_only:
            out = shlex.quote(config.out_dir)
            print(f"""\
next: python train_lra.py --eval_only --show=5 --out_dir={out}   # predictions
      python plot.py {out}                    # figures (requirements-extra.txt)
      python compare.py train_lra.py {out}/config.toml --vary precond=False,True --seeds=3""")


if __name__ == "__main__":
    options.run(main)
