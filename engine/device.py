"""The hardware behind one object: device, dtype, processes, memory, matrix-product speed.

Everything else asks `Compute` and never branches on cuda, mps, cpu or the number of processes.
"""
import contextlib
import ctypes
import hashlib
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist

from engine.options import LOCAL, Options, OwnError, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# From this width on bf16 is the CPU's default. Below, with AMX, casts cost more than the products
# gain. With AVX512-BF16 a step of width 128 takes 0.96 of the time in float32, too little to give
# up its accuracy, and one of width 256 takes 0.68.
BF16_WIDTH = 256
PATIENCE = timedelta(days=14)  # a preparation of data may take so long
CPUINFO = Path("/proc/cpuinfo")


@dataclass
class ComputeConfig(Options):
    """What a command computes on."""
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps", LOCAL] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"],
                     "number format of the model's products"] = "auto"


def pick_device(name: str) -> torch.device:
    """"auto" -> cuda > mps > cpu. Raises UserError for a device that is absent or unknown."""
    there = {"cuda": torch.cuda.device_count(),  # the best first
             "mps": int(torch.backends.mps.is_available()),
             "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in there.items() if count)
    try:
        device = torch.device(name)
        count = there[device.type]
    except (KeyError, RuntimeError):
        raise UserError(f"--device={name} is not supported: choose auto, cpu, cuda, cuda:0, ... "
                        "or mps") from None
    if count <= (device.index or 0):
        raise UserError(f"--device={name} asked for, but PyTorch sees {count} {device.type} "
                        "devices: use --device=cpu or --device=auto")
    # torch.cuda.set_device asks for a number.
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def pick_dtype(name: str, device: torch.device, n_embd: int) -> str:
    """"auto" -> bfloat16 where the hardware multiplies it natively and the model gains by it."""
    if name not in ("auto", *DTYPES):
        raise UserError(f"dtype={name} is unknown: choose auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise UserError("--dtype=float16 is for GPUs: use --dtype=bfloat16 or float32 on a CPU")
    if name != "auto":
        return name
    if device.type == "cuda":
        native = gpu_multiplies_bf16()
    else:
        native = device.type == "cpu" and n_embd >= BF16_WIDTH and cpu_multiplies_bf16()
    return "bfloat16" if native else "float32"


def gpu_multiplies_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_multiplies_bf16() -> bool:
    """Faster than float32: with AMX, and with AVX512-BF16 on AMD's processors.

    Measured: 2.2 times as fast there, half as fast with AVX512-BF16 on Intel's.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    if not torch.cpu._is_avx512_bf16_supported() or not CPUINFO.exists():
        return False
    return "AuthenticAMD" in CPUINFO.read_text()


def check_compiler(device: torch.device):
    """Raises UserError where torch.compile would not find a compiler."""
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("--compile on a CPU needs a C++ compiler (g++ or clang++) on the PATH: "
                        "install one, or leave --compile off")


def tune_allocator() -> bool:
    """Let malloc keep freed memory for the process's next allocation; True where it can be (glibc).

    By default each block above 32 MB is mapped anew and given back when it is freed. Every
    training step then pays the page faults of its large temporaries again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; TypeError on Windows
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1


def end_with_parent():
    """On Linux: let the system send SIGTERM, which saves, when torchrun is killed."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # prctl.h
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def in_touch(seconds: int):
    """A context: where another process is lost, or silent for `seconds`, it raises OwnError."""
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        reason = re.sub(r"\[\S+:\d+\] ", "", str(e).splitlines()[0])[:120]  # without gloo's file
        raise OwnError(f"process {os.environ['RANK']} has lost touch with another one, which has "
                       f"ended, cannot be reached or was silent for --timeout={seconds} seconds "
                       f"({reason}). What was saved is intact: use --init_from=resume") from e


def shown(value) -> str:
    """A value as an error names it; of a long one its hash."""
    text = repr(value)
    return text if len(text) <= 60 else hashlib.sha256(text.encode()).hexdigest()[:12]


def fresh_store() -> dist.Store:
    """Where processes leave their addresses for each other, without those of killed ones.

    After a failure torchrun starts the workers again beside the same store. On one node the number
    of restarts tells the rounds apart. Nodes may count differently: with several, set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return store
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


class Compute:
    """One process's share of the machine: `device`, `dtype` (a name), `rank` of `world`.

    `main` is True on rank 0, `ddp` where torchrun started the processes. timeout: seconds after
    which a process that does not answer is given up.
    """

    def __init__(self, device: str, dtype: str, n_embd: int, timeout: int = 1800):
        self.timeout = timeout
        self.patient = None  # the processes once more, for waits as long as PATIENCE
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.ddp = "RANK" in os.environ
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.local_main = local == 0
        self.device = pick_device(device)
        if self.ddp and self.device.type == "cuda":
            wanted = int(os.environ["LOCAL_WORLD_SIZE"])
            there = torch.cuda.device_count()
            if wanted > there:
                raise UserError(f"{wanted} processes on this node, but {there} GPUs: use "
                                f"--nproc_per_node={there} or --device=cpu")
            self.device = torch.device("cuda", local)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
            # With a mask its gradients can be nan on an H100 in PyTorch 2.13 (pytorch#196678).
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.dtype = pick_dtype(dtype, self.device, n_embd)

    def __enter__(self):
        if self.ddp:
            # gloo beside nccl: flags and Python objects travel between CPUs, without waiting for
            # the GPU.
            end_with_parent()
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            with in_touch(self.timeout):
                dist.init_process_group(backend, store=fresh_store(), rank=self.rank,
                                        world_size=self.world,
                                        timeout=timedelta(seconds=self.timeout))
                self.patient = dist.new_group(timeout=PATIENCE, backend="gloo")
        return self

    def __exit__(self, kind, error, traceback):
        if self.ddp:
            try:
                with in_touch(self.timeout):
                    if error:
                        raise error
                    dist.barrier()
            finally:
                dist.destroy_process_group()

    def describe(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{torch.get_num_threads()} threads"
        processes = f", {self.world} processes" if self.ddp else ""
        return f"{self.device.type} ({name}), {self.dtype}{processes}"

    def autocast(self):
        """A context for forward passes in `dtype`; parameters stay float32."""
        enabled = self.dtype != "float32"
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype], enabled=enabled)

    @contextlib.contextmanager
    def full_precision(self):
        """A context without TF32, which on a GPU gives float32's products 10 bits of fraction."""
        matmul = torch.get_float32_matmul_precision()
        convolution = torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = convolution

    def on_main(self, work: Callable):
        """work() on rank 0, which alone gets its result; its UserError is raised on all."""
        return self._where(self.main, work)

    def once_per_node(self, work: Callable):
        """work() on one process of each node, then on the others, which find its files.

        However long that takes, the others wait. A UserError of any process is raised on all.
        """
        first = self._where(self.local_main, work, self.patient)
        then = self._where(not self.local_main, work, self.patient)
        return first if self.local_main else then

    def _where(self, here: bool, work: Callable, group: dist.ProcessGroup | None = None):
        """work() where `here` is true. A UserError is raised on every process: none waits."""
        result = None
        error = None
        if here:
            try:
                result = work()
            except UserError as e:
                error = str(e)
        errors = [e for e in self.gather(error, group) if e]
        if errors:
            raise UserError(errors[0])
        return result

    def check_same(self, facts: dict):
        """Raises UserError, on all processes, where one of `facts`, {name: value}, differs."""
        found = self.gather(facts)
        for name in dict.fromkeys(name for theirs in found for name in theirs):
            ranks = {}
            for rank, theirs in enumerate(found):
                ranks.setdefault(shown(theirs.get(name)), []).append(str(rank))
            if len(ranks) > 1:
                said = "; ".join(f"{value} on rank{'s' * (len(r) > 1)} {', '.join(r)}"
                                 for value, r in ranks.items())
                raise UserError(f"all processes must have the same {name}, which is {said}")

    def move(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if self.device.type == "cuda":
            return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [t.to(self.device) for t in tensors]

    def rounds(self, items: Sequence, size: int) -> Iterator[tuple]:
        """Batches of up to `size` of `items`, this process's in turn: (batch, how many count).

        Every process gets as many, since all must take part in a sharded model's forward pass.
        Where none is left it is the last one again, of which 0 count.
        """
        batches = [items[i:i + size] for i in range(0, len(items), size)]
        for first in range(0, len(batches), self.world):
            mine = first + self.rank
            if mine < len(batches):
                yield batches[mine], len(batches[mine])
            else:
                yield batches[-1], 0

    def reduce(self, values: list[float], how: str = "sum") -> list[float]:
        """Sums (or maxima) over the processes, as Python floats, the same on all."""
        if not self.ddp:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(t, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return t.tolist()

    def gather(self, value, group: dist.ProcessGroup | None = None) -> list:
        """One picklable value of each process, in the order of ranks, on all of them.

        group: None waits --timeout seconds for the others, `patient` as long as it takes.
        """
        if not self.ddp:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group)
        return values

    def random_state(self) -> dict:
        """{"cpu": that of the CPU, and "cuda" or "mps": that of the GPU}."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            state[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        return state

    def set_random_state(self, state: dict):
        torch.set_rng_state(state["cpu"])
        if self.device.type != "cpu" and self.device.type in state:
            torch.get_device_module(self.device).set_rng_state(state[self.device.type])

    def synchronize(self):
        """Wait until the device has done what it was given: before a look at the clock."""
        torch.get_device_module(self.device).synchronize()

    def peak_memory_mb(self) -> float:
        """Peak of this process: PyTorch's on a GPU, resident memory on a CPU (MB = 2^20 bytes)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory() / 2**20
        # ru_maxrss is in bytes on macOS, in kilobytes on Linux.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    def matmul_peak(self, seconds: float = 0.3) -> float:
        """FLOP/s of a large matrix product in `dtype`, measured now: the best within `seconds`.

        Peak memory on a GPU counts from here on.
        """
        n = 8192 if self.device.type == "cuda" else 1024
        generator = torch.Generator(self.device).manual_seed(0)
        a, b = torch.randn(2, n, n, device=self.device, dtype=DTYPES[self.dtype],
                           generator=generator)
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        self.synchronize()
        taken = []
        end = time.perf_counter() + seconds
        while not taken or time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            self.synchronize()
            taken.append(time.perf_counter() - start)
        if self.device.type == "cuda":
            del a, b, out
            torch.cuda.reset_peak_memory_stats(self.device)
        return 2 * n**3 / min(taken)
