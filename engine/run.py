"""Opening and closing a run: what every training script does before and after the loop of trainer.py.

    config, given, saved = open_run(Config, sys.argv[1:], __doc__)     # options, and the checkpoint to go on from
    with compute_for(config, saved) as compute:
        ...                                                            # data, task, model
        finish(config, Trainer(config, task, model, compute, saved).run(), compute)
"""
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from engine import checkpoint
from engine import options
from engine.options import UserError
from engine.device import Compute
from engine.trainer import TrainerConfig, check_world


def open_run(cls: type, argv: list[str], doc: str) -> tuple[Any, dict, dict | UserError | None]:
    """-> (configuration, options that `argv` or its presets set, checkpoint to go on from or None). Raises UserError for impossible options.

    Where the folder's run cannot be used, the UserError that says so stands for the checkpoint: compute_for raises it, when all processes
    are there to hear it.
    """
    preset, typed = options.read(cls, argv, doc)
    config = options.build(cls, preset | typed)
    try:
        return find_run(config, preset, typed)
    except UserError as e:
        return config, preset | typed, e


def find_run(config: TrainerConfig, preset: dict, typed: dict) -> tuple[Any, dict, dict | None]:
    """`open_run` of parsed options. Raises UserError.

    Resuming starts from the checkpoint's configuration, and only typed options override it; a preset of another run is an error.
    eval_only reads the best checkpoint.
    """
    folder = Path(config.out_dir)
    exists = (folder / "ckpt.pt").exists()
    goes_on = config.init_from == "resume" or config.init_from == "auto" and exists
    if config.eval_only:  # of other weights only where they are asked for, not where a preset says what the run started from
        goes_on = config.init_from in ("scratch", "resume", "auto") or exists and "init_from" not in typed
    if not goes_on:
        if exists and not config.overwrite and not config.eval_only:
            raise UserError(f"{folder} holds a run: continue it with --init_from=resume, choose another folder with --out_dir=NAME, "
                            "or replace it with --overwrite")
        return config, preset | typed, None
    saved = checkpoint.read(checkpoint.choose(folder, best=config.eval_only))
    needed = {"config", "model", "step", "task"} | (set() if config.eval_only else {"optimizer", "ranks"})
    if missing := sorted(needed - set(saved)):
        raise UserError(f"the checkpoint in {folder} cannot be used: it lacks {', '.join(missing)} (best.pt holds the model alone)")
    kept = {key: value for key, value in typed.items() if key not in ("init_from", "overwrite")}
    typed = kept | {"out_dir": config.out_dir, "eval_only": config.eval_only}
    before = saved["config"]
    evaluated = before["batch_size"] * before["eval_iters"]
    if "batch_size" in typed and "eval_iters" not in typed:
        typed["eval_iters"] = max(1, evaluated // typed["batch_size"])
    config = options.resume(type(config), before, typed, preset, evaluate=config.eval_only)
    for name, old in (("gradient_accumulation_steps", before["batch_size"] * before["gradient_accumulation_steps"]), ("eval_iters", evaluated)):
        if (new := config.batch_size * getattr(config, name)) != old and not config.eval_only:
            raise UserError(f"batch_size x {name} = {new} cannot change on resume: the run has {old}")
    announce(config, saved, typed)
    return config, typed, saved


def announce(config: TrainerConfig, saved: dict, typed: dict):
    """Say where a run goes on, and which of its options were changed."""
    changed = [f"{key} {saved['config'][key]} -> {value}" for key, value in typed.items()
               if key not in ("out_dir", "eval_only") and saved["config"].get(key, value) != value]
    if os.environ.get("RANK", "0") == "0":
        print(f"{config.out_dir}: step {saved['step']} of {config.max_iters}" + (", changed: " + ", ".join(changed) if changed else ""))
        if saved["step"] >= config.max_iters and not config.eval_only:
            print("nothing left to train: raise --max_iters to go on")


@contextlib.contextmanager
def compute_for(config, saved: dict | UserError | None):
    """The hardware of a run; a resumed one keeps its dtype unless another was typed. Raises UserError, on all processes, where one of them
    could not open the run or they see different ones, and for an impossible number of processes."""
    dtype = saved["dtype"] if isinstance(saved, dict) and config.dtype == "auto" else config.dtype
    with Compute(config.device, dtype, config.n_embd) as compute:
        agree(config, saved, compute)
        check_world(config, compute)
        if not config.eval_only:
            compute.together(lambda: check_writable(Path(config.out_dir)), alone=compute.main)
        yield compute


def check_writable(folder: Path):
    """Raises UserError where `folder` could not be made or written to: before data is prepared, which can take hours."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {parent} is " + ("not writable" if parent.is_dir() else "a file"))


def agree(config, saved: dict | UserError | None, compute: Compute):
    """Raises UserError on all processes where they did not find the same run, or none could use what is there."""
    found = compute.gather(f"step {saved['step']}" if isinstance(saved, dict) else str(saved or "no run"))
    for rank, what in enumerate(found):
        if what != found[0]:
            raise UserError(f"out_dir={config.out_dir} must be one folder that all nodes see: "
                            f"rank 0 finds there: {found[0]}; rank {rank}: {what}")
    if isinstance(saved, UserError):
        raise saved


def evaluate_only(config: TrainerConfig, task, model: torch.nn.Module, compute: Compute, saved: dict | None):
    """Print the evaluation of a checkpoint's model, or of `model` as it is."""
    if saved:
        checkpoint.restore_model(model, task, saved, Path(config.out_dir))
    result = task.evaluate(compute.wrap(model.to(compute.device).eval()), compute)
    if compute.main:
        print(f"step {saved['step'] if saved else 0}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))


def finish(config: TrainerConfig, signal_number: int | None, compute: Compute):
    """Say what happened when a run was stopped, and exit with the shell's code for it."""
    if signal_number:
        if compute.main:
            print(f"stopped by {signal.Signals(signal_number).name}; saved {Path(config.out_dir) / 'ckpt.pt'}. Go on with --init_from=resume")
        sys.exit(128 + signal_number)
