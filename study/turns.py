"""Processes that take turns, so that their times are measured side by side: bench.py's arms."""
import multiprocessing
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine import options
from engine.device import Compute
from engine.options import UserError


class Worker:
    """make(*arguments) in a process of its own, whose methods are called through a pipe."""

    def __init__(self, make: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        work = partial(serve, theirs, make, arguments)
        self.process = context.Process(target=options.run, args=(work,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments):
        """What the method returns. Raises UserError where the process has died."""
        try:
            self.pipe.send((method, arguments))
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise UserError(f"an arm's process ended with exit code {self.process.exitcode}; its "
                            "message is above (-9 without a message: out of memory, try fewer "
                            "--arms or a smaller --batch_size)") from None

    def close(self):
        self.process.kill()
        self.process.join()


def serve(pipe, make: Callable, arguments: tuple):
    """The life of a Worker's process, which its parent ends, on Ctrl-C too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    served = make(*arguments)
    while True:
        method, arguments = pipe.recv()
        pipe.send(getattr(served, method)(*arguments))


def in_turn(workers: dict[str, Worker], rounds: int, method: str, *arguments) -> dict[str, list]:
    """The workers' answers, lists, those of all rounds joined.

    A round begins with another worker than the one before.
    """
    names = list(workers)
    answers = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            answers[name] += workers[name].ask(method, *arguments)
        names.append(names.pop(0))
    return answers


def time_turn(work: Callable, compute: Compute, seconds: float) -> list[float]:
    """Seconds of each call of work(): one, or as many as fit into `seconds`."""
    times = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin + times[-1] < seconds:
        compute.synchronize()
        start = time.perf_counter()
        work()
        compute.synchronize()
        times.append(time.perf_counter() - start)
    return times


def profile(work: Callable, compute: Compute, path: Path):
    """Two calls of work(): PATH.txt, operators by their time; PATH.json for chrome://tracing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        work()
        work()
        compute.synchronize()
    kind = "cpu" if compute.device.type == "cpu" else "device"
    table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=30)
    path.with_suffix(".txt").write_text(table)
    profiler.export_chrome_trace(str(path.with_suffix(".json")))


def quartiles(seconds: list[float]) -> list[float]:
    return np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()


def overlap(a: tuple, b: tuple) -> bool:
    """Whether two intervals, which begin and end with these numbers, have a part in common."""
    return a[0] <= b[-1] and b[0] <= a[-1]
