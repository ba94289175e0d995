"""metrics.py: what a run is judged by, and where its records go."""
import json
import sys

import pytest

from engine.metrics import MetricsLog, is_better, judging, summary
from engine.options import UserError


def test_a_run_is_judged_by_the_last_metric_that_can_judge():
    assert judging({"train_loss": 1.0, "val_bpb": 2.0}) is None
    assert judging({"val_loss": 1.0, "val_bpb": 2.0}) == "val_loss"
    assert judging({"val_accuracy": 0.5, "val_loss": 1.0}) == "val_accuracy"


@pytest.mark.parametrize("metric, good, bad", [("val_loss", 1.0, 2.0), ("val_accuracy", 0.9, 0.1)])
def test_of_equals_the_later_is_better(metric, good, bad):
    assert is_better(metric, good, bad) and not is_better(metric, bad, good)
    assert is_better(metric, good, good)


def test_summaries():
    record = {"step": 3, "train_loss": 1.25, "val_bpb": 2.0, "val_ap": 31.26, "kappa_before": [3.0],
              "tokens_per_s": 12345.6}
    assert summary(record) == ("train loss 1.2500, val bpb 2.0000, val ap 31.3, "
                               "12,346 tokens/s")
    assert summary(record, terse=True) == "train 1.2500, AP 31.3, 12,346 tokens/s"


def open_log(folder, step=-1, **options):
    return MetricsLog(folder, step, 9, **dict(tensorboard=False, wandb=None) | options)


def test_a_resumed_run_drops_later_records_and_an_unfinished_line(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}}}\n' for step in (0, 4, 8)]
    for step, end, kept in [(4, "", 2), (8, "", 3), (9, '{"step": 9', 3), (-1, "", 0)]:
        path.write_text("".join(lines) + end)
        log = open_log(tmp_path, step)
        log.write({"step": 9, "val_loss": 0.5})
        log.close()
        added = json.dumps({"step": 9, "val_loss": 0.5}) + "\n"
        assert path.read_text() == "".join(lines[:kept]) + added
        assert capsys.readouterr().out == "step 9: val loss 0.5000\n"


@pytest.mark.parametrize("debris", [b"\xff\xfe\x00", b"\xff\xfe\n", bytes(4096),
                                    b'{"step": 9, "val\xc3\n\x80\n'])
def test_what_a_crash_leaves_behind_the_last_record_is_dropped(debris, tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = b'{"step": 4}\n'
    path.write_bytes(record + debris)
    open_log(tmp_path, 8).close()
    assert path.read_bytes() == record
    for lost, lines in [(record + debris + b"\n" + record, 1), (debris, 0)]:
        path.write_bytes(lost)
        with pytest.raises(UserError, match=f"is damaged after {lines} lines"):
            open_log(tmp_path, 8)
        assert path.read_bytes() == lost


@pytest.mark.parametrize("option, words", [
    ("tensorboard", "--tensorboard needs the package .*tensorboard"),
    ("wandb", "--wandb_log needs the wandb package"),
])
def test_a_missing_package_loses_no_record(option, words, tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=words):
        open_log(tmp_path, **{option: {"project": "precond"}})
    assert path.read_text() == '{"step": 0}\n'


def test_tensorboard_goes_on_where_the_checkpoint_is(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -r requirements-extra.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(start, *steps):
        metrics = open_log(tmp_path, start, tensorboard=True)
        for step in steps:
            metrics.write({"step": step, "train_loss": 1.0, "kappa_after": [2.0, None]})
        metrics.close()
        found = EventAccumulator(str(tmp_path)).Reload()
        assert "kappa_after/0" in found.scalars.Keys()
        assert "kappa_after/1" not in found.scalars.Keys()
        return [event.step for event in found.Scalars("train_loss")]
    assert write(-1, 0, 2, 4, 6) == [0, 2, 4, 6]
    assert write(4, 6, 8) == [0, 2, 4, 6, 8]
    assert write(-1, 0, 3) == [0, 3]  # another run in the place of this one
