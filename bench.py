"""Time and memory of training and sampling, with and without preconditioning, and beside a checkout of nanoGPT.

    python bench.py                                                 # the default size and the 6 x 384 model
    python bench.py --sizes=gpt2_124m --arms=baseline,precond       # a 124M model takes 5 GB an arm
    python bench.py --sizes=char_gpu --against=../nanoGPT           # side by side, with ratios of time and memory
    python bench.py --sizes=gpt2_124m --arms=baseline --checkpoint_activations --profile
    python bench.py --sizes=lra_listops --arms=nystrom,nystrom_precond,baseline,explicit     # Long Range Arena's longest common task

Each arm is a process of its own, so that its peak memory is its own; the processes take turns in every round, in changing order, and
wait while another works. A turn is one training step, or as many as fit into half a second, of trainer.Trainer (batch, forward and
backward pass, clipping, AdamW) on random tokens; afterwards sampling takes turns in the same way. Times are medians over all steps with
the quartiles in brackets; ratios are ratios of medians in one run.

Utilisation is model FLOPs over what the machine can do: the speed of a large matrix product in the run's dtype, the best of those
measured in every round of the same run. Model FLOPs count the matrix products, 2 FLOPs for a multiplication and an addition. A weight
matrix with N weights takes 2 N a token forward, and 2 N each for the gradients of input and weight. Attention multiplies Q with K^T and
the weights with V: 2 x 2 T C a token and layer forward, three times that in all; that a causal kernel needs only half is not counted, as
usual. So a step of B T tokens has B T (6 N + 12 n_layer C T) FLOPs: the head is a matrix product and counts, a look-up does not
(model.flops_per_token).

The arm `explicit` is softmax attention without fused kernels, with its (T, T) matrices in memory.
"""
import importlib.util
import multiprocessing
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine import options
from engine.packed import for_sampling
from engine.options import UserError
from engine.device import DTYPES, Compute, ComputeConfig, pick_device, pick_dtype
from model import GPT, Classifier, ModelConfig
from sample import generate
from engine.trainer import Task, Trainer, TrainerConfig

TURN = 0.5  # seconds


@dataclass
class Size:
    model: ModelConfig
    vocab_size: int
    batch_size: int
    sampling: list[tuple[int, int, int]]  # sequences, tokens of the prompt, new tokens
    classes: int = 0  # of a classifier; 0: a language model


SIZES = {
    "default": Size(ModelConfig(), 65, 12, [(1, 1, 63)]),
    "char_gpu": Size(ModelConfig(block_size=256, n_layer=6, n_head=6, n_embd=384), 65, 4, [(1, 1, 255), (8, 1, 255), (1, 200, 50)]),
    "gpt2_124m": Size(ModelConfig(block_size=1024, n_layer=12, n_head=12, n_embd=768), 50257, 4, [(1, 512, 50)]),
    "lra_listops": Size(ModelConfig(block_size=2000, n_layer=2, n_head=2, n_embd=64, n_inner=128, bias=True, dropout=0.1), 15, 32, [], 10),
}
ARMS = {"baseline": {}, "precond": {"precond": True}, "precond_grad": {"precond": True, "precond_grad": True}, "explicit": {"explicit": True},
        "nystrom": {"attention": "nystrom"}, "nystrom_precond": {"attention": "nystrom", "precond": True}}
NANOGPT_VOCABULARY = {50257: 50304}  # what its train.py makes of GPT-2's


@dataclass
class Config(ComputeConfig):
    sizes: Annotated[str, f"of {', '.join(SIZES)}"] = "default,char_gpu"
    arms: Annotated[str, f"of {', '.join(ARMS)}"] = "baseline,precond,precond_grad"
    against: Annotated[str, "folder of a nanoGPT checkout to time beside"] = ""
    rounds: Annotated[int, "turns of every arm"] = 8
    batch_size: Annotated[int, "sequences in a step; 0: the size's own"] = 0
    sampling: Annotated[bool, "time sampling too"] = True
    checkpoint_activations: Annotated[bool, "add an arm, the first one with activations computed again"] = False
    profile: Annotated[bool, "write a table and a trace of torch.profiler for the first arm"] = False
    out_dir: Annotated[str, "folder of the profiles"] = "bench"
    threads: Annotated[int, "of each process; 0: PyTorch's choice"] = 0
    compile: Annotated[bool, "torch.compile the models, nanoGPT's too"] = False
    loss: Annotated[Literal["auto", "plain", "chunked"], "as in train.py"] = "auto"
    fused: Annotated[bool, "as in train.py"] = True
    tune_malloc: Annotated[bool, "as in train.py"] = True

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("sizes", SIZES), ("arms", ARMS)):
            for word in getattr(self, name).split(","):
                if word not in known:
                    raise ValueError(f"--{name}={word} is unknown: choose of {','.join(known)}")
        for name in self.sizes.split(","):
            if not SIZES[name].classes and "nystrom" in self.arms:
                raise ValueError(f"--arms={self.arms}: nystrom attention is not causal, so {name} cannot have it")
            if SIZES[name].classes and self.against:
                raise ValueError(f"--against={self.against}: nanoGPT has no {name}")
        if self.rounds < 1 or self.batch_size < 0 or self.threads < 0:
            raise ValueError(f"rounds={self.rounds} must be at least 1, batch_size={self.batch_size} and threads={self.threads} "
                             "not negative")
        if self.against and not (Path(self.against) / "model.py").exists():
            raise ValueError(f"--against={self.against} holds no model.py: give the folder of a nanoGPT checkout")


class RandomTokens(Task):
    """A task for the Trainer: uniformly random tokens, and labels for a classifier."""
    train_metrics = ("train_loss",)

    def __init__(self, size: Size):
        self.tokens = torch.randint(size.vocab_size, (64, size.model.block_size + 1), generator=torch.Generator().manual_seed(0))
        self.classes = size.classes

    def batch(self, first: int, count: int):
        rows = self.tokens[torch.arange(first, first + count) % len(self.tokens)]
        x = rows[:, :-1].contiguous()
        if self.classes:
            return x, torch.ones_like(x, dtype=torch.bool), rows[:, -1] % self.classes
        return x, rows[:, 1:].contiguous()

    def loss(self, model, *batch):
        return (model(*batch)[1],)


class Ours:
    """An arm of this project."""

    def __init__(self, config: Config, size: Size, arm: dict):
        self.size, self.compute = size, Compute(config.device, config.dtype, size.model.n_embd)
        settings = {f.name: getattr(config, f.name) for f in fields(TrainerConfig) if hasattr(config, f.name)}
        torch.manual_seed(0)
        arm = dict(arm)
        self.explicit = arm.pop("explicit", False)
        model_config = replace(size.model, loss=config.loss, **arm)
        self.model = Classifier(model_config, size.vocab_size, size.classes) if size.classes else GPT(model_config, size.vocab_size)
        self.trainer = Trainer(TrainerConfig(**settings | {"batch_size": size.batch_size}), RandomTokens(size), self.model, self.compute)
        self.flops_per_token = self.model.flops_per_token()

    def step(self):
        with sdpa_kernel(SDPBackend.MATH) if self.explicit else nullcontext():
            self.trainer.train_step()
        self.trainer.step += 1

    def prepare_sampling(self):
        del self.trainer
        for_sampling(self.model.requires_grad_(False).eval(), self.compute.device, DTYPES[self.compute.dtype])

    def sample(self, prompt: torch.Tensor, new_tokens: int):
        for _ in generate(self.model, prompt, new_tokens, top_k=200):
            pass


class NanoGPT:
    """The same model, step and sampling by a nanoGPT checkout, as its train.py and sample.py run it: float32 on a CPU."""

    def __init__(self, config: Config, size: Size, folder: str):
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        self.compute = Compute(config.device, "float32" if pick_device(config.device).type == "cpu" else config.dtype, size.model.n_embd)
        shape = {name: getattr(size.model, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
        vocab_size = NANOGPT_VOCABULARY.get(size.vocab_size, size.vocab_size)
        self.model = module.GPT(module.GPTConfig(vocab_size=vocab_size, **shape)).to(self.compute.device)
        self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), self.compute.device.type)
        self.compiled = torch.compile(self.model) if config.compile else self.model
        self.task, self.batch_size, self.steps = RandomTokens(size), size.batch_size, 0
        self.flops_per_token = GPT(size.model, size.vocab_size).flops_per_token()

    def step(self):
        x, y = self.compute.move(*self.task.batch(self.steps * self.batch_size, self.batch_size))
        self.steps += 1
        with self.compute.autocast():
            loss = self.compiled(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def prepare_sampling(self):
        del self.optimizer
        self.model.eval()

    @torch.no_grad()
    def sample(self, prompt: torch.Tensor, new_tokens: int):
        with self.compute.autocast():
            self.model.generate(prompt, new_tokens, top_k=200)


def turn(compute: Compute, work) -> list[float]:
    """Seconds of each call of work(): one, or as many as fit into TURN."""
    times, begin = [], time.perf_counter()
    while not times or time.perf_counter() - begin + times[-1] < TURN:
        compute.synchronize()
        start = time.perf_counter()
        work()
        compute.synchronize()
        times.append(time.perf_counter() - start)
    return times


def worker(pipe, config: Config, name: str, arm):
    """An arm's process: answers the commands that come through the pipe until there are no more."""
    if config.threads:
        torch.set_num_threads(config.threads)
    sys.stdout = open(os.devnull, "w")  # what nanoGPT prints
    size = sized(config, name)
    runner = NanoGPT(config, size, arm) if isinstance(arm, str) else Ours(config, size, arm)
    compute = runner.compute
    for command, *arguments in iter(pipe.recv, None):
        if command == "describe":
            pipe.send((compute.dtype, getattr(runner.model, "loss", "plain"), runner.flops_per_token))
        elif command == "train":
            pipe.send(turn(compute, runner.step))
        elif command == "peak":
            pipe.send([compute.matmul_peak()])
        elif command == "memory":
            pipe.send([compute.peak_memory_mb()])
        elif command == "profile":
            pipe.send(profile(runner, Path(config.out_dir) / name))
        elif command == "prepare_sampling":
            pipe.send(runner.prepare_sampling())
        elif command == "sample":
            sequences, length, new = arguments
            prompt = torch.zeros(sequences, length, dtype=torch.long, device=compute.device)
            pipe.send(turn(compute, lambda: runner.sample(prompt, new)))


def profile(runner, path: Path) -> str:
    """Two training steps under torch.profiler: PATH.txt, operators by their own time, and PATH.json, a trace for chrome://tracing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        runner.step()
        runner.step()
        runner.compute.synchronize()
    by = "self_cpu_time_total" if runner.compute.device.type == "cpu" else "self_device_time_total"
    path.with_suffix(".txt").write_text(profiler.key_averages().table(sort_by=by, row_limit=30))
    profiler.export_chrome_trace(str(path.with_suffix(".json")))
    return str(path)


class Arm:
    """A worker process, spoken to through a pipe."""

    def __init__(self, config: Config, name: str, arm):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, config, name, arm), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *command):
        try:
            self.pipe.send(command)
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise UserError(f"a process of the bench ended with exit code {self.process.exitcode} (-9: out of memory): its message is "
                            "above; try fewer --arms or a smaller --batch_size") from None

    def close(self):
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join()


def sized(config: Config, name: str) -> Size:
    size = SIZES[name]
    return replace(size, batch_size=config.batch_size or size.batch_size)


def in_turn(arms: dict[str, Arm], rounds: int, *commands: tuple) -> list[dict[str, list]]:
    """For each command the arms' answers, lists joined, of `rounds` rounds; a round begins with another arm than the one before."""
    names, answers = list(arms), [{name: [] for name in arms} for _ in commands]
    for i in range(rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            for command, answer in zip(commands, answers):
                answer[name] += arms[name].ask(*command)
    return answers


def measure(config: Config, name: str) -> dict[str, dict]:
    """Time one size -> {arm: its numbers}: seconds a step, FLOP/s, MB, tokens/s of training and of each sampling case."""
    size = sized(config, name)
    kinds = {arm: ARMS[arm] for arm in config.arms.split(",")}
    if config.checkpoint_activations:
        first = next(iter(kinds))
        kinds[f"{first}, checkpointed"] = kinds[first] | {"checkpoint_activations": True}
    if config.against:
        kinds["nanoGPT"] = config.against
    arms = {}
    try:
        for arm, kind in kinds.items():
            arms[arm] = Arm(config, name, kind)
        described = {arm: process.ask("describe") for arm, process in arms.items()}
        in_turn(arms, 1, ("train",))  # warm-up
        seconds, memory, peaks = in_turn(arms, config.rounds, ("train",), ("memory",), ("peak",))
        result, tokens = {}, size.batch_size * size.model.block_size
        for arm in arms:
            dtype, loss, flops = described[arm]
            step, peak = median(seconds[arm]), max(peaks[arm])
            result[arm] = {"dtype": dtype, "loss": loss, "seconds": step, "quartiles": quartiles(seconds[arm]),
                           "memory": max(memory[arm]), "peak": peak, "tokens_per_s": tokens / step,
                           "utilisation": flops * tokens / step / peak, "sampling": {}}
        if config.profile:
            print(f"profile: {arms[next(iter(arms))].ask('profile')}.txt and .json")
        if config.sampling and size.sampling:
            for process in arms.values():
                process.ask("prepare_sampling")
            for case in size.sampling:
                in_turn(arms, 1, ("sample", *case))
                for arm, times in in_turn(arms, max(2, config.rounds // 2), ("sample", *case))[0].items():
                    result[arm]["sampling"][case] = case[0] * case[2] / median(times)
        return result
    finally:
        for process in arms.values():
            process.close()


def quartiles(seconds: list[float]) -> tuple[float, float]:
    low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return low, high


def table(result: dict[str, dict]) -> str:
    """What `measure` found, as text; time and memory also as ratios to the first arm and to nanoGPT."""
    first = next(iter(result))
    others = [first] + ["nanoGPT"] * ("nanoGPT" in result and first != "nanoGPT")
    lines = [f"{'arm':<24}{'dtype':>9}{'loss':>9}{'ms/step':>10} "
             f"{'quartiles':<17}{'tokens/s':>9}{'peak MB':>9}{'util.':>7}{'of GFLOP/s':>11}"
             + "".join(f"{'time, memory / ' + other:>25}" for other in others)]
    for arm, r in result.items():
        low, high = (f"{1e3 * q:.4g}" for q in r["quartiles"])
        ratios = "".join(f"{r['seconds'] / result[o]['seconds']:>17.3f}{r['memory'] / result[o]['memory']:>8.3f}" for o in others)
        lines.append(f"{arm:<24}{r['dtype']:>9}{r['loss']:>9}{1e3 * r['seconds']:>10.4g} {f'[{low}, {high}]':<17}{r['tokens_per_s']:>9.4g}"
                     f"{r['memory']:>9.0f}{r['utilisation']:>7.1%}{r['peak'] / 1e9:>11.0f}{ratios}")
    for case in result[first]["sampling"]:
        sequences, length, new = case
        lines.append(f"sampling, {sequences} x {new} tokens after {length}: " + ", ".join(
            f"{arm} {r['sampling'][case]:.4g} tokens/s" + "".join(
                f" ({r['sampling'][case] / result[o]['sampling'][case]:.3g} x {o})" for o in others if o != arm)
            for arm, r in result.items()))
    return "\n".join(lines)


def main():
    config, _ = options.parse(Config, sys.argv[1:], __doc__)
    pick_dtype(config.dtype, pick_device(config.device), 0)  # a mistake in them ends here, not in every arm
    for name in config.sizes.split(","):
        size, c = sized(config, name), SIZES[name].model
        print(f"\n{name}: {c.n_layer} layers x {c.n_embd}, vocabulary {size.vocab_size:,}, batch {size.batch_size} x {c.block_size}")
        print(table(measure(config, name)), flush=True)


if __name__ == "__main__":
    options.run(main)
