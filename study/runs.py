"""The runs of a comparison: what identifies one, how far it is, and the progress of them all."""
import ast
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass
class Run:
    arm: str
    seed: int
    words: list[str]
    folder: Path
    steps: int
    init_from: str
    identity: dict
    process: subprocess.Popen | None = None

    def ended(self) -> bool:
        return (self.folder / "record.json").exists()

    def step(self) -> int:
        """The last step in its metrics.jsonl; all of them for a run that has ended."""
        if self.ended():
            return self.steps
        try:
            with open(self.folder / "metrics.jsonl", "rb") as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - 10_000))  # a look costs the runs nothing, however long the file
                found = re.findall(rb'^\{"step": (\d+),', f.read(), re.MULTILINE)
        except FileNotFoundError:
            return 0
        return int(found[-1]) if found else 0


class Progress:
    """A bar over the steps of all runs, or where output is not a terminal a line for each run that ends."""

    def __init__(self, steps: int, runs: int):
        self.steps, self.runs, self.kept, self.done, self.ended, self.since = steps, runs, 0, 0, 0, time.monotonic()
        self.bar = tqdm(total=steps, unit="step", smoothing=0, dynamic_ncols=True) if sys.stderr.isatty() else None

    def keep(self, run: Run):
        """Count what a run has already done; it says nothing about the speed."""
        self.kept, self.done, self.ended = self.kept + run.step(), self.done + run.step(), self.ended + run.ended()
        if self.bar is not None:
            self.bar.initial, self.bar.n = self.kept, self.done

    def advance(self, steps: int, said: str):
        self.done += steps
        if self.bar is not None:
            self.bar.set_postfix_str(said, refresh=False)
            self.bar.update(steps)

    def say(self, run: Run, how: str):
        self.ended += 1
        if self.bar is None:
            rate = (self.done - self.kept) / (time.monotonic() - self.since)
            left = f", about {tqdm.format_interval((self.steps - self.done) / rate)} left" if rate else ""
            print(f"{run.arm}, seed {run.seed}: {how} ({self.ended} of {self.runs} runs{left})", flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def code_hash(script: Path) -> str:
    """Of the script and of every module of this project that it imports, directly or not, without comments and docstrings."""
    root, pending, seen = script.parent, [script], {}
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            files = [root / (name.replace(".", "/") + ".py") for name in names]
            pending += [file for file in files if file.exists()]
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        seen[path] = ast.dump(tree)
    text = json.dumps({path.relative_to(root).as_posix(): tree for path, tree in seen.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def content(path: str) -> str:
    """A hash of what a file holds, or of a folder's files: their names, their sizes, and what models and annotations hold."""
    if os.path.isfile(path):
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    files = sorted((p.relative_to(path).as_posix(), content(str(p)) if p.suffix in (".safetensors", ".json") else p.stat().st_size)
                   for p in Path(path).rglob("*") if p.is_file())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
