"""Time and memory of training and sampling, preconditioned or not, and beside nanoGPT.

    python bench.py                                             # the default size and 6 x 384
    python bench.py --sizes=gpt2_124m --arms=baseline,precond   # 124M take 5 GB an arm
    python bench.py --sizes=char_gpu --against=../nanoGPT       # with ratios of time and memory
    python bench.py --sizes=gpt2_124m --arms=baseline --checkpoint_activations --profile
    python bench.py --sizes=lra_listops --arms=nystrom,nystrom_precond,baseline,explicit

Each arm is a process of its own, so that its peak memory is its own. They take turns in every
round, in changing order, and wait while another works. A turn is one training step, or as many as
fit into half a second, of engine/trainer.py on random tokens. Sampling takes turns in the same way.
Times are medians over all steps, with the quartiles in brackets. Ratios are ratios of medians in
one run; where the quartiles of two arms overlap, their ratio may be noise.

Utilisation is model FLOPs (model.flops_per_token) over what the machine can do: the speed of a
large matrix product in the run's dtype, the best of those measured in every round. That a causal
kernel needs only half of attention's FLOPs is not counted, as usual.

The arm `explicit` is softmax attention without fused kernels, with its (T, T) matrices in memory.
"""
import engine.startup  # noqa: F401  (first: it answers mistakes before PyTorch is loaded)

# isort: split
import os
import runpy
import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
import train_lra
from data.lra import TASKS
from engine import options
from engine.device import DTYPES, Compute, ComputeConfig, pick_device, pick_dtype
from engine.options import at_least
from engine.packed import for_sampling
from engine.run import check_writable
from engine.trainer import Task, Trainer
from model import GPT, Classifier
from sample import generate
from study.turns import Worker, in_turn, overlap, profile, quartiles, time_turn

TURN = 0.5  # seconds
FEW = 8  # steps of an arm whose quartiles say little


@dataclass
class Size:
    """A model, its batch and its sampling."""
    config: train.Config | train_lra.Config
    vocab_size: int
    sampling: tuple[tuple[int, int, int], ...] = ()  # sequences, tokens of the prompt, new tokens
    classes: int = 0  # of a classifier; 0: a language model


def preset(script, name: str, *changes: str):
    path = Path(__file__).with_name("config") / f"{name}.toml"
    return options.parse(script.Config, [str(path), *changes], "")[0]


LISTOPS = TASKS["listops"]
SIZES = {
    "default": Size(preset(train, "shakespeare_char_adamw"), 65, ((1, 1, 63),)),
    "char_gpu": Size(preset(train, "shakespeare_char_gpu", "--batch_size=4", "--dropout=0"), 65,
                     ((1, 1, 255), (8, 1, 255), (1, 200, 50))),
    "gpt2_124m": Size(preset(train, "gpt2_124m", "--batch_size=4",
                             "--gradient_accumulation_steps=1"), 50257, ((1, 512, 50),)),
    "lra_listops": Size(preset(train_lra, "lra_listops"), LISTOPS.vocab_size,
                        classes=LISTOPS.classes),
}
ARMS = {"baseline": {}, "precond": {"precond": True},
        "precond_grad": {"precond": True, "precond_grad": True}, "explicit": {"explicit": True},
        "muon": {"optimizer": "muon"},
        "muon_interval_3": {"optimizer": "muon", "matrix_interval": 3},
        "nystrom": {"attention": "nystrom"},
        "nystrom_precond": {"attention": "nystrom", "precond": True}}


def each_of(known: dict):
    def check(name, value, config):
        for word in value.split(","):
            if word not in known:
                return f"--{name}={word} is unknown: choose of {','.join(known)}"
    return check


def possible(name, value, config):
    """Whether the sizes go with the arms, and with a nanoGPT that is there."""
    if config.against and not (Path(config.against) / "model.py").exists():
        return f"--against={config.against} holds no model.py: give a nanoGPT checkout's folder"
    for size in value.split(","):
        if "nystrom" in config.arms and not SIZES[size].classes:
            return (f"--arms={config.arms}: nystrom attention is not causal, so {size} cannot "
                    "have it")
        if config.against and SIZES[size].classes:
            return f"--against={config.against}: nanoGPT has no {size}"


@dataclass
class Config(ComputeConfig):
    sizes: Annotated[str, f"models, with commas: {', '.join(SIZES)}", each_of(SIZES),
                     possible] = "default,char_gpu"
    arms: Annotated[str, f"with commas: {', '.join(ARMS)}",
                    each_of(ARMS)] = "baseline,precond,precond_grad"
    against: Annotated[str, "folder of a nanoGPT checkout to time beside"] = ""
    rounds: Annotated[int, "turns of every arm", at_least(1)] = 8
    batch_size: Annotated[int, "sequences in a step; 0: the size's own", at_least(0)] = 0
    sampling: Annotated[bool, "time sampling too"] = True
    checkpoint_activations: Annotated[bool, "add an arm: the first one, with activations computed "
                                            "again"] = False
    profile: Annotated[bool, "write torch.profiler's table and trace of the first arm"] = False
    out_dir: Annotated[str, "folder of the profiles"] = "bench"
    threads: Annotated[int, "threads of each process; 0: PyTorch's choice", at_least(0)] = 0
    compile: Annotated[bool, "torch.compile the models, nanoGPT's too"] = False
    loss: Annotated[Literal["auto", "plain", "chunked"], "as in train.py"] = "auto"
    fused: Annotated[bool, "as in train.py"] = True
    tune_malloc: Annotated[bool, "as in train.py"] = True


class RandomTokens(Task):
    """A task for the Trainer: random tokens, and random targets or labels."""
    train_metrics = ("train_loss",)

    def __init__(self, size: Size):
        self.size = size

    def batch(self, first, count):
        shape = 2, count, self.size.config.block_size
        generator = torch.Generator().manual_seed(first)
        x, y = torch.randint(self.size.vocab_size, shape, generator=generator)
        if self.size.classes:
            mask = torch.ones_like(x, dtype=torch.bool)
            return x, mask, y[:, 0] % self.size.classes
        return x, y

    def loss(self, model, *batch):
        return (model(*batch)[1],)


class Runner:
    """An arm at work, with `compute`, `model`, `flops_per_token`. `in_turn` joins its lists."""
    memory = peak = 0.0  # the most seen so far: MB, and FLOP/s of matrix products

    def describe(self):
        return {"dtype": self.compute.dtype, "loss": getattr(self.model, "loss", "plain"),
                "flops": self.flops_per_token, "memory": self.memory, "peak": self.peak}

    def train(self):
        seconds = time_turn(self.step, self.compute, TURN)
        # Memory before the peak: measuring the latter starts the former anew on a GPU.
        self.memory = max(self.memory, self.compute.peak_memory_mb())
        self.peak = max(self.peak, self.compute.matmul_peak())
        return seconds

    def sample(self, sequences: int, length: int, new: int):
        prompt = torch.zeros((sequences, length), dtype=torch.long, device=self.compute.device)
        return time_turn(lambda: self.generate(prompt, new), self.compute, TURN)

    def profile(self, path: Path):
        profile(self.step, self.compute, path)


class Ours(Runner):
    """An arm of this project."""

    def __init__(self, config: Config, size: Size, arm: dict):
        same = "device", "dtype", "compile", "loss", "fused", "tune_malloc"
        changes = {name: getattr(config, name) for name in same} | arm
        self.explicit = changes.pop("explicit", False)
        settings = replace(size.config, **changes)
        self.compute = Compute(settings.device, settings.dtype, settings.n_embd)
        torch.manual_seed(0)
        if size.classes:
            self.model = Classifier(settings, size.vocab_size, size.classes)
        else:
            self.model = GPT(settings, size.vocab_size)
        self.flops_per_token = self.model.flops_per_token()
        self.trainer = Trainer(settings, RandomTokens(size), self.model, self.compute)

    def step(self):
        kernels = sdpa_kernel(SDPBackend.MATH) if self.explicit else nullcontext()
        with kernels:
            self.trainer.train_step()
        self.trainer.step += 1

    def prepare_sampling(self):
        del self.trainer
        self.model.requires_grad_(False).eval()
        for_sampling(self.model, self.compute.device, DTYPES[self.compute.dtype])

    def generate(self, prompt, new):
        for _ in generate(self.model, prompt, new, top_k=200):
            pass


class NanoGPT(Runner):
    """The same by a nanoGPT checkout, as its train.py and sample.py do it: in float32 on a CPU."""

    def __init__(self, config: Config, size: Size, folder: str):
        module = runpy.run_path(os.path.join(folder, "model.py"), run_name="nanogpt_model")
        c = size.config
        kind = pick_device(config.device).type
        dtype = "float32" if kind == "cpu" else config.dtype
        self.compute = Compute(config.device, dtype, c.n_embd)
        shape = {f.name: getattr(c, f.name, None) for f in fields(module["GPTConfig"])}
        shape["vocab_size"] = {50257: 50304}.get(size.vocab_size, size.vocab_size)  # its train.py's
        self.model = module["GPT"](module["GPTConfig"](**shape)).to(self.compute.device)
        self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), kind)
        self.compiled = torch.compile(self.model) if config.compile else self.model
        self.batch = RandomTokens(size).batch(0, c.batch_size)
        self.flops_per_token = GPT(c, size.vocab_size).flops_per_token()

    def step(self):
        x, y = self.compute.move(*self.batch)
        with self.compute.autocast():
            _, loss = self.compiled(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def prepare_sampling(self):
        del self.optimizer
        self.model.eval()

    @torch.no_grad()
    def generate(self, prompt, new):
        with self.compute.autocast():
            self.model.generate(prompt, new, top_k=200)


def start(config: Config, size: Size, arm: dict | str) -> Runner:
    """An arm in its process. arm: what sets it apart, or nanoGPT's folder."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    sys.stdout = open(os.devnull, "w")  # what the Trainer and nanoGPT print
    return (NanoGPT if isinstance(arm, str) else Ours)(config, size, arm)


def sized(config: Config, name: str) -> Size:
    size = SIZES[name]
    batch_size = config.batch_size or size.config.batch_size
    return replace(size, config=replace(size.config, batch_size=batch_size))


def measure(config: Config, name: str) -> dict[str, dict]:
    """Time one size -> {arm: its numbers}: seconds a step, FLOP/s, MB, tokens/s.

    "sampling" has the quartiles of the seconds that each case took.
    """
    size = sized(config, name)
    kinds = {arm: ARMS[arm] for arm in config.arms.split(",")}
    first = next(iter(kinds))
    if config.checkpoint_activations:
        kinds[f"{first}, checkpointed"] = kinds[first] | {"checkpoint_activations": True}
    if config.against:
        kinds["nanoGPT"] = config.against
    tokens = size.config.batch_size * size.config.block_size
    arms = {}
    result = {}
    try:
        for arm, kind in kinds.items():
            arms[arm] = Worker(start, config, size, kind)
        in_turn(arms, 1, "train")  # warm-up
        seconds = in_turn(arms, config.rounds, "train")
        for arm, worker in arms.items():
            low, step, high = quartiles(seconds[arm])
            found = worker.ask("describe")
            found |= {"steps": len(seconds[arm]), "seconds": step, "quartiles": (low, high),
                      "tokens_per_s": tokens / step, "sampling": {},
                      "utilisation": found["flops"] * tokens / step / found["peak"]}
            result[arm] = found
        if config.profile:
            path = Path(config.out_dir) / name
            arms[first].ask("profile", path)
            print(f"profile: {path}.txt and .json")
        if config.sampling and size.sampling:
            for worker in arms.values():
                worker.ask("prepare_sampling")
            for case in size.sampling:
                in_turn(arms, 1, "sample", *case)  # warm-up
                times = in_turn(arms, max(2, config.rounds // 2), "sample", *case)
                for arm in arms:
                    result[arm]["sampling"][case] = quartiles(times[arm])
        return result
    finally:
        for worker in arms.values():
            worker.close()


def table(result: dict[str, dict]) -> str:
    """What `measure` found; time and memory also as ratios to the first arm and to nanoGPT."""
    first = next(iter(result))
    references = {arm: r for arm, r in result.items() if arm in (first, "nanoGPT")}
    header = (f"{'arm':<24}{'dtype':>9}{'loss':>9}{'ms/step':>10} {'quartiles':<17}"
              f"{'tokens/s':>9}{'peak MB':>9}{'util.':>7}{'of GFLOP/s':>11}")
    width = max(25, *(len(f" time, memory / {other}") for other in references))
    for other in references:
        header += f"{f'time, memory / {other}':>{width}}"
    lines = [header]
    for arm, r in result.items():
        low, high = (f"{1e3 * q:.4g}" for q in r["quartiles"])
        line = (f"{arm:<24}{r['dtype']:>9}{r['loss']:>9}{1e3 * r['seconds']:>10.4g} "
                f"{f'[{low}, {high}]':<17}{r['tokens_per_s']:>9.4g}{r['memory']:>9.0f}"
                f"{r['utilisation']:>7.1%}{r['peak'] / 1e9:>11.0f}")
        for o in references.values():
            ratios = f"{r['seconds'] / o['seconds']:.3f}{r['memory'] / o['memory']:>8.3f}"
            line += f"{ratios:>{width}}"
        lines.append(line)
    for case in result[first]["sampling"]:
        sequences, length, new = case
        parts = []
        for arm, r in result.items():
            times = r["sampling"][case]
            part = f"{arm} {sequences * new / times[1]:.4g} tokens/s"
            for other in references:
                if other == arm:
                    continue
                theirs = references[other]["sampling"][case]
                noise = ", or noise" if overlap(times, theirs) else ""
                part += f" ({theirs[1] / times[1]:.3g} x {other}{noise})"
            parts.append(part)
        lines.append(f"sampling, {sequences} x {new} tokens after {length}: {', '.join(parts)}")
    for other, o in references.items():
        close = [arm for arm, r in result.items()
                 if arm != other and overlap(r["quartiles"], o["quartiles"])]
        if close:
            lines.append(f"time / {other} may be noise, the quartiles overlap: {', '.join(close)}")
    if any(r["steps"] < FEW for r in result.values()):
        lines.append(f"ratios of fewer than {FEW} steps may be noise: raise --rounds")
    return "\n".join(lines)


def main():
    config, _ = options.parse(Config, sys.argv[1:], __doc__)
    pick_dtype(config.dtype, pick_device(config.device), 0)  # a mistake ends here, not in every arm
    if config.profile:
        check_writable(Path(config.out_dir))
    for name in config.sizes.split(","):
        size = sized(config, name)
        c = size.config
        print(f"\n{name}: {c.n_layer} layers x {c.n_embd}, vocabulary {size.vocab_size:,}, "
              f"batch {c.batch_size} x {c.block_size}")
        print(table(measure(config, name)), flush=True)


if __name__ == "__main__":
    options.run(main)
