"""Runs of train.py in processes of their own: killed and resumed, and several with torchrun."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, SMALL, killer, launch, messages, patched, read_metrics, shell, torchrun
from engine import checkpoint

pytestmark = pytest.mark.slow
RUN = [*SMALL, "--max_iters=30", "--eval_interval=8", "--log_interval=3", "--dropout=0.1",
       "--gradient_accumulation_steps=2", "--precond=True"]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_resumes_bit_for_bit(processes, corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(processes, "train.py", *RUN, *corpus, f"--out_dir={whole}")
    done = launch(processes, killer(tmp_path, "train", 20), *RUN, *corpus, f"--out_dir={killed}",
                  check=False)
    assert done.returncode != 0
    assert read_metrics(killed)[-1]["step"] == 18
    assert checkpoint.read(killed / "ckpt.pt")["step"] == 16
    launch(processes, "train.py", "--init_from=resume", f"--out_dir={killed}")
    records = read_metrics(whole)
    assert read_metrics(killed) == records
    assert [r["step"] for r in records] == [0, 3, 6, 8, 9, 12, 15, 16, 18, 21, 24, 27, 30]
    a, b = (checkpoint.read(folder / "ckpt.pt")["model"] for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_processes_follow_the_trajectory_of_one(corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*SMALL, *corpus, "--max_iters=20", "--eval_interval=10",
               "--gradient_accumulation_steps=3", "--batch_size=2"]
    torchrun(2, "train.py", *options, f"--out_dir={two}")
    shell("train.py", *options, f"--out_dir={one}")
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        assert a["step"] == b["step"] and a.get("tokens") == b.get("tokens")
        for name in {"train_loss", "val_loss", "grad_norm"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=2e-5), (a["step"], name)
    # a run of one process can be taken over by two
    torchrun(2, "train.py", "--init_from=resume", "--max_iters=24", f"--out_dir={one}")
    assert read_metrics(one)[-1]["step"] == 24


def test_indivisible_batch_under_torchrun_is_one_line(corpus, tmp_path):
    done = torchrun(2, "train.py", *SMALL, *corpus, "--batch_size=3", f"--out_dir={tmp_path}",
                    check=False)
    assert ("train.py: error: batch_size x gradient_accumulation_steps = 3 x 1 = 3 sequences "
            "cannot be split over 2 processes") in done.stderr
    assert 'File "' not in done.stderr.split("train.py: error")[0]


def test_out_dir_that_only_some_nodes_see_is_the_same_error_on_every_rank(corpus, tmp_path):
    shell("train.py", *SMALL, *corpus, "--max_iters=2", f"--out_dir={tmp_path / 'node0' / 'out'}")
    found = messages(tmp_path, f"""
        os.makedirs(f'{tmp_path}/node{{rank}}', exist_ok=True)
        os.chdir(f'{tmp_path}/node{{rank}}')
    """, "--init_from=resume", "--max_iters=4", "--out_dir=out")
    expected = ("out_dir=out must be one folder that all nodes see: rank 0 finds there: step 2; "
                "rank 1: no checkpoint out/ckpt.pt: train first, or name the run's folder with "
                "--out_dir")
    assert found == [expected] * 2


@pytest.mark.parametrize("patch, words", [
    ("sys.argv.append('--learning_rate=0.01')", "learning_rate, which is 0.012 on rank 0; 0.01"),
    ("sys.argv.append('--max_iters=3')", "max_iters, which is 2 on rank 0; 3 on rank 1"),
    ("code = run.code(); run.code = lambda: code | {'model.py': 1}", "model.py, which is"),
    ("os.environ['OMP_NUM_THREADS'] = '2'; sys.argv.append('--timeout=60')", ""),
], ids=["option", "length", "code", "free"])
def test_processes_that_differ_do_not_train_together(patch, words, corpus, tmp_path):
    found = messages(tmp_path, f"if rank == '1': {patch}", *SMALL, *corpus, "--max_iters=2",
                     f"--out_dir={tmp_path / 'out'}")
    assert found[0] == found[1] and words in found[0] and bool(found[0]) == bool(words)
    assert (tmp_path / "out").exists() == (not words)


def test_data_of_one_process_that_is_another(corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(Path(corpus[0].partition("=")[2]).read_text()[::-1])  # of the same alphabet
    found = messages(tmp_path, f"""
        prepare = train.text.prepare
        if rank == "1":
            train.text.prepare = lambda _, *rest: prepare({str(other)!r}, *rest)
    """, *SMALL, *corpus, "--max_iters=2", f"--out_dir={tmp_path / 'out'}")
    assert "must have the same data_sha256, which is" in found[0] and found[0] == found[1]


def test_a_process_that_does_not_answer_ends_the_run_in_a_line(corpus, tmp_path):
    program = patched(tmp_path, """
        step = Trainer.train_step
        def silent(self):
            if self.step == 3 and rank == "1":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun will not wait for it
                time.sleep(600)
            step(self)
        Trainer.train_step = silent
    """)
    out = tmp_path / "out"
    done = torchrun(2, program, *SMALL, *corpus, "--timeout=10", "--eval_interval=2",
                    f"--out_dir={out}", check=False)
    before, said = done.stderr.split("program.py: error: ")
    assert "Traceback" not in before  # afterwards torchrun has its own
    assert said.startswith("process 0 has lost touch with another one")
    assert "--timeout=10 seconds" in said.splitlines()[0]
    assert checkpoint.read(out / "ckpt.pt")["step"] == 2


def test_the_others_wait_for_the_data_however_long_it_takes(corpus, tmp_path):
    program = patched(tmp_path, """
        prepare = train.text.prepare
        def slow(*arguments):
            if rank == "0":
                time.sleep(15)
            return prepare(*arguments)
        train.text.prepare = slow
    """)
    torchrun(2, program, *SMALL, *corpus, "--timeout=10", "--max_iters=1", f"--out_dir={tmp_path}")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of such an end")
def test_workers_end_when_torchrun_is_killed(corpus, tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "train.py", *SMALL, *corpus, "--max_iters=20000", "--eval_interval=20000",
         f"--out_dir={tmp_path}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("step "):
            break
    run.kill()
    *_, last = run.stdout.read().splitlines()  # up to the end of the last process
    assert "stopped by SIGTERM; saved" in last
    assert checkpoint.read(tmp_path / "ckpt.pt")["step"] > 0


@pytest.mark.skipif(not Path("/dev/full").exists(),
                    reason="no /dev/full, a file on a disk that is always full")
def test_full_disk_for_metrics_is_the_same_error_on_every_rank(corpus, tmp_path):
    found = messages(tmp_path, """
        class Full(run.MetricsLog):
            def __init__(self, *args):
                super().__init__(*args)
                self.file = open("/dev/full", "a")
        run.MetricsLog = Full
    """, *SMALL, *corpus, "--max_iters=2", f"--out_dir={tmp_path}")
    expected = (f"cannot write {tmp_path / 'metrics.jsonl'}: No space left on device. Make room "
                "and use --init_from=resume")
    assert found == [expected] * 2
