"""Long Range Arena: classify long sequences, with or without preconditioned attention.

    python train_lra.py                                        # ListOps up to 128 symbols, generated: minutes on two CPU cores
    python train_lra.py listops --precond=True --out_dir=out-lra-on                # the same, preconditioned
    python train_lra.py pathfinder --attention=nystrom         # a task by name takes its laptop preset, where it has one
    python train_lra.py config/lra_listops.toml --attention=nystrom                # the real task, 2,000 symbols
    python train_lra.py config/lra_image.toml --source=cifar-10-python.tar.gz      # downloaded data
    python train_lra.py listops --eval_only --show=5           # look at predictions of the best checkpoint

Tasks: listops, text, retrieval, image, pathfinder, pathx (Tay et al. 2020, arXiv 2011.04006). The metric is accuracy. The best checkpoint
is chosen on the validation split; the test split is read once, for that checkpoint.
"""
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from engine import checkpoint
from engine import options
from engine import run as session
from engine.options import UserError
from data import listops, lra
from data.order import Shuffled
from engine.device import Compute
from model import Classifier, ModelConfig
from engine.trainer import Trainer, TrainerConfig

TASKS = tuple(lra.TASKS)
GENERATED = {  # the options that each generator takes
    "listops": ("min_length", "max_length", "max_depth", "max_args"),
    "pathfinder": ("size", "contour_length", "distractors", "seed_distance"),
    "pathx": ("size", "contour_length", "distractors", "seed_distance"),
}


@dataclass
class Config(TrainerConfig, ModelConfig):
    task: Annotated[Literal[TASKS], "what to classify", "fixed"] = "listops"
    source: Annotated[str, "released archive or folder to read; empty: generate, or look in data_dir", "fixed"] = ""
    data_dir: Annotated[str, "where prepared data is kept and downloads are looked for"] = "data"
    n_train: Annotated[int, "generated training samples", "fixed"] = 50000
    n_val: Annotated[int, "generated validation samples", "fixed"] = 2000
    n_test: Annotated[int, "generated test samples", "fixed"] = 2000
    min_length: Annotated[int, "listops: keep trees longer than this", "fixed"] = 8
    max_length: Annotated[int, "listops: and shorter than this", "fixed"] = 129
    max_depth: Annotated[int, "listops: deepest level", "fixed"] = 4
    max_args: Annotated[int, "listops: most arguments of an operator", "fixed"] = 5
    size: Annotated[int, "pathfinder, pathx: pixels a side", "fixed"] = 32
    contour_length: Annotated[int, "pathfinder, pathx: paddles of a target snake", "fixed"] = 14
    distractors: Annotated[int, "pathfinder, pathx: number of distractor snakes", "fixed"] = 5
    seed_distance: Annotated[int, "pathfinder, pathx: pixels between the starts of the two targets", "fixed"] = 7
    out_dir: Annotated[str, "folder of the run: checkpoints, metrics, configuration"] = "out-lra-listops-small"
    batch_size: Annotated[int, "sequences in one forward pass of one process"] = 32
    max_iters: Annotated[int, "training steps"] = 4000
    learning_rate: Annotated[float, "peak learning rate"] = 2e-3
    min_lr: Annotated[float, "learning rate at the end"] = 2e-5
    eval_interval: Annotated[int, "steps between evaluations, each followed by a checkpoint"] = 500
    show: Annotated[int, "with eval_only: show this many test inputs with prediction and label"] = 0
    block_size: Annotated[int, "longest sequence in tokens; longer ones are cut", "fixed"] = 128
    n_layer: Annotated[int, "number of blocks", "fixed"] = 2
    n_head: Annotated[int, "attention heads per block", "fixed"] = 2
    n_embd: Annotated[int, "width of the model", "fixed"] = 64
    n_inner: Annotated[int, "width of the feed-forward layer; 0: 4 n_embd", "fixed"] = 128
    bias: Annotated[bool, "biases in linear layers and layer norms", "fixed"] = True
    landmarks: Annotated[int, "landmarks of nystrom attention", "fixed"] = 16

    def __post_init__(self):
        ModelConfig.__post_init__(self)
        TrainerConfig.__post_init__(self)
        if self.show < 0:
            raise ValueError(f"show={self.show} must not be negative")


class Classification:
    """The task: one label a sequence."""
    train_metrics = ("train_loss", "train_accuracy")
    objective = ("val_accuracy", "max")

    def __init__(self, config: Config, folder: Path):
        self.batch_size, self.seed, self.eval_limit = config.batch_size, config.seed, config.eval_iters * config.batch_size
        self.meta, self.splits = lra.load(folder)
        self.shuffled = Shuffled(len(self.splits["train"]))

    def batch(self, first: int, count: int) -> list[torch.Tensor]:
        """Samples of an endless sequence of epochs, each a permutation drawn from (seed, epoch): tokens, mask, labels."""
        return self.splits["train"].batch(self.shuffled.indices(first, count, self.seed))

    def loss(self, model, x, mask, y):
        logits, loss = model(x, mask, y)
        return loss, (logits.argmax(dim=-1) == y).float().mean()

    @torch.no_grad()
    def predict(self, model, compute: Compute, split: str, indices) -> tuple[float, torch.Tensor]:
        """-> (sum of the losses, predictions (n,) on the CPU) of this process's samples."""
        total, predicted = 0.0, []
        for i in range(0, len(indices), self.batch_size):
            x, mask, y = compute.move(*self.splits[split].batch(indices[i:i + self.batch_size]))
            with compute.autocast():
                logits, loss = model(x, mask, y)
            total += float(loss) * len(y)
            predicted.append(logits.argmax(dim=-1).cpu())
        return total, torch.cat(predicted) if predicted else torch.zeros(0, dtype=torch.int64)

    def score(self, model, compute: Compute, split: str, limit: int | None = None) -> tuple[float, float]:
        """(mean loss, accuracy) over a split, each sample counted once over all processes; over `limit` samples spread evenly, if given."""
        size = len(self.splits[split])
        count = min(limit or size, size)
        indices = (np.arange(count) * size // count)[compute.rank::compute.world]
        loss, predicted = self.predict(model, compute, split, indices)
        right = (predicted.numpy() == self.splits[split].labels[indices]).sum()
        loss, right = compute.reduce([loss, float(right)])
        return loss / count, right / count

    def evaluate(self, model, compute: Compute) -> dict[str, float]:
        return dict(zip(("val_loss", "val_accuracy"), self.score(model, compute, "val", self.eval_limit)))

    def probe(self, model, compute: Compute):
        x, mask, _ = compute.move(*self.splits["val"].batch(np.arange(min(4, len(self.splits["val"])))))
        model(x, mask)
        return mask.view(-1, mask.size(-1))  # the two towers of a pair are sequences of their own

    def state(self) -> dict:
        return {name: self.meta[name] for name in ("task", "classes", "vocab_size", "towers", "block_size", "seed", "counts", "sizes")}


def prepare(config: Config) -> Path:
    generate = None
    if not config.source and config.task in GENERATED:
        generate = {"train": config.n_train, "val": config.n_val, "test": config.n_test}
        generate |= {name: getattr(config, name) for name in GENERATED[config.task]}
    return lra.prepare(config.task, config.data_dir, source=config.source or None, block_size=config.block_size, generate=generate)


def test(config: Config, task: Classification, model: Classifier, compute: Compute):
    """Print the accuracy of the best checkpoint on the test split, beside answers that read no sequence; write it to test.json unless an
    evaluation changes the preconditioner."""
    folder = Path(config.out_dir)
    best = checkpoint.read(folder / "best.pt")
    checkpoint.restore_model(model, task, best, folder)
    loss, accuracy = task.score(model.eval(), compute, "test")
    baselines = {name: values["test"] for name, values in task.meta["baselines"].items()}
    if compute.main:
        result = {"step": best["step"], "val_accuracy": best["best"]["value"], "test_accuracy": accuracy, "test_loss": loss,
                  "test_samples": len(task.splits["test"]), "baselines": baselines}
        if all(best["config"][name] == getattr(config, name) for name in asdict(config) if name.startswith("precond")):
            (folder / "test.json").write_text(json.dumps(result, indent=1) + "\n")
        names = {"majority": "the most frequent class", "root": "the most frequent class of the root operator"}
        print(f"test accuracy {accuracy:.1%} on {result['test_samples']:,} samples (best checkpoint by validation accuracy, step {best['step']})")
        for name, value in baselines.items():
            print(f"  {value:6.1%} by guessing {names[name]}")
    if config.show and compute.main:
        show(config, task, model, compute)


def show(config: Config, task: Classification, model: Classifier, compute: Compute):
    """The first test inputs with prediction and label: text on the terminal, images as PNG in out_dir."""
    indices = np.arange(min(config.show, len(task.splits["test"])))
    x, mask, y = task.splits["test"].batch(indices)
    _, predicted = task.predict(model, compute, "test", indices)
    for i, label, answer in zip(indices, y.tolist(), predicted.tolist()):
        verdict = f"predicted {answer}, label {label}" + ("" if answer == label else "  (wrong)")
        if config.task in ("image", "pathfinder", "pathx"):
            try:
                from PIL import Image
            except ImportError:
                raise UserError("--show saves images with pillow: pip install -r requirements-extra.txt") from None
            side = round(x.size(1) ** 0.5)
            path = Path(config.out_dir) / f"test_{i}_predicted_{answer}_label_{label}.png"
            picture = Image.fromarray(x[i].view(side, side).numpy().astype(np.uint8))
            picture.resize((512, 512), Image.Resampling.NEAREST).save(path)
            print(f"{path}: {verdict}")
        elif config.task == "listops":
            print(f"{verdict}: {listops.to_text(x[i][mask[i]].numpy())}")
        else:
            texts = [bytes(t[m].tolist()).decode("utf-8", "replace") for t, m in zip(x[i].view(-1, x.size(-1)), mask[i].view(-1, x.size(-1)))]
            print(f"{verdict}: " + "\n  and: ".join(texts))


def preset_of_task(argv: list[str]) -> list[str]:
    return options.preset_of_task(argv, TASKS, "lra")


def main():
    config, _, saved = session.open_run(Config, preset_of_task(sys.argv[1:]), __doc__)
    with session.compute_for(config, saved) as compute:
        folder = compute.once_per_node(lambda: prepare(config))
        task = Classification(config, folder)
        torch.manual_seed(config.seed)
        model = Classifier(config, task.meta["vocab_size"], task.meta["classes"], task.meta["towers"]).to(compute.device)
        if compute.main:
            counts = ", ".join(f"{n:,} {split}" for split, n in task.meta["counts"].items())
            print(f"data: {folder}, {counts}, {sum(task.meta['cut'].values()):,} cut at block_size={config.block_size}\n"
                  f"model: {model.n_parameters():,} parameters, attention={config.attention}, {config.describe_precond()}\n"
                  f"compute: {compute.describe()}", flush=True)
        if not config.eval_only:
            if compute.main:
                (Path(config.out_dir) / "test.json").unlink(missing_ok=True)  # of a run that this one replaces or continues
            session.finish(config, Trainer(config, task, model, compute, saved).run(), compute)
        test(config, task, model, compute)


if __name__ == "__main__":
    options.run(main)
