"""What to paste into a bug report: hardware, versions, and ten steps of each script on each device.

    python doctor.py                  # every device of this machine: a few minutes
    python doctor.py --device=cuda    # one kind alone

The models are tiny and learn the README, so nothing is downloaded, and nothing is left behind. A
line that fails ends with what the script said last. The exit code is 1 where one did.
"""
import engine.startup  # noqa: F401  (first: it answers mistakes before PyTorch is loaded)

# isort: split
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from engine import options
from engine.device import BF16_WIDTH, CPUINFO, DTYPES, Compute, check_compiler, pick_dtype
from engine.options import UserError

ROOT = Path(__file__).resolve().parent
TEN = ["--max_iters=10", "--eval_interval=10", "--eval_iters=2", "--batch_size=4"]
TEXT = ["train.py", f"--dataset={ROOT / 'README.md'}", "--n_layer=2", "--n_head=2", "--n_embd=32",
        *TEN]
LISTOPS = ["train_lra.py", "listops", "--n_train=200", "--n_val=20", "--n_test=20", *TEN]
IMAGES = ["--n_val=8", *TEN]
LIMIT = 600  # seconds for one line


@dataclass
class Config(options.Options):
    device: Annotated[Literal["all", "cpu", "cuda", "mps"], "what to try"] = "all"


def devices(wanted: str) -> list[str]:
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    found = [name for name in there if there[name] and wanted in ("all", name)]
    if not found:
        raise UserError(f"--device={wanted} asked for, but this machine has none")
    return found


def processor() -> str:
    names = re.findall(r"model name\s*: (.*)", CPUINFO.read_text()) if CPUINFO.exists() else []
    return f" of {names[0]}" if names else ""


def versions() -> str:
    """Python and what the requirements name: "torch 2.13.0, ..., scipy (absent)"."""
    lines = [line for name in ("requirements.txt", "requirements-extra.txt")
             for line in (ROOT / name).read_text().splitlines()]
    said = [f"Python {platform.python_version()}"]
    for package in (re.split(r"[=<>;\[ ]", line)[0] for line in lines if line.strip()):
        try:
            said.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            said.append(f"{package} (absent)")
    return ", ".join(said)


def speeds(device: str) -> Iterator[str]:
    """What a device is, its dtype in small and wide models, and its matrix products."""
    narrow, wide = (pick_dtype("auto", torch.device(device), width)
                    for width in (BF16_WIDTH - 1, BF16_WIDTH))
    yield (f"{Compute(device, 'auto', 1).describe()}: --dtype=auto is {narrow}, from a width of "
           f"{BF16_WIDTH} on {wide}")
    for dtype in DTYPES:
        if (device, dtype) != ("cpu", "float16"):
            peak = Compute(device, dtype, 1).matmul_peak()
            yield f"  {dtype}: {peak / 1e9:,.1f} GFLOP/s in a matrix product"


def checks(device: str) -> Iterator[tuple[str, list[str]]]:
    """(what is tried, its command) of a device."""
    yield "characters", TEXT
    yield "characters, preconditioned, Muon", [*TEXT, "--precond=True", "--optimizer=muon"]
    if device == "cuda":
        for dtype in "bfloat16", "float16":
            yield dtype, [*TEXT, f"--dtype={dtype}"]
    try:
        check_compiler(torch.device(device))
        yield "compiled", [*TEXT, "--compile"]
    except UserError as e:
        print(f"  not compiled: {e}")
    count = {"cpu": 2, "cuda": torch.cuda.device_count()}.get(device, 1)
    if count > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        wide = [*launch, *TEXT, f"--batch_size={4 * count}"]
        yield f"{count} processes", wide
        yield f"{count} processes, sharded", [*wide, "--shard=True"]
    yield "ListOps, nystrom", [*LISTOPS, "--attention=nystrom"]
    for task in "classify", "detect", "segment":
        yield f"images, {task}", ["train_vision.py", task, *IMAGES]


def attempt(command: list[str], device: str, folder: Path) -> tuple[bool, str]:
    """-> (whether it ended well, what it said last)."""
    words = [*command, f"--device={device}", f"--out_dir={folder / 'out'}", "--overwrite"]
    if "train_vision.py" not in command:
        words.append(f"--data_dir={folder}")
    try:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                              timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return False, f"no end after {LIMIT} seconds"
    if done.returncode == 0:
        steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        return True, steps[-1]
    # The script's own line; torchrun and tracebacks print more after it and before.
    lines = done.stderr.splitlines()
    own = [line for line in lines if ".py: error: " in line]
    errors = [line for line in lines if "Error" in line]
    return False, (own or errors or [f"exit code {done.returncode}"])[-1]


def main():
    config, _ = options.parse(Config, sys.argv[1:], __doc__)
    print(f"{platform.platform()}, {os.cpu_count()} cores{processor()}")
    print(versions())
    failed = 0
    for device in devices(config.device):
        for line in speeds(device):
            print(line, flush=True)
        for name, command in checks(device):
            with tempfile.TemporaryDirectory() as folder:
                good, said = attempt(command, device, Path(folder))
            failed += not good
            print(f"  {'ok    ' if good else 'FAILED'} {name}: {said}", flush=True)
    print(f"{failed} failed" if failed else "all is well")
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    options.run(main)
