"""compare.py: pairs are exact, nothing mixes, nothing is dropped.

`fake` runs stand for training where only the comparison is tested.
"""
import errno
import fcntl
import json
import os
import signal
import statistics
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("scipy", reason="pip install -r requirements-extra.txt")

import compare
from conftest import SMALL, error, read_metrics
from engine import trainer
from study import figures, fingerprint, launch, report, runs, stats
from study.arms import beyond, make_arms

TINY = [*SMALL, "--max_iters=6", "--eval_interval=2", "--log_interval=1", "--warmup_iters=2"]
VARY = ["--vary", "precond=False,True"]
FAKE = """
    import json, os, signal, sys, time
    from pathlib import Path
    typed = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
    rate = float(typed.get("learning_rate", 1e-3))
    seed = float(typed.get("seed", 0))
    power = float(typed.get("precond_power", 0))
    folder = Path(typed["out_dir"])
    if power == 7:
        sys.exit("no space left")
    if power == 8 and seed in (2, 100001):
        print("train.py: error: the loss is not finite at step 3. Lower --learning_rate")
        sys.exit(2)
    if power == 9 and seed == 1 and not (folder / "ckpt.pt").exists():
        (folder / "ckpt.pt").write_text(typed["init_from"])
        signal.signal(signal.SIGTERM, lambda *_: (folder / "saved").touch() or sys.exit(143))
        (folder / "metrics.jsonl").write_text('{"step": 2, "val_loss": 1}\\n')
        time.sleep(60)
    (folder / "started.txt").write_text(" ".join(sys.argv[1:]))
    loss = 2 + abs(rate - (1e-3 if power == 0 else 1e-2)) + 0.01 * seed
    loss -= 0.1 * power * (1 + 0.1 * seed)
    with open(folder / "metrics.jsonl", "w") as f:
        for step in range(0, 7, 2):
            value = loss + (6 - step)
            kappa = {"kappa_before": [10.0 + seed, None], "kappa_after": [5.0 + seed, 2.0]}
            costs = {"elapsed_s": step / 2, "tokens": 10 * step, "peak_memory_mb": 7}
            f.write(json.dumps({"step": step, METRIC: value, **costs, **kappa}) + "\\n")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Runs that train nothing; fake("val_accuracy") changes what they record."""
    def record(metric):
        path = tmp_path / "fake.py"
        path.write_text(f"METRIC = {metric!r}\n" + textwrap.dedent(FAKE))
        command = launch.Comparison.command
        if not hasattr(command, "faked"):
            def replaced(self, run):
                return [sys.executable, "-S", str(path), *command(self, run)[2:]]
            replaced.faked = True
            monkeypatch.setattr(launch.Comparison, "command", replaced)
    monkeypatch.setattr(launch, "POLL", 0.01)
    record("val_loss")
    return record


@pytest.fixture
def study(fake, call, tmp_path):
    """study(arguments) -> (what `call` returns, compare.json)."""
    def run(*arguments, script="train.py"):
        result = call(compare, script, "--max_iters=6", f"--out_dir={tmp_path / 'out'}", *arguments)
        path = tmp_path / "out/compare.json"
        return result, json.loads(path.read_text()) if path.exists() else None
    return run


def folders(out):
    return sorted(path for path in (out / "runs").iterdir())


@pytest.mark.slow
def test_pairs_are_exact_and_stopping_changes_nothing(corpus, tmp_path, call, monkeypatch):
    off = ["--arm", "off: precond=False"]
    on = ["--arm", "on: precond=True"]
    again = ["--arm", "again: log_interval=2"]
    common = ["train.py", *TINY, *corpus, "--seeds=2"]
    monkeypatch.setattr(launch, "POLL", 0.05)
    code, out, _ = call(compare, *common, *off, *on, f"--out_dir={tmp_path / 'whole'}")
    whole = json.loads((tmp_path / "whole/compare.json").read_text())
    assert code == 0 and 0 not in whole["arms"]["on"]["differences"]
    assert "tokens/s" in out and (tmp_path / "whole/compare.md").read_text() in out

    sleep, stopped = launch.time.sleep, []

    def interrupting(seconds):  # when a run has begun
        if not stopped and list((tmp_path / "parts").glob("runs/*/ckpt.pt")):
            stopped.append(os.kill(os.getpid(), signal.SIGTERM))
        sleep(seconds)
    with monkeypatch.context() as patch:
        patch.setattr(launch.time, "sleep", interrupting)
        code, _, err = call(compare, *common, *off, *again, "--jobs=2",
                            f"--out_dir={tmp_path / 'parts'}")
    assert code == 143 and "Type the same command again" in err
    assert not (tmp_path / "parts/compare.json").exists()
    code, out, _ = call(compare, *common, *off, *again, f"--out_dir={tmp_path / 'parts'}")
    parts = json.loads((tmp_path / "parts/compare.json").read_text())
    same = parts["arms"]["again"]
    assert code == 0 and "again has exactly the val_loss of off on all 2 seeds" in out
    assert same["differences"] == [0, 0]
    assert (same["paired"]["low"], same["paired"]["high"], same["paired"]["p"]) == (0, 0, 1)
    assert parts["arms"]["off"]["final"] == whole["arms"]["off"]["final"]
    assert not parts["serial"] and "| tokens/s" not in out and "--jobs=1" in out
    for a, b in zip(folders(tmp_path / "parts")[2:], folders(tmp_path / "whole")[:2], strict=True):
        assert a.name == b.name and a.name.startswith("off-") and read_metrics(a) == read_metrics(b)


@pytest.mark.slow
def test_long_range_arena_is_judged_by_accuracy(tmp_path, call):
    sizes = ("--n_head=1 --block_size=60 --max_length=60 --n_train=40 --n_val=8 --n_test=16 "
             "--max_iters=2 --eval_interval=2").split()
    code, out, err = call(compare, "train_lra.py", "listops", *SMALL, *sizes, *VARY, "--seeds=2",
                          f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}")
    assert code == 0, err
    result = json.loads((tmp_path / "out/compare.json").read_text())
    assert result["metric"] == "val_accuracy" and "test accuracy" in out
    tests = [json.loads((f / "test.json").read_text())["test_accuracy"]
             for f in folders(tmp_path / "out")]
    means = [statistics.fmean(tests[:2]), statistics.fmean(tests[2:])]
    assert [arm["test_accuracy"] for arm in result["arms"].values()] == means


@pytest.mark.slow
def test_the_report_says_what_the_runs_recorded(study):
    (code, out, _), result = study("--vary", "precond_power=0,1", "--seeds=4")
    assert code == 0 and result["metric"] == "val_loss"
    off, on = result["arms"].values()
    assert off["final"] == pytest.approx([2.01, 2.02, 2.03, 2.04])
    assert off["mean"] == pytest.approx(2.025)
    assert on["differences"] == [b - a for a, b in zip(off["final"], on["final"])]
    assert on["wins"] == 4
    expected = stats.paired(on["differences"])
    assert (on["paired"]["p"], on["paired"]["low"]) == (expected.p, expected.low)
    assert on["paired"]["p_holm"] == expected.p
    assert "precond_power=1 is better than precond_power=0" in out and "4/4" in out
    # off reaches its own result at the last evaluation, after 3 s; kappa is 10 + seed and infinite
    assert (off["steps_to_target"], off["seconds_to_target"], off["tokens_per_s"],
            off["peak_memory_mb"]) == (6, 3, 20, 7)
    assert off["kappa_before"] == [12.5, None] and off["kappa_after"] == [7.5, 2] and "inf" in out


@pytest.mark.slow
def test_a_grid_is_also_compared_within_the_first_option(study):
    """The rate adds 1 to all losses where it is 1.001, which differences within it do not see."""
    (code, out, _), result = study("--vary", "learning_rate=1e-3,1.001", "--vary",
                                   "precond_power=0,1,8", "--seeds=3")
    arms, within = result["arms"], result["within"]
    slow, fast = "learning_rate=1e-3 precond_power=", "learning_rate=1.001 precond_power="
    told = out.partition("Within the grid, the last --vary alone")[2]
    assert code == 0 and f"{fast}1 is better than {fast}0: val_loss differs by" in told
    assert f"{fast}8 diverged on 1 of 3 seeds" in told
    assert {name: arm["to"] for name, arm in within.items()} == {
        name + p: name + "0" for name in (slow, fast) for p in "18"}
    assert within[slow + "1"]["differences"] == arms[slow + "1"]["differences"]
    expected = [b - a for a, b in zip(arms[fast + "0"]["final"], arms[fast + "1"]["final"])]
    assert within[fast + "1"]["differences"] == expected and within[fast + "1"]["wins"] == 3
    assert within[fast + "1"]["paired"]["p"] == stats.paired(expected).p
    holm = stats.holm([within[name + "1"]["paired"]["p"] for name in (slow, fast)])
    assert within[fast + "1"]["paired"]["p_holm"] == holm[1]
    assert within[fast + "8"].keys() == {"to"}  # seed 2 diverged
    assert study("--vary", "precond_power=0,1", "--seeds=2")[1]["within"] == {}


@pytest.mark.slow
def test_advice_repeats_the_options(study, tmp_path):
    (code, out, _), _ = study("--vary", "precond_power=0,1", "--arm", "half: precond_power=0.5",
                              "--jobs=2", "--seeds=2")
    typed = (f"python compare.py train.py --max_iters=6 --out_dir={tmp_path / 'out'} "
             "--vary precond_power=0,1 --arm 'half: precond_power=0.5' --jobs=2 --seeds=2")
    assert code == 0 and f"`{typed} --jobs=1 --out_dir={tmp_path / 'out'}-alone`" in out
    twice = compare.read(["train.py", *VARY, "--jobs=2", "--jobs=1", "--out_dir=a", "--out_dir=b"])
    assert (twice.config.jobs, twice.config.out_dir) == (1, "b")  # the last one counts


@pytest.mark.slow
def test_words_can_be_tuned(study):
    (code, out, _), _ = study("--vary", "precond_power=0,1", "--seeds=2", "--tune",
                              "lr_schedule=cosine,linear")
    assert code == 0 and "Mean val_loss by lr_schedule" in out
    assert "at the end of the values tried" not in out


@pytest.mark.slow
def test_higher_accuracy_is_better(study, fake):
    fake("val_accuracy")
    (_, out, _), result = study("--vary", "precond_power=0,1", "--seeds=3", "--tune",
                                "learning_rate=1e-3,1e-2", script="train_lra.py")
    assert result["metric"] == "val_accuracy" and result["arms"]["precond_power=1"]["wins"] == 0
    assert "precond_power=1 is worse than precond_power=0" in out
    # The higher mean is chosen: the rate that is wrong by more, and one beyond it, three times.
    chosen = {name: max(means, key=means.get) for name, means in rates(result).items()}
    assert chosen == {"precond_power=0": "10", "precond_power=1": "1e-06"}


@pytest.mark.slow
def test_differences_without_a_spread_are_not_tested(study):
    """The rate adds 1 to all losses where it is 1.001."""
    vary = ["--vary", "learning_rate=1e-3,1.001", "--seeds=2"]
    (code, out, _), result = study(*vary)
    arm = result["arms"]["learning_rate=1.001"]
    assert code == 0 and arm["paired"]["p"] is None and arm["wins"] == 0
    assert "p_holm" not in arm["paired"] and arm["paired"]["mean"] == pytest.approx(1)
    assert "differs from learning_rate=1e-3 by +1.0000 on each of 2 seeds: without a spread" in out
    assert "worse" not in out and "| no spread" in out
    # It takes no part in the correction of the others.
    (_, out, _), result = study(*vary, "--arm", "half: precond_power=0.5")
    half = result["arms"]["half"]["paired"]
    assert half["p_holm"] == half["p"] and "without a spread" in out


def test_arms_that_cannot_be_told_apart(tmp_path):
    arm = {"diverged": {}, "seeds": [1, 2, 3],
           "paired": {"n": 3, "mean": 0.01, "sd": 0.02, "low": -0.04, "high": 0.06, "p": 0.4,
                      "p_holm": 0.4,
                                                         "seeds_needed": 34}}
    said = report.conclusion("on", arm, "off", "val_loss")
    assert "cannot be told apart with 3 seeds" in said and "about 34 seeds" in said


def test_reaching_the_target_on_few_seeds_is_not_reaching_it():
    records = [{"step": step, "elapsed_s": seconds, "val_loss": loss}
               for step, seconds, loss in ((0, 0.0, 3.0), (5, 1.0, 2.0), (9, 2.0, 1.0))]
    run = runs.Run(None, {"seed": 1}, records)
    assert report.reached(run, 2.0) == (5, 1.0) and report.reached(run, 0.5) is None


def rates(result):
    """Arm -> the mean of each learning rate tried."""
    return {name: tuned["learning_rate"] for name, tuned in result["tuned"].items()}


@pytest.mark.slow
def test_each_arm_gets_its_own_rate_from_other_seeds(study, tmp_path):
    """The best rates of the fake runs are 1e-3 and 1e-2."""
    (code, out, _), result = study("--vary", "precond_power=0,1", "--tune",
                                   "learning_rate=1e-3,3e-3,1e-2", "--seeds=2", "--tune_seeds=1")
    assert code == 0
    best = {name: min(means, key=means.get) for name, means in rates(result).items()}
    assert best == {"precond_power=0": "1e-3", "precond_power=1": "1e-2"}
    # Both are at an end: one value beyond shows that they are the best.
    assert list(rates(result)["precond_power=0"])[3:] == ["0.0003333333333"]
    assert list(rates(result)["precond_power=1"])[3:] == ["0.03333333333"]
    assert "at the end of the values tried: a wider" not in out
    words = [(f / "started.txt").read_text() for f in folders(tmp_path / "out")]
    tuning = [w for w in words if "--seed=100001" in w]
    reported = [w for w in words if "--seed=1 " in w or "--seed=2 " in w]
    assert len(tuning) == 8 and len(reported) == 4 and len(words) == 12
    assert all(("learning_rate=1e-3" in w) == ("precond_power=0" in w) for w in reported)
    assert result["arms"]["precond_power=0"]["final"] == pytest.approx([2.01, 2.02])


@pytest.mark.slow
def test_tuning_goes_three_values_beyond_and_then_says_so(study, tmp_path):
    (code, out, _), result = study("--vary", "precond_power=0,1", "--tune",
                                   "learning_rate=1e-5,2e-5", "--seeds=2", "--tune_seeds=1")
    assert code == 0 and "a wider range may change the result" in out
    beyond = ["1e-5", "2e-5", "4e-05", "8e-05", "0.00016"]
    assert all(list(means) == beyond for means in rates(result).values())
    words = [(f / "started.txt").read_text() for f in folders(tmp_path / "out")]
    assert len(words) == 2 * 5 + 2 * 2  # values that were tried once are not trained again
    left = [int(line.split("(")[1].split()[0]) for line in out.splitlines() if " to go, " in line]
    assert min(left) == 1 and left[-3:] == [3, 2, 1]


@pytest.mark.slow
def test_two_options_are_tuned_one_after_the_other(study, tmp_path):
    (code, out, _), result = study("--vary", "precond_power=0,1", "--seeds=2", "--tune_seeds=1",
                                   "--tune", "learning_rate=5e-4,1e-3,2e-3,1e-2,2e-2",
                                   "--tune", "lr_schedule=cosine,constant")
    assert code == 0 and "by learning_rate" in out and "by lr_schedule" in out
    assert list(result["tuned"]["precond_power=1"]) == ["learning_rate", "lr_schedule"]
    words = [(f / "started.txt").read_text() for f in folders(tmp_path / "out")]
    schedule = [w for w in words if "--seed=100001" in w and "lr_schedule" in w]
    assert len(schedule) == 4
    assert all(("learning_rate=1e-2" in w) == ("precond_power=1" in w) for w in schedule)


def test_the_value_beyond_an_end():
    assert beyond(["1e-3", "2e-3", "4e-3"], "2e-3") is None
    assert beyond(["2e-3", "1e-3"], "2e-3") == "0.004"
    assert beyond(["2e-3", "1e-3"], "1e-3") == "0.0005"
    assert beyond(["8", "16"], "16") == "32"
    assert beyond(["0", "0.1"], "0") is None and beyond(["cosine", "linear"], "linear") is None


@pytest.mark.slow
def test_finished_runs_are_kept_and_others_never_mixed(study, tmp_path, monkeypatch):
    arguments = ["--vary", "precond_power=0,1", "--seeds=2", "--dataset",
                 str(tmp_path / "text.txt")]
    (tmp_path / "text.txt").write_text("a text")
    start, started = launch.Comparison.start, []

    def counting(self, job):
        started.append(job.folder.name)
        start(self, job)
    monkeypatch.setattr(launch.Comparison, "start", counting)
    first = study(*arguments)[1]
    assert len(started) == 4
    assert study(*arguments)[1] == first and len(started) == 4
    study(*arguments, "--seeds=3", "--jobs=2", "--device=cpu", "--tensorboard")
    assert len(started) == 6  # the third seed of each arm: the others are the same runs
    study(*arguments, "--learning_rate=2e-3")
    study(*arguments, "--threads=2")
    monkeypatch.setattr(launch.torch, "__version__", "0")
    study(*arguments)
    monkeypatch.setattr(launch, "code_hash", lambda script: "another code")
    study(*arguments)
    (tmp_path / "text.txt").write_text("another text")
    fingerprint.content.cache_clear()
    study(*arguments)
    assert len(started) == len(set(started)) == 6 + 5 * 4


def test_the_code_that_a_run_imports(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/__init__.py").touch()
    sources = {"script.py": '"""Doc."""\nimport os, near\nfrom data import far\n',
               "near.py": "x = 1\n",
               "data/far.py": "def f():\n    import last\n", "last.py": "y = 1\n",
               "unused.py": "z = 1\n"}
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    before = fingerprint.code_hash(tmp_path / "script.py")
    (tmp_path / "unused.py").write_text("z = 2\n")
    (tmp_path / "near.py").write_text('"""New documentation."""\nx = 1  # a comment\n')
    assert fingerprint.code_hash(tmp_path / "script.py") == before
    for name in ("near.py", "data/far.py", "last.py", "script.py"):
        (tmp_path / name).write_text(sources[name] + "new = 1\n")
        assert fingerprint.code_hash(tmp_path / "script.py") != before
        before = fingerprint.code_hash(tmp_path / "script.py")


def test_code_that_changes_meanwhile_stops_the_comparison(study, monkeypatch):
    hashes = iter(["one", "one", "one", "two"])
    monkeypatch.setattr(launch, "code_hash", lambda script: next(hashes))
    assert "was changed meanwhile" in error(study("--vary", "precond_power=0,1", "--seeds=2")[0])


@pytest.mark.slow
def test_a_diverged_arm_is_reported(study):
    # what a run is recognised by
    assert "is not finite" in trainer.Trainer.diverged(SimpleNamespace(evaluated=-1), 3)
    (code, out, _), result = study("--vary", "precond_power=0,8,1", "--seeds=3")
    hot = result["arms"]["precond_power=8"]
    assert code == 0
    said = "train.py: error: the loss is not finite at step 3. Lower --learning_rate"
    assert hot["diverged"] == {"2": said}
    assert hot["final"][1] is None and "paired" not in hot
    assert "precond_power=8 diverged on 1 of 3 seeds (2)" in out
    pair = result["arms"]["precond_power=1"]["paired"]
    assert pair["p_holm"] == pair["p"]
    (code, out, _), _ = study("--vary", "precond_power=8,1", "--seeds=3")
    assert "The baseline precond_power=8 diverged" in out and "cannot be compared" in out


@pytest.mark.slow
def test_a_failed_run_stops_everything(study, tmp_path):
    said = error(study("--vary", "precond_power=0,7", "--seeds=2")[0])
    assert said.endswith("ended with exit code 1: no space left") and "precond_power=7-1" in said
    assert len(folders(tmp_path / "out")) == 2 and not (tmp_path / "out/compare.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_runs_save(number, code, study, tmp_path, monkeypatch):
    sleep, begun = launch.time.sleep, []

    def interrupt(seconds):
        if not begun and any((f / "metrics.jsonl").exists() for f in folders(tmp_path / "out")
                             if "=9" in f.name):
            begun.append(os.kill(os.getpid(), number))
        sleep(seconds)
    monkeypatch.setattr(launch.time, "sleep", interrupt)
    result = study("--vary", "precond_power=0,9", "--seeds=2")[0]
    assert result[0] == code and signal.getsignal(number) != launch.Comparison.stop
    assert sum((f / "record.json").exists() for f in folders(tmp_path / "out")) == 1
    assert (folders(tmp_path / "out")[-1] / "saved").exists()
    (code, out, _), _ = study("--vary", "precond_power=0,9", "--seeds=2")
    assert code == 0
    assert "--init_from=auto" in (folders(tmp_path / "out")[2] / "started.txt").read_text()


@pytest.mark.slow
def test_a_full_disk(study, tmp_path, monkeypatch):
    write_text = Path.write_text

    def full(self, *arguments, **options):
        if self.name in names:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(self, *arguments, **options)
    monkeypatch.setattr(Path, "write_text", full)
    for names in ["record.tmp"], ["compare.md"]:  # noqa: B007  (`full` reads it)
        said = error(study("--vary", "precond_power=0,1", "--seeds=2")[0])
        assert f"cannot write to {tmp_path / 'out'}: No space left on device. Type the same" in said
    names = []
    assert study("--vary", "precond_power=0,1", "--seeds=2")[0][0] == 0


def test_a_reader_that_leaves_is_no_full_disk(monkeypatch):
    def broken(self):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr(compare.Comparison, "execute", broken)
    monkeypatch.setattr(compare.sys, "argv", ["compare.py", "train.py", "--vary",
                                              "precond=False,True", "--seeds=2"])
    with pytest.raises(BrokenPipeError):  # which options.run knows
        compare.main()


@pytest.mark.slow
@pytest.mark.parametrize("name, content, said", [
    ("metrics.jsonl", None, "holds no finished run"),
    ("metrics.jsonl", "", "is no evaluation of this version"),
    ("metrics.jsonl", '{"step": 6, "elapsed_s": 3, "val_loss": 2}\n',
     "is no evaluation of this version"),
    ("metrics.jsonl", '{"step": 6, "val_loss": 2}\n', "line 1 is damaged or of another version"),
    ("record.json", "[]", "holds no finished run"),
    ("record.json", "{}", "holds no finished run"),
    ("test.json", "{}", "holds no finished run")])
def test_files_of_a_finished_run_that_are_gone_or_others(name, content, said, study, tmp_path):
    study("--vary", "precond_power=0,1", "--seeds=2")
    path = folders(tmp_path / "out")[0] / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    said = said.replace("holds", f"{path.parent} holds")
    assert said in error(study("--vary", "precond_power=0,1", "--seeds=2")[0])


def test_one_comparison_at_a_time_in_a_folder(study, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by" in error(study("--vary", "precond=False,True")[0])


@pytest.mark.slow
def test_two_spellings_of_one_value_are_one_run(study, tmp_path):
    (code, _, _), result = study("--vary", "precond_power=0,1", "--seeds=2", "--tune",
                                 "learning_rate=1e-3,0.001", "--jobs=4")
    assert code == 0 and len(folders(tmp_path / "out")) == 2 * 2 + 2 * 2
    assert all(len(set(means.values())) == 1 for means in rates(result).values())


def test_a_folder_that_cannot_be_written(call, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert "cannot write to" in error(call(compare, "train.py", "--vary", "precond=False,True",
                                           f"--out_dir={tmp_path / 'out'}"))


def test_a_run_left_behind_keeps_its_folder(fake, tmp_path, monkeypatch):
    comparison = compare.read(["train.py", "--vary", "precond_power=9,0", "--seeds=2",
                               f"--out_dir={tmp_path / 'out'}"])
    run = comparison.job(comparison.arms[0], 1, {})
    comparison.folder.mkdir()
    with open(comparison.folder / "lock", "w") as comparison.lock:
        fcntl.flock(comparison.lock, fcntl.LOCK_EX)
        comparison.start(run)
    # what started the run is gone, the run is not
    with open(comparison.folder / "lock", "w") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        run.process.kill()
        run.process.wait()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_pretrained_weights_are_read_once(tmp_path):
    starts = [compare.read(["train.py", "--vary", "precond=False,True", f"--init_from={name}",
                            f"--out_dir={tmp_path}"])
              for name in ("gpt2", "scratch", "auto")]
    gpt2, scratch, auto = [comparison.job(comparison.arms[0], 1, {}) for comparison in starts]
    assert scratch.folder == auto.folder != gpt2.folder
    assert starts[0].command(gpt2)[-1] == "--init_from=gpt2"
    assert starts[1].command(scratch)[-1] == "--init_from=auto"
    gpt2.folder.mkdir(parents=True)
    (gpt2.folder / "ckpt.pt").touch()
    assert starts[0].command(gpt2)[-1] == "--init_from=auto"


def test_grids_and_named_arms():
    arms = make_arms(["a=1,2", "b=x,y"], ["both: c=3 --d='4 5'", "none:"])
    assert [(arm.name, arm.words) for arm in arms] == [
        ("a=1 b=x", ["--a=1", "--b=x"]), ("a=1 b=y", ["--a=1", "--b=y"]),
        ("a=2 b=x", ["--a=2", "--b=x"]), ("a=2 b=y", ["--a=2", "--b=y"]),
        ("both", ["--c=3", "--d=4 5"]), ("none", [])]


@pytest.mark.parametrize("arguments, said", [
    (["--seeds=1", *VARY], "at least 2"),
    (["--seeds=two", *VARY], "is not of type int"),
    (["--jobs=0", *VARY], "must be at least 1"),
    (["--sedes=3", *VARY], "did you mean --seeds"),
    (["--learning_rat=1e-3", *VARY], "did you mean --learning_rate"),
    (["--vary", "precon=False,True"], "did you mean --precond"),
    (["--vary", "precond=False,maybe"], "is not of type bool"),
    (["--vary", "precond"], "write --vary KEY=VALUE,VALUE"),
    (["--vary"], "needs a value"),
    (["--vary", "=1,2"], "write --vary KEY=VALUE,VALUE"),
    (["--arm", "on: =1", *VARY], "'=1' is not KEY=VALUE"),
    (["--vary", "n_head=4,3"], "does not divide"),
    (["--arm", "off: precond=False"], "nothing to compare"),
    ([], "nothing to compare"),
    (["--arm", "precond=False", *VARY], 'write --arm "NAME: KEY=VALUE KEY=VALUE"'),
    (["--arm", "on: precond", *VARY], "is not KEY=VALUE"),
    (["--arm", "on: 'precond", *VARY], "No closing quotation"),
    (["--vary", "precond=False,False"], "same name"),
    (["--vary", "seed=1,2"], "--seeds and --first_seed"),
    (["--vary", "dataset=a,b"], "cannot be paired"),
    (["--seed=3", *VARY], "--seeds and --first_seed"),
    (["--eval_only", *VARY], "a comparison trains"),
    (["--max_iters=0", *VARY], "trains nothing"),
    (["--tune", "learning_rate", *VARY], "write --tune"),
    (["--tune", "learning_rte=1,2", *VARY], "did you mean --learning_rate"),
    (["--tune", "precond=False,True", *VARY], "is tuned, and set by the arm"),
    (["--tune", "dataset=a.txt,b.txt", *VARY],
     "--tune sets dataset: arms on different data cannot be paired"),
    (["--tune", "seed=1,2", *VARY], "--tune sets seed: --seeds and --first_seed choose the seeds"),
    (["--vary", "batch_size=4,12"], "batch_size x eval_iters would be 400 or 1200"),
    (["--tune", "learning_rate=1,2", "--first_seed=100000", *VARY],
     "must not reach those of --tune"),
    (["--device=cuda:77", *VARY], "asked for, but"),
    (["--out_dir=", *VARY], "--out_dir= is empty"),
    (["--first_seed=-1", *VARY], "first_seed=-1 must be in [0, 4294967296)"),
    (["--first_seed=4294967295", *VARY], "the last seed=4294967299 must be in"),
    (["--first_seed=99999999999999999999999", *VARY], "must be in"),
])
def test_mistakes_end_in_one_line(arguments, said, call, tmp_path):
    assert said in error(call(compare, "train.py", f"--out_dir={tmp_path / 'out'}", *arguments))
    assert not (tmp_path / "out").exists()


def test_mistakes_of_scripts_and_tasks(call):
    assert "name the script to compare first: train.py" in error(call(compare, "sample.py", *VARY))
    assert "name the script" in error(call(compare, *VARY))
    assert "did you mean listops" in error(call(compare, "train_lra.py", "listop", *VARY))


@pytest.mark.slow
def test_every_rate_diverges(study):
    said = error(study("--vary", "precond_power=0,8", "--tune", "learning_rate=1,2",
                       "--tune_seeds=1", "--seeds=2")[0])
    assert "every value of --tune learning_rate=1,2 diverged for the arm precond_power=8" in said


def test_without_scipy(call, tmp_path, monkeypatch):
    """Said before anything is trained."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    said = error(call(compare, "train.py", *VARY, f"--out_dir={tmp_path / 'out'}"))
    assert "need scipy: pip install -r requirements-extra.txt" in said
    assert not (tmp_path / "out").exists()


def test_help(call):
    code, out, _ = call(compare, "--help")
    assert code == 0 and "--arm" in out and "--tune_seeds=2" in out


@pytest.mark.slow
def test_figures_are_drawn_or_said_to_be_missing(study, tmp_path, monkeypatch):
    drawn = []

    def draw(groups, out):
        drawn.append((groups, out))
        return [out / "validation.png", out / "validation.svg"]
    monkeypatch.setattr(figures, "draw", draw)
    (_, out, _), _ = study("--vary", "precond_power=0,8", "--seeds=2")
    (groups, where), = drawn
    assert where == tmp_path / "out" and [len(g) for g in groups.values()] == [2, 1]
    assert "validation.png" in out
    assert f"To draw them anew: python plot.py {where}" in out and groups == runs.compared(where)
    assert [path.parent for path in groups["precond_power=8"]] == [where / "runs"]

    def missing(groups, out):
        raise compare.UserError("figures need matplotlib: pip install -r requirements-extra.txt")
    monkeypatch.setattr(figures, "draw", missing)
    (_, out, _), _ = study("--vary", "precond_power=0,8", "--seeds=2")
    assert "no figures: figures need matplotlib" in out
