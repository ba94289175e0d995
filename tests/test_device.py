"""device.py: which device and number format are chosen, and errors that reach every process."""
import pytest
import torch

from engine import device
from engine.device import Compute
from engine.options import UserError


def test_devices():
    assert device.pick_device("cpu").type == "cpu"
    for name in ("cuda:99", "toaster", "meta"):
        with pytest.raises(UserError, match=f"--device={name}"):
            device.pick_device(name)


@pytest.mark.parametrize("name, number", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_one_process_has_a_gpu_of_its_own(name, number, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    before = torch.get_float32_matmul_precision()
    try:
        compute = device.Compute(name, "float32", 128)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert chosen == [number] and compute.device == torch.device("cuda", number)


def test_dtypes(monkeypatch):
    cpu = torch.device("cpu")
    assert device.pick_dtype("bfloat16", cpu, 8) == "bfloat16"
    for native in (False, True):
        monkeypatch.setattr(device, "cpu_multiplies_bf16", lambda: native)  # noqa: B023
        wide = device.pick_dtype("auto", cpu, device.BF16_WIDTH)
        assert wide == ("bfloat16" if native else "float32")
        assert device.pick_dtype("auto", cpu, device.BF16_WIDTH - 1) == "float32"
    with pytest.raises(UserError, match="float16 is for GPUs"):
        device.pick_dtype("float16", cpu, 512)


@pytest.mark.parametrize("amx, avx, vendor, fast", [
    (True, True, "GenuineIntel", True),
    (False, True, "GenuineIntel", False),
    (False, True, "AuthenticAMD", True),
    (False, False, "AuthenticAMD", False),
])
def test_processors_that_multiply_bfloat16_faster(amx, avx, vendor, fast, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    assert device.cpu_multiplies_bf16() == fast


def test_compiling_needs_a_compiler(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(device.shutil, "which", lambda name: name == "clang++" or None)
    device.check_compiler(cpu)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"--compile on a CPU needs a C\+\+ compiler"):
        device.check_compiler(cpu)


class Second(Compute):
    """The second of two processes on a node, the first of which met `error`."""

    def __init__(self, error=None):
        super().__init__("cpu", "float32", 16)
        self.error = error
        self.main = self.local_main = False

    def gather(self, value, group=None):
        return [self.error, value]


@pytest.mark.parametrize("method", ["on_main", "once_per_node"])
def test_an_error_of_one_process_is_raised_on_all(method):
    def work():
        calls.append(1)
        return "done"
    calls = []
    with pytest.raises(UserError, match="^no room$"):
        getattr(Second("no room"), method)(work)
    assert not calls
    # Without an error, what the first process of a node has prepared is there for the others.
    assert getattr(Second(), method)(work) == (None if method == "on_main" else "done")

    def failing():
        raise UserError("not here either")
    with pytest.raises(UserError, match="not here either"):
        getattr(Compute("cpu", "float32", 16), method)(failing)


class Third(Compute):
    """The last of three processes; the others have the facts `theirs`."""

    def __init__(self, *theirs):
        super().__init__("cpu", "float32", 16)
        self.theirs = theirs

    def gather(self, value):
        return [*self.theirs, value]


def test_processes_with_other_facts_are_named():
    mine = {"code.py": "a" * 64, "seed": 1, "name": "x"}
    Third(mine, dict(mine)).check_same(mine)
    for theirs, words in [({"seed": 2}, "seed, which is 1 on ranks 0, 2; 2 on rank 1$"),
                          ({"more": 0}, "more, which is None on ranks 0, 2; 0 on rank 1$"),
                          ({"code.py": "a" * 63 + "b"}, r"code.py, which is \w{12} on ranks 0, 2")]:
        with pytest.raises(UserError, match=words):
            Third(mine, mine | theirs).check_same(mine)


def test_full_precision_is_taken_back():
    def precision():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    before = precision()
    with pytest.raises(KeyError), Compute("cpu", "float32", 16).full_precision():
        assert precision() == ("highest", False)
        raise KeyError
    assert precision() == before


def test_random_state_is_that_of_the_next_draw():
    compute = Compute("cpu", "float32", 16)
    state = compute.random_state()
    drawn = torch.rand(3)
    compute.set_random_state(state)
    assert torch.equal(torch.rand(3), drawn)
