"""Train a GPT on text, with or without preconditioned attention.

    python train.py                                             # Shakespeare, characters, about two minutes on two CPU cores
    python train.py --precond=True                              # the same with each head's output preconditioned
    python train.py config/shakespeare_char_gpu.toml            # a preset; any option can follow
    python train.py --dataset=my.txt --out_dir=out-mine         # your own text
    python train.py --init_from=resume                          # go on where a run was stopped
    torchrun --standalone --nproc_per_node=4 train.py config/gpt2_124m.toml
"""
import math
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch

from engine import options
from engine import pretrained
from engine import run as session
from engine.checkpoint import load_weights
from engine.options import UserError
from data import text
from engine.device import Compute
from model import GPT, ModelConfig
from engine.trainer import Trainer, TrainerConfig

GPT2_VOCABULARY = 50257


@dataclass
class Config(TrainerConfig, ModelConfig):
    dataset: Annotated[str, "shakespeare, tinyshakespeare, tinystories, openwebtext, fineweb, or path/to/text.txt", "fixed"] = "shakespeare"
    tokenizer: Annotated[Literal["auto", "char", "gpt2", "bytes"], "auto: gpt2 for the three large datasets, else char", "fixed"] = "auto"
    data_dir: Annotated[str, "where prepared data is kept"] = "data"
    init_from: Annotated[str, "scratch, resume, auto (resume if there is something to resume), gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
                              "or a Hugging Face GPT-2 folder"] = "scratch"

    def __post_init__(self):
        ModelConfig.__post_init__(self)
        TrainerConfig.__post_init__(self)
        if self.attention == "nystrom":
            raise ValueError("attention=nystrom is not causal: its landmarks average over future tokens, so a language model would see what "
                             "it has to predict. Use softmax or linear")


class LanguageModelling:
    """The task: predict the next token. Loss in nats per token, and in bits per byte of the text."""
    train_metrics = ("train_loss",)
    objective = ("val_loss", "min")

    def __init__(self, config: Config, folder):
        self.batch_size = config.batch_size
        train, self.val = text.Tokens(folder, "train"), text.Tokens(folder, "val")
        self.blocks = text.Blocks(train, config.block_size, config.seed)
        self.val_starts = text.eval_blocks(self.val, config.block_size, config.eval_iters * config.batch_size)
        self.block_size, self.meta = config.block_size, text.read_meta(folder)

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(map(torch.from_numpy, self.blocks.batch(first, count)))  # tokens and targets, (count, block_size) each

    def loss(self, model, x, y):
        return (model(x, y)[1],)

    @torch.no_grad()
    def evaluate(self, model, compute: Compute) -> dict[str, float]:
        starts = self.val_starts[compute.rank::compute.world]
        total = 0.0
        for i in range(0, len(starts), self.batch_size):
            windows = torch.from_numpy(self.val.gather(starts[i:i + self.batch_size], self.block_size + 1))
            x, y = compute.move(windows[:, :-1], windows[:, 1:])
            with compute.autocast():
                total += model(x, y)[1].item() * len(x)
        loss = compute.reduce([total])[0] / len(self.val_starts)
        return {"val_loss": loss, "val_bpb": loss / math.log(2) * len(self.val) / self.val.bytes}

    def probe(self, model, compute: Compute):
        x, = compute.move(torch.from_numpy(self.val.gather(self.val_starts[:4], self.block_size)))
        model(x)

    def state(self) -> dict:
        return {"tokenizer": self.meta["tokenizer"], "vocab_size": self.meta["vocab_size"],
                "data_sha256": {name: split["sha256"] for name, split in self.meta["splits"].items()}}


def start_from_pretrained(config: Config, given: dict) -> tuple[Config, dict]:
    """The configuration with the shape of the GPT-2 that init_from names, and its weights. A block_size among the options that are given
    cuts its positions; the preconditioner that an export names is kept where they do not say otherwise."""
    shapes, precond, weights = pretrained.read(config.init_from, given.get("block_size"))
    vocab_size = shapes.pop("vocab_size")
    shapes |= {"attention": "softmax", "n_inner": 0}
    for key, value in shapes.items():
        if key in given and given[key] not in (value, 4 * shapes["n_embd"] if key == "n_inner" else value):
            raise UserError(f"{key}={given[key]}, but {config.init_from} has {key}={value}: leave the option out")
    tokenizer = "gpt2" if config.tokenizer == "auto" and vocab_size == GPT2_VOCABULARY else config.tokenizer
    kept = {key: value for key, value in precond.items() if key not in given}
    return options.build(Config, asdict(config) | shapes | kept | {"tokenizer": tokenizer}), weights


def main():
    config, given, saved = session.open_run(Config, sys.argv[1:], __doc__)
    weights = None
    if saved is None and config.init_from not in ("scratch", "auto"):
        config, weights = start_from_pretrained(config, given)
    with session.compute_for(config, saved) as compute:
        folder = compute.once_per_node(lambda: text.prepare(config.dataset, config.data_dir, config.tokenizer))
        task = LanguageModelling(config, folder)
        torch.manual_seed(config.seed)
        model = GPT(config, task.meta["vocab_size"])
        if weights:
            pretrained.check_vocabulary(config.init_from, weights, task.meta)
            load_weights(model, model.state_dict() | weights, config.init_from)  # a learned power is not among the weights
        if compute.main:
            print(f"data: {folder}, {len(task.blocks.tokens):,} training and {len(task.val):,} validation tokens, "
                  f"vocabulary {task.meta['vocab_size']:,}\nmodel: {model.n_parameters():,} parameters, block_size={config.block_size}, "
                  f"{config.describe_precond()}\ncompute: {compute.describe()}", flush=True)
        if config.eval_only:
            session.evaluate_only(config, task, model, compute, saved)
            return
        session.finish(config, Trainer(config, task, model, compute, saved).run(), compute)
        if compute.main:
            print(f"next: python sample.py --out_dir={config.out_dir}        # text from the best checkpoint\n"
                  f"      python plot.py {config.out_dir}                    # figures (pip install -r requirements-extra.txt)\n"
                  f"      python compare.py train.py --vary precond=False,True   # with and without, over seeds, with intervals")


if __name__ == "__main__":
    options.run(main)
