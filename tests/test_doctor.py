"""doctor.py: one line for each thing that it tries."""
import pytest

import doctor
from conftest import error
from engine.startup import check_names


@pytest.mark.slow
def test_a_line_for_each_check_and_what_failed_said(call, monkeypatch):
    good = ["train.py", f"--dataset={doctor.ROOT / 'README.md'}", "--n_layer=1", "--n_head=1",
            "--n_embd=8", "--block_size=8", *doctor.TEN]
    monkeypatch.setattr(doctor, "checks", lambda device: [
        ("good", good), ("bad", [*good, "--n_head=3"]), ("crash", ["-c", "1 / 0"])])
    code, out, _ = call(doctor, "--device=cpu")
    assert code == 1 and "2 failed" in out
    assert "torch 2." in out and "float32: " in out and "--dtype=auto is float32" in out
    lines = {line.split(":")[0].strip(): line for line in out.splitlines()}
    assert "val loss" in lines["ok     good"]
    assert "n_head=3 does not divide n_embd=8" in lines["FAILED bad"]
    assert "ZeroDivisionError" in lines["FAILED crash"]
    monkeypatch.setattr(doctor, "checks", lambda device: [("good", good)])
    code, out, _ = call(doctor)
    assert code == 0 and out.endswith("all is well\n")


@pytest.mark.slow
def test_its_commands_have_options_that_exist():
    commands = dict(doctor.checks("cpu"))
    assert {"characters", "2 processes, sharded", "images, segment"} <= commands.keys()
    for words in commands.values():
        script = next(word for word in words if word.endswith(".py"))
        own = words[words.index(script):]
        check_names(doctor.ROOT / script, own)


def test_a_device_that_is_absent(call, monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    assert "--device=cuda asked for, but this machine has none" in error(
        call(doctor, "--device=cuda"))
