"""Adding a mechanism, an optimizer, an option, a metric and a task: each in one place, from here.

Each is then trained with, preconditioned and not.
"""
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
import torch

import attention
import model
import train
from conftest import SMALL, error, read_metrics
from engine import metrics, optim, options
from engine.options import FIXED, at_least
from engine.run import open_run
from engine.trainer import Task, Trainer, TrainerConfig

RUN = [*SMALL, "--max_iters=6", "--eval_interval=3"]
BOTH = pytest.mark.parametrize("precond", [False, True])


def value(q, k, v, mask=None, *, is_causal=False, dropout_p=0.0):
    """Each token attends to itself alone."""
    return v


@BOTH
def test_a_mechanism(precond, corpus, tmp_path, call, monkeypatch):
    entry = attention.Mechanism(value, columns=lambda config: 0)
    monkeypatch.setitem(attention.MECHANISMS, "value", entry)
    more = ["--attention=value", f"--precond={precond}", f"--out_dir={tmp_path}"]
    assert call(train, *RUN, *corpus, *more)[0] == 0
    last = read_metrics(tmp_path)[-1]
    assert last["step"] == 6 and len(last["kappa_after"]) == 2
    assert "value" in call(train, "--help")[1]
    assert "did you mean value?" in error(call(train, "--attention=valu"))


class Fading(torch.optim.Optimizer):
    """Steps that get shorter. Its state is a plain number, and nothing."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["unused"] = None
                p.sub_(p.grad, alpha=group["lr"] / state["step"])


def fading(model, config):
    return Fading(model.parameters(), {"lr": 10 * config.learning_rate})


def sgd(model, config):
    return torch.optim.SGD(model.parameters(), lr=10 * config.learning_rate)


@BOTH
@pytest.mark.parametrize("make", [sgd, fading])
def test_an_optimizer(make, precond, corpus, tmp_path, call, monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "mine", make)
    more = ["--optimizer=mine", "--log_interval=1", f"--precond={precond}"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call(train, *RUN, *corpus, *more, f"--out_dir={whole}")[0] == 0
    assert call(train, *RUN, *corpus, *more, f"--out_dir={stopped}", "--max_iters=3",
                "--lr_decay_iters=6")[0] == 0
    assert call(train, f"--out_dir={stopped}", "--init_from=resume", "--max_iters=6")[0] == 0
    assert read_metrics(stopped)[-1] == read_metrics(whole)[-1]


def test_rates_follow_one_schedule(monkeypatch):
    """Each group keeps its own peak: ten times the configured rate all the way."""
    monkeypatch.setitem(optim.OPTIMIZERS, "sgd", sgd)
    config = TrainerConfig(optimizer="sgd", learning_rate=0.5, warmup_iters=4, max_iters=20)
    optimizer = optim.make_optimizer(torch.nn.Linear(2, 2), config)
    for step in (0, 3, 10, 20):
        rate = optim.set_learning_rates(optimizer, config, step)
        assert rate == optim.learning_rate(config, step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(10 * rate)


@BOTH
def test_an_option(precond, corpus, tmp_path, call, monkeypatch):
    @dataclass
    class Config(train.Config):
        smoothing: Annotated[float, "label smoothing", FIXED, at_least(0)] = 0.0
    monkeypatch.setattr(train, "Config", Config)
    assert "--smoothing=0.0" in call(train, "--help")[1]
    assert "smoothing=-1.0 must not be negative" in error(call(train, "--smoothing=-1"))
    run = [*RUN, *corpus, f"--precond={precond}", f"--out_dir={tmp_path}", "--smoothing=0.5"]
    assert call(train, *run)[0] == 0
    assert "smoothing = 0.5" in (tmp_path / "config.toml").read_text()
    again = ["--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=8"]
    assert "has smoothing=0.5" in error(call(train, *again, "--smoothing=0.1"))
    assert call(train, *again)[0] == 0


@BOTH
def test_a_metric(precond, corpus, tmp_path, call, monkeypatch):
    class WithPerplexity(train.LanguageModelling):
        def evaluate(self, model, compute):
            record = super().evaluate(model, compute)
            return record | {"val_perplexity": 2.718281828 ** record["val_loss"]}
    metric = metrics.Metric("perplexity", "tokens", "lower", short="ppl", digits=2)
    monkeypatch.setitem(metrics.METRICS, "val_perplexity", metric)
    monkeypatch.setattr(train, "LanguageModelling", WithPerplexity)
    code, out, _ = call(train, *RUN, *corpus, f"--precond={precond}", f"--out_dir={tmp_path}")
    last = read_metrics(tmp_path)[-1]
    assert code == 0 and f"val perplexity {last['val_perplexity']:.2f}" in out
    assert metrics.judging(last) == "val_perplexity"
    assert metrics.is_better("val_perplexity", 1.0, than=2.0)


class Counting(Task):
    """Numbers that go up by one, modulo 7: the next one is certain."""
    train_metrics = ("train_loss",)
    objective = "val_loss"

    def __init__(self, config):
        self.config = config

    def samples(self, numbers):
        start = torch.tensor(list(numbers))[:, None]
        row = (start + torch.arange(self.config.block_size + 1)) % 7
        return row[:, :-1], row[:, 1:]

    def batch(self, first, count):
        return self.samples(range(first, first + count))

    def loss(self, model, x, y):
        return (model(x, y)[1],)

    @torch.no_grad()
    def evaluate(self, model, compute):
        return {"val_loss": model(*compute.move(*self.samples(range(7))))[1].item()}

    def probe(self, model, compute):
        model(*compute.move(self.samples(range(4))[0]))

    def state(self):
        return {"modulus": 7}


class Script:
    """What a file of its own beside train.py would hold."""
    __name__ = "train_counting"

    @dataclass
    class Config(TrainerConfig, model.ModelConfig):
        out_dir: str = "out-counting"

    @staticmethod
    def open(config, compute):
        torch.manual_seed(config.seed)
        return Counting(config), model.GPT(config, vocab_size=7)

    @classmethod
    def main(cls):
        run = open_run(cls.Config, sys.argv[1:], "Count.")
        with run.compute() as compute:
            task, gpt = cls.open(run.config, compute)
            run.finish(Trainer(run.config, task, gpt, compute, run.saved).run(), compute)


@BOTH
def test_a_task(precond, tmp_path, call):
    script = Script()
    more = [f"--precond={precond}", "--learning_rate=1e-2", "--warmup_iters=5",
            f"--out_dir={tmp_path}"]
    assert call(script, *SMALL, *more, "--max_iters=20", "--lr_decay_iters=60")[0] == 0
    assert call(script, "--init_from=resume", "--max_iters=60", f"--out_dir={tmp_path}")[0] == 0
    records = read_metrics(tmp_path)
    losses = [r["val_loss"] for r in records if "val_loss" in r]
    assert losses[-1] < 0.2 < losses[0]
    assert options.options(Script.Config)["out_dir"].default == "out-counting"
