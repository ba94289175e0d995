"""Runs of train.py in processes of their own: killed and resumed, and several with torchrun."""
from pathlib import Path

import pytest
import torch

from conftest import SMALL, killer, launch, messages, read_metrics, shell, torchrun
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
