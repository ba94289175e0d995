"""Train a GPT on text, with or without preconditioned attention.

    python train.py                                     # Shakespeare, characters, two minutes
    python train.py --precond=True --out_dir=out-on     # each head's output preconditioned
    python train.py config/shakespeare_char_gpu.toml    # a preset; any option can follow
    python train.py --dataset=my.txt --out_dir=out-mine # your own text
    python train.py --init_from=resume                  # go on where a run was stopped
    torchrun --standalone --nproc_per_node=4 train.py config/gpt2_124m.toml
"""
import engine.startup  # noqa: F401  (first: it answers mistakes before PyTorch is loaded)

# isort: split
import math
import shlex
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from attention import MECHANISMS
from data import text
from data.folders import expecting
from engine import options, pretrained
from engine.checkpoint import load_weights, same_data
from engine.device import Compute
from engine.options import DATA, LOCAL, SOURCE, not_empty
from engine.run import OWN, open_run
from engine.trainer import Task, Trainer, TrainerConfig
from model import GPT, ModelConfig


@dataclass
class Config(TrainerConfig, ModelConfig):
    dataset: Annotated[str, "shakespeare, tinyshakespeare, tinystories, openwebtext, fineweb, "
                            "or path/to/text.txt", SOURCE, not_empty] = "shakespeare"
    tokenizer: Annotated[Literal["auto", "char", "gpt2", "bytes"],
                         "auto: gpt2 for the three large datasets, else char", DATA] = "auto"
    data_dir: Annotated[str, "where prepared data is kept", LOCAL, not_empty] = "data"
    init_from: Annotated[str, "scratch, resume, auto (resume if there is something to resume), "
                              "gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a Hugging Face GPT-2 "
                              "folder"] = "scratch"
    # Measured to be the best in two minutes (BENCHMARKS.md); AdamW wants a learning_rate of 3e-3.
    optimizer: str = "muon"
    init: str = "zero"
    max_iters: int = 1500
    learning_rate: float = 1.2e-2
    momentum: float = 0.9
    lr_schedule: str = "linear"
    warmup_iters: int = 50
    min_lr: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if reason := MECHANISMS[self.attention].acausal:
            raise ValueError(f"attention={self.attention} is not causal: {reason}, so a language "
                             "model would see what it has to predict. Use softmax or linear")


class LanguageModelling(Task):
    """Predict the next token. Loss in nats per token, and in bits per byte of the text."""
    train_metrics = ("train_loss",)
    objective = "val_loss"

    def __init__(self, config: Config, folder):
        self.folder, self.meta = folder, text.read_meta(folder)
        self.batch_size, self.block_size = config.batch_size, config.block_size
        self.train = text.Tokens(folder, "train")
        self.val = text.Tokens(folder, "val")
        self.blocks = text.Blocks(self.train, config.block_size, config.seed)
        # The same blocks at every evaluation, and whatever the number of processes.
        self.val_starts = text.eval_blocks(self.val, config.block_size,
                                           config.eval_iters * config.batch_size)

    def batch(self, first, count):
        x, y = self.blocks.batch(first, count)  # (count, block_size) each, y one token further
        return torch.from_numpy(x), torch.from_numpy(y)

    def loss(self, model, x, y):
        return (model(x, y)[1],)

    @torch.no_grad()
    def evaluate(self, model, compute: Compute) -> dict[str, float]:
        total = 0.0
        for few, count in compute.rounds(self.val_starts, self.batch_size):
            window = torch.from_numpy(self.val.gather(few, self.block_size + 1))
            x, y = compute.move(window[:, :-1], window[:, 1:])
            with compute.autocast():
                _, loss = model(x, y)
            total += loss.item() * count
        loss = compute.reduce([total])[0] / len(self.val_starts)
        # Bits per byte of text compare between tokenizers, whose tokens differ in length.
        bits = loss / math.log(2)
        return {"val_loss": loss, "val_bpb": bits * len(self.val) / self.val.bytes}

    def probe(self, model, compute: Compute):
        window = self.val.gather(self.val_starts[:4], self.block_size)
        x, = compute.move(torch.from_numpy(window))
        model(x)  # no mask to return: all tokens are real

    def state(self) -> dict:
        return identity(self.meta)


def identity(meta: dict) -> dict:
    """What identifies prepared text: of its meta.json, what a checkpoint keeps."""
    return {"tokenizer": meta["tokenizer"], "vocab_size": meta["vocab_size"],
            "data_sha256": {name: split["sha256"] for name, split in meta["splits"].items()}}


def open(config: Config, compute: Compute) -> tuple[LanguageModelling, GPT]:
    """The task, its data prepared where it was not, and a model with its first weights."""
    folder = compute.once_per_node(
        lambda: text.prepare(config.dataset, config.data_dir, config.tokenizer))
    task = LanguageModelling(config, folder)
    compute.check_same(task.state())
    torch.manual_seed(config.seed)
    return task, GPT(config, task.meta["vocab_size"])


def main():
    run = open_run(Config, sys.argv[1:], __doc__)
    weights = None
    if run.fresh and run.config.init_from not in OWN:
        weights = pretrained.start(run)
    config = run.config
    expected = expecting(lambda meta: same_data(run.saved, identity(meta)))
    with run.compute() as compute, expected:
        task, model = open(config, compute)
        if weights:
            pretrained.check_vocabulary(config.init_from, weights, task.meta)
            # A learned power is not among the weights: it keeps its first value.
            load_weights(model, model.state_dict() | weights, config.init_from)
        if compute.main:
            limit = task.meta.get("max_tokens")  # older folders do not say
            limited = f" (a part: max_tokens={limit:,})" if limit else ""
            print(f"data: {task.folder}, {len(task.train):,} training and {len(task.val):,} "
                  f"validation tokens{limited}, vocabulary {task.meta['vocab_size']:,}\n"
                  f"model: {model.n_parameters():,} parameters, block_size={config.block_size}, "
                  f"{config.describe_precond()}\n"
                  f"compute: {compute.describe()}", flush=True)
        if config.eval_only:
            run.evaluate(task, model, compute)
            return
        run.finish(Trainer(config, task, model, compute, run.saved).run(), compute)
        if compute.main:
            out = shlex.quote(config.out_dir)
            print(f"""\
next: python sample.py --out_dir={out}        # text from the best checkpoint
      python plot.py {out}                    # figures (requirements-extra.txt)
      python compare.py train.py {out}/config.toml --vary precond=False,True --seeds=3""")


if __name__ == "__main__":
    options.run(main)
