"""A run's folder, out_dir: opened, resumed, written to and replaced here.

    config.toml      the options, can be given back as a preset
    ckpt.pt          the latest state, all that a resumed run needs
    best.pt          the best model by the task's objective
    metrics.jsonl    what was measured, an object a line
    test.json        Long Range Arena's test accuracy
    lock             who is training in this folder

A script's main goes through it like this:

    run = open_run(Config, sys.argv[1:], __doc__)     # options, and the checkpoint to go on from
    with run.compute() as compute:                    # the processes meet
        task, model = open(run.config, compute)
        run.finish(Trainer(run.config, task, model, compute, run.saved).run(), compute)
"""
import contextlib
import hashlib
import os
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from engine import checkpoint, options
from engine.device import Compute
from engine.lock import Lock
from engine.metrics import MetricsLog
from engine.options import FIXED, FREE, LOCAL, Options, UserError, at_least, not_empty
from engine.parallel import check_shard, like, whole

RESULT = "test.json"
LOCK = "lock"
OWN = ("scratch", "resume", "auto")  # init_from: no other model's weights
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class RunConfig(Options):
    """Where a run is kept, how it begins, and who else hears of it."""
    out_dir: Annotated[str, "folder of the run: checkpoints, metrics, configuration", FREE,
                       not_empty] = "out"
    init_from: Annotated[Literal[*OWN],
                         "auto: resume if there is something to resume, else start"] = "scratch"
    overwrite: Annotated[bool, "start from scratch in an out_dir that holds a run, and lose it",
                         FREE] = False
    eval_only: Annotated[bool, "evaluate the checkpoint and exit"] = False
    seed: Annotated[int, "seed for parameters, data order and dropout", FIXED,
                    options.seed] = 1337
    timeout: Annotated[int, "torchrun: seconds after which a process that does not answer ends the "
                            "run", FREE, at_least(1)] = 1800
    tensorboard: Annotated[bool, "write TensorBoard events to out_dir", FREE] = False
    wandb_log: Annotated[bool, "log to Weights & Biases", FREE] = False
    wandb_project: Annotated[str, "Weights & Biases project", FREE] = "precond"
    wandb_run_name: Annotated[str, "Weights & Biases run name; empty: theirs", FREE] = ""


@dataclass
class Run:
    """How a run begins, as one process sees it."""
    config: Any  # the script's configuration
    given: dict  # the options that the command line or a preset set
    saved: dict | None = None  # the checkpoint to go on from
    problem: UserError | None = None  # why the run in the folder cannot be used

    @property
    def folder(self) -> Path:
        return Path(self.config.out_dir)

    @property
    def fresh(self) -> bool:
        return self.saved is None and self.problem is None

    @contextlib.contextmanager
    def compute(self):
        """The hardware, with all processes at hand. A resumed run keeps its dtype unless told.

        Raises UserError, on all processes, where one could not open the run or they differ, for an
        impossible number of processes, and where the folder cannot be written to.
        """
        config = self.config
        resumed = self.saved is not None and config.dtype == "auto"
        dtype = self.saved["dtype"] if resumed else config.dtype
        with Compute(config.device, dtype, config.n_embd, config.timeout) as compute:
            self.agree(compute)
            compute.check_same(self.decisive(compute))
            if not config.eval_only:
                check_world(config, compute.world)
                if config.shard:
                    check_shard(compute)
                compute.on_main(lambda: check_writable(self.folder))
            yield compute

    def agree(self, compute: Compute):
        """Raises UserError on all processes unless all found the same run and can use it."""
        mine = "no run"
        if self.problem:
            mine = str(self.problem)
        elif self.saved:
            mine = f"step {self.saved['step']}"
        found = compute.gather(mine)
        for rank, what in enumerate(found):
            if what != found[0]:
                raise UserError(f"out_dir={self.folder} must be one folder that all nodes see: "
                                f"rank 0 finds there: {found[0]}; rank {rank}: {what}")
        if self.problem:
            raise self.problem

    def decisive(self, compute: Compute) -> dict:
        """What all processes must have alike: code, options but FREE and LOCAL ones, hardware."""
        own = options.marked(type(self.config), FREE, LOCAL)
        alike = {name: value for name, value in asdict(self.config).items() if name not in own}
        return {**code(), **alike, "kind of device": compute.device.type,
                "dtype on its device": compute.dtype}

    def evaluate(self, task, model: torch.nn.Module, compute: Compute):
        """Print the evaluation of the checkpoint's model, or of `model` as it is."""
        step = 0
        if self.saved:
            checkpoint.restore_model(model, task, self.saved, self.folder)
            step = self.saved["step"]
        values = task.evaluate(model.to(compute.device).eval(), compute)
        if compute.main:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"step {step}: {shown}")

    def finish(self, number: int | None, compute: Compute):
        """Say what happened where signal `number` stopped the run; exit with the shell's code."""
        if number:
            if compute.main:
                print(f"stopped by {signal.Signals(number).name}; saved "
                      f"{self.folder / 'ckpt.pt'}. Go on with --init_from=resume")
            sys.exit(128 + number)


def open_run(cls: type, argv: list[str], doc: str) -> Run:
    """The run that a command line asks for. Raises UserError for impossible options.

    A run in the folder that cannot be used is no error yet, but a `problem`: under torchrun all
    processes must have met before one of them may give up.
    """
    preset, typed = options.read(cls, argv, doc)
    config = options.build(cls, preset | typed)
    try:
        if not goes_on(config, typed):
            first = preset.get("init_from", "auto")
            if config.init_from == "auto" and first not in OWN:
                config = replace(config, init_from=first)  # nothing to resume: as the preset says
            return Run(config, preset | typed)
        return resume(config, preset, typed)
    except UserError as e:
        return Run(config, preset | typed, problem=e)


def goes_on(config, typed: dict) -> bool:
    """Whether the run in the folder is continued or evaluated. Raises UserError: it is in the way.

    An evaluation reads the folder's run. It takes the weights that `init_from` names where that
    was typed; a preset's `init_from` only says what the run once started from.
    """
    folder = Path(config.out_dir)
    exists = (folder / "ckpt.pt").exists()
    own = config.init_from in OWN
    if config.init_from in ("resume", "auto") and config.overwrite:
        raise UserError(f"--init_from={config.init_from} goes on with the run that --overwrite "
                        "would replace: choose one")
    if config.eval_only:
        return own or (exists and "init_from" not in typed)
    if config.init_from == "resume" or (config.init_from == "auto" and exists):
        return True
    if (exists or (folder / "best.pt").exists()) and not config.overwrite:
        held = "a run: continue it with --init_from=resume," if exists else "the best.pt of a run:"
        raise UserError(f"{config.out_dir} holds {held} choose another folder with --out_dir=NAME, "
                        "or replace it with --overwrite")
    return False


def resume(config, preset: dict, typed: dict) -> Run:
    """The folder's run, with the checkpoint's configuration, in which only typed options change.

    Raises UserError where the checkpoint is not enough, or a preset is another run's.
    """
    folder = Path(config.out_dir)
    saved = checkpoint.read(checkpoint.choose(folder, best=config.eval_only))
    needed = {"config", "model", "step", "task"}
    if not config.eval_only:
        needed |= {"optimizer", "ranks"}
    if missing := sorted(needed - set(saved)):
        raise UserError(f"the checkpoint in {folder} cannot be used: it lacks "
                        f"{', '.join(missing)} (best.pt holds the model alone)")
    before = saved["config"]
    typed = {key: value for key, value in typed.items() if key not in ("init_from", "overwrite")}
    typed |= {"out_dir": config.out_dir, "eval_only": config.eval_only}
    # A checkpoint may come from anywhere: it does not decide that something is sent elsewhere.
    typed.setdefault("wandb_log", False)
    evaluated = before["batch_size"] * before["eval_iters"]
    if "batch_size" in typed and "eval_iters" not in typed:
        typed["eval_iters"] = max(1, evaluated // typed["batch_size"])
    config = options.resume(type(config), before, typed, preset, evaluate=config.eval_only)
    # Either factor may change, to fit another machine. The product decides the trajectory, or the
    # samples of the evaluation.
    for name in ("gradient_accumulation_steps", "eval_iters"):
        old = before["batch_size"] * before[name]
        new = config.batch_size * getattr(config, name)
        if new != old and not config.eval_only:
            raise UserError(f"batch_size x {name} = {new} cannot change on resume: the run has "
                            f"{old}. Choose a batch_size that divides it, and {old} / batch_size "
                            f"for {name}")
    if os.environ.get("RANK", "0") == "0":
        announce(config, saved, typed)
    return Run(config, typed, saved)


def announce(config, saved: dict, typed: dict):
    """Say where a run goes on, and which of its options were changed."""
    before = saved["config"]
    changed = [f"{key} {before[key]} -> {value}" for key, value in typed.items()
               if key not in ("out_dir", "eval_only") and before.get(key, value) != value]
    said = f", changed: {', '.join(changed)}" if changed else ""
    print(f"{config.out_dir}: step {saved['step']} of {config.max_iters}{said}")
    data = [f"{name}={getattr(config, name)}" for name in ("dataset", "source", "data_dir")
            if getattr(config, name, "")]
    print(f"its data: {', '.join(data)}")
    if saved["step"] >= config.max_iters and not config.eval_only:
        print("nothing left to train: raise --max_iters to go on")


def code() -> dict[str, str]:
    """{file: hash} of what a run may execute of this project."""
    rooms = ("", "engine", "data", "vision", "precond_dropin")
    files = [path for room in rooms for path in (ROOT / room).glob("*.py")]
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(files)}


def check_world(config, world: int):
    """Raises UserError where the sequences of a step cannot be split over the processes."""
    if config.global_batch % world:
        raise UserError(f"batch_size x gradient_accumulation_steps = {config.batch_size} x "
                        f"{config.gradient_accumulation_steps} = {config.global_batch} sequences "
                        f"cannot be split over {world} processes: change one of the three")


def check_writable(folder: Path):
    """Raises UserError where `folder` cannot be written to, before data takes hours to prepare."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise UserError(f"cannot write to {folder}: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {parent} is not writable")
    if (folder / LOCK).exists():
        with writing(folder):
            Lock(folder / LOCK, str(folder)).release()


@contextlib.contextmanager
def writing(folder: Path):
    """A context for what is written into `folder`: an OSError becomes a UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror or e}") from None


def open_folder(config, step: int) -> MetricsLog:
    """Make the folder ready for training from `step` on; -1 for a new run, which replaces another.

    Raises UserError.
    """
    folder = Path(config.out_dir)
    wandb = None
    if config.wandb_log:
        wandb = {"project": config.wandb_project, "name": config.wandb_run_name or None,
                 "config": asdict(config)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / LOCK, str(folder))
        if step < config.max_iters:
            # With overwrite, giving config.toml back as a preset would lose the run.
            options.save(replace(config, overwrite=False), folder / "config.toml")
        log = MetricsLog(folder, step, config.max_iters, config.tensorboard, wandb, lock)
        stale = [RESULT] if step >= 0 else [RESULT, "ckpt.pt", "best.pt"]
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        return log


def save_state(trainer):
    """ckpt.pt: the trainer's state, from which it goes on bit for bit."""
    mine = {"random": trainer.compute.random_state(), **trainer.meter.state()}
    state = trainer.optimizer.state_dict()["state"]
    write(trainer, "ckpt.pt", {"optimizer": whole(state, trainer.compute),
                               "scaler": trainer.scaler.state_dict(),
                               "ranks": trainer.compute.gather(mine),  # of each process
                               "train_seconds": trainer.meter.train_seconds,
                               "tokens": trainer.meter.tokens,
                               "evaluated": trainer.evaluated})


def save_best(trainer):
    """best.pt: the model alone."""
    write(trainer, "best.pt", {})


def write(trainer, name: str, state: dict):
    """A checkpoint file: the model, `state`, and what identifies the run."""
    state |= {"model": whole(trainer.raw.state_dict(), trainer.compute),
              # With overwrite, resuming would lose the run.
              "config": asdict(trainer.config) | {"overwrite": False},
              "task": trainer.task.state(), "step": trainer.step, "best": trainer.best,
              "dtype": trainer.compute.dtype}
    trainer.compute.on_main(lambda: checkpoint.save(trainer.folder / name, state))


def restore_state(trainer, saved: dict):
    """What `save_state` has written, but the model, which has its weights."""
    compute, meter = trainer.compute, trainer.meter
    try:
        load_optimizer(trainer.optimizer, saved["optimizer"])
        if saved["scaler"]:  # empty where the run was not in float16
            trainer.scaler.load_state_dict(saved["scaler"])
        trainer.step = trainer.kept = saved["step"]
        trainer.evaluated = saved["evaluated"]
        trainer.best = saved["best"]
        meter.train_seconds = saved["train_seconds"]
        meter.tokens = saved["tokens"]
        ranks = saved["ranks"]
        meter.restore(ranks)
        if len(ranks) == compute.world:
            compute.set_random_state(ranks[compute.rank]["random"])
        else:  # another number of processes: new dropout
            torch.manual_seed(trainer.config.seed * 1_000_003 + compute.rank + trainer.step)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"the checkpoint in {trainer.folder} cannot be used: "
                        f"{type(e).__name__}, {checkpoint.first_line(e)}") from None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict):
    """A checkpoint's state, of whole tensors, into an optimizer, whose parameters may be shards."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    mine = {}
    for i, values in state.items():
        p = parameters[i]
        # What is shaped as the parameter may be cut as it is; numbers of steps are not.
        mine[i] = {name: like(value, p) if getattr(value, "shape", None) == p.shape else value
                   for name, value in values.items()}
    groups = optimizer.state_dict()["param_groups"]  # rates and decay: from the options
    optimizer.load_state_dict({"state": mine, "param_groups": groups})
