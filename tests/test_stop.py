"""Ctrl-C and SIGTERM, which a run answers after the step that it is in."""
import os
import signal

import pytest

import train
from conftest import SMALL
from engine import checkpoint, trainer
from engine.stop import StopSignal


def test_a_second_interrupt_aborts_a_run_of_one_process():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal(alone=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with StopSignal(alone=False) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_during_the_last_evaluation_counts(corpus, tmp_path, call, monkeypatch):
    evaluate = trainer.Trainer.evaluate

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate(self)
    monkeypatch.setattr(trainer.Trainer, "evaluate", interrupted)
    run = [*SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=2"]
    code, out, _ = call(train, *run)
    assert code == 143 and "stopped by SIGTERM" in out and "next:" not in out
    assert checkpoint.read(tmp_path / "ckpt.pt")["step"] == 2
