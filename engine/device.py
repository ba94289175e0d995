"""The hardware behind one object: device, dtype and autocast, processes (torchrun), memory and matrix-product peak.

Everything else asks `Compute` and never branches on cuda, mps, cpu or the number of processes.
"""
import contextlib
import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist

from engine.options import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# From this width on bf16 is the CPU's default. Below, with AMX, casts cost more than the products gain; with AVX512-BF16
# a step of width 128 takes 0.96 of the time in float32, too little to give up its accuracy, and one of width 256 takes 0.68.
BF16_WIDTH = 256
CPUINFO = Path("/proc/cpuinfo")


def pick_device(name: str) -> torch.device:
    """"auto" -> cuda > mps > cpu. Raises UserError for a device that is absent or unknown."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name} is not a device: choose auto, cpu, cuda, cuda:0, ... or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device={name} asked for, but PyTorch sees {torch.cuda.device_count()} CUDA GPUs: use --device=cpu or --device=auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps asked for, but this machine has none: use --device=cpu or --device=auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={name} is not supported: choose auto, cpu, cuda or mps")
    return device


def pick_dtype(name: str, device: torch.device, n_embd: int) -> str:
    """"auto" -> bfloat16 where the hardware multiplies it natively and the model is wide enough to gain by it, else float32."""
    if name == "float16" and device.type == "cpu":
        raise UserError("--dtype=float16 is for GPUs: use --dtype=bfloat16 or float32 on a CPU")
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and n_embd >= BF16_WIDTH and cpu_multiplies_bf16()
    return "bfloat16" if native else "float32"


def cpu_multiplies_bf16() -> bool:
    """Faster than float32: with AMX, and with AVX512-BF16 on AMD's processors (2.2 times), not on Intel's (0.5 times, measured)."""
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text()


def autocast(device: torch.device, dtype: str):
    """A context for forward passes in `dtype` (parameters stay float32)."""
    return torch.autocast(device.type, dtype=DTYPES[dtype], enabled=dtype != "float32")


class Compute:
    """One process's share of the machine: `device`, `dtype` (a name), `rank` of `world`; `main` is True on rank 0."""

    def __init__(self, device: str, dtype: str, n_embd: int):
        self.rank, self.world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.main, self.local_main, self.ddp = self.rank == 0, local == 0, "RANK" in os.environ
        self.device = pick_device(device)
        if self.ddp and self.device.type == "cuda":
            wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
            if wanted > there:
                raise UserError(f"{wanted} processes on this node, but {there} GPUs: use --nproc_per_node={there} or --device=cpu")
            self.device = torch.device("cuda", local)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        self.dtype = pick_dtype(dtype, self.device, n_embd)

    def __enter__(self):
        if self.ddp:
            # gloo beside nccl: flags and Python objects travel between CPUs, without waiting for the GPU
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, kind, *rest):
        if self.ddp and kind is None:
            dist.barrier()
        if self.ddp:
            dist.destroy_process_group()

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        return f"{self.device.type} ({name}), {self.dtype}" + (f", {self.world} processes" if self.ddp else "")

    def autocast(self):
        return autocast(self.device, self.dtype)

    @contextlib.contextmanager
    def full_precision(self):
        """A context in which float32 products are float32's: on a GPU they are TF32's otherwise, with 10 bits for the fraction."""
        matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = convolution

    def together(self, work, alone: bool):
        """work() where `alone` is true; a UserError it raises is raised on every process, so that none waits for another."""
        result, error = None, None
        if alone:
            try:
                result = work()
            except UserError as e:
                error = str(e)
        if errors := [e for e in self.gather(error) if e]:
            raise UserError(errors[0])
        return result

    def once_per_node(self, work):
        """work() on one process of each node, then on the others, which find its files; returns its result on all."""
        result = self.together(work, alone=self.local_main)
        return result if self.local_main else work()

    def move(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if self.device.type == "cuda":
            return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [t.to(self.device) for t in tensors]

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model behind DistributedDataParallel where there are several processes. Its buffers are constants: they need no broadcast,
        in which a process without a batch to evaluate would be missed."""
        if not self.ddp:
            return model
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None,
                                                         broadcast_buffers=False)

    def reduce(self, values: list[float], how: str = "sum") -> list[float]:
        """Sums (or maxima) over the processes, as Python floats, the same on all."""
        if not self.ddp:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(t, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return t.tolist()

    def gather(self, value) -> list:
        """One picklable value of each process, in the order of ranks, on all of them."""
        if not self.ddp:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def random_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.device.type == "mps":
            state["mps"] = torch.mps.get_rng_state()
        return state

    def set_random_state(self, state: dict[str, torch.Tensor]):
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        if "mps" in state and self.device.type == "mps":
            torch.mps.set_rng_state(state["mps"])

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory_mb(self) -> float:
        """Peak memory of this process: allocated by PyTorch on a GPU, resident on a CPU (MB = 2^20 bytes)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory() / 2**20
        kilo = 1 if os.uname().sysname == "Darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**20

    def matmul_peak(self, seconds: float = 0.3) -> float:
        """FLOP/s of a large matrix product in `dtype`, measured now: the best of what fits into `seconds`. Peak memory counts from here on."""
        n = 8192 if self.device.type == "cuda" else 1024
        a, b = torch.randn(2, n, n, device=self.device, dtype=DTYPES[self.dtype], generator=torch.Generator(self.device).manual_seed(0))
        out, best = torch.empty_like(a), float("inf")
        torch.mm(a, b, out=out)
        self.synchronize()
        end = time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            self.synchronize()
            best = min(best, time.perf_counter() - start)
        if self.device.type == "cuda":  # peak_memory_mb is that of what comes after
            del a, b, out
            torch.cuda.reset_peak_memory_stats(self.device)
        return 2 * n**3 / best
