"""compare.py: its report says what the runs recorded, and mistakes end in one line."""
import json
import statistics
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("scipy", reason="pip install -r requirements-extra.txt")

import compare
from conftest import SMALL, error
from engine import trainer
from fake_runs import folders
from study import comparisons, figures, report, runs, stats
from study.arms import make_arms

VARY = ["--vary", "precond=False,True"]


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
    typed = ("python compare.py train.py --max_iters=6 --precond=True "
             f"--out_dir={tmp_path / 'out'} --vary precond_power=0,1 "
             "--arm 'half: precond_power=0.5' --jobs=2 --seeds=2")
    assert code == 0 and f"`{typed} --jobs=1 --out_dir={tmp_path / 'out'}-alone`" in out
    twice = compare.read(["train.py", *VARY, "--jobs=2", "--jobs=1", "--out_dir=a", "--out_dir=b"])
    assert (twice.config.jobs, twice.config.out_dir) == (1, "b")  # the last one counts


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


@pytest.mark.slow
def test_one_seed_gives_a_report_that_claims_nothing(study, tmp_path):
    (code, out, err), result = study("--vary", "precond_power=0,1", "--seeds=1")
    off, on = result["arms"].values()
    assert code == 0, err
    assert off["sd"] is None and on["wins"] == 1 and "at the last step, 1 seed;" in out
    mean = on["final"][0] - off["final"][0]
    expected = dict(n=1, mean=mean, sd=None, low=None, high=None, p=None)
    assert on["paired"] == expected
    assert f"differs from precond_power=0 by {mean:+.4f} on one seed, which says nothing" in out
    assert "| one seed" in out and "better than" not in out and "told apart" not in out
    # A forest has its point, without an interval.
    drawn = comparisons.forest({"a": comparisons.read_comparison(tmp_path / "out/compare.json")})
    assert [t.get_text() for t in drawn.axes[0].get_yticklabels()] == ["precond_power=1 (1 seed)"]


def test_a_bar_in_a_name_is_no_edge_of_a_table():
    *lines, _ = report.table(["arm", "mean"], [["a|b", "1"]])
    assert lines == ["| arm  | mean |", "| ---- | ---- |", r"| a\|b | 1    |"]


def test_arms_that_cannot_be_told_apart(tmp_path):
    arm = {"diverged": {}, "seeds": [1, 2, 3],
           "paired": {"n": 3, "mean": 0.01, "sd": 0.02, "low": -0.04, "high": 0.06, "p": 0.4,
                      "p_holm": 0.4,
                                                         "seeds_needed": 34}}
    said = report.conclusion("on", arm, "off", "val_loss")
    assert "cannot be told apart with 3 seeds" in said and "about 34 seeds" in said


def made_up(losses, tests=None) -> list[runs.Run]:
    """A run for each list of losses after 0, 5 and 9 steps, which took a second each."""
    made = []
    for seed, along in enumerate(losses, 1):
        records = [{"step": step, "elapsed_s": float(step), "val_loss": loss, "tokens": step,
                    "peak_memory_mb": 7, "kappa_before": [1.0], "kappa_after": [1.0]}
                   for step, loss in zip((0, 5, 9), along)]
        made.append(runs.Run(None, {"seed": seed, "precond": False}, records, {"serial": True},
                             tests and tests[seed - 1]))
    return made


def test_reaching_the_target_on_few_seeds_is_not_reaching_it():
    target = made_up([(3, 2.5, 2.0)] * 3)
    soon, never = (3, 2.0, 1.5), (3, 2.5, 2.2)
    few = report.describe(made_up([soon, never, never]), target)
    assert few["reached_target"] == "1/3" and "steps_to_target" not in few
    most = report.describe(made_up([soon, never, (3, 2.5, 1.9)]), target)
    assert most["reached_target"] == "2/3"
    assert (most["steps_to_target"], most["seconds_to_target"]) == (9, 9.0)  # of 5, 9, never


def test_differences_of_test_accuracies_have_the_sign_of_the_others():
    found = report.pairing(made_up([(3, 2, 1.5), (3, 2, 1.4)], [0.6, 0.7]),
                           made_up([(3, 2, 1.0), (3, 2, 1.0)], [0.5, 0.5]))
    assert found["differences"] == pytest.approx([0.5, 0.4]) and found["wins"] == 0
    assert found["test_paired"]["mean"] == pytest.approx(0.15)


def test_among_more_comparisons_a_difference_needs_more_seeds():
    first, second = ({"paired": {"mean": 0.01, "sd": 0.02, "p": p}} for p in (0.03, 0.4))
    report.correct([first, second])
    needed = stats.seeds_needed(0.01, 0.02, alpha=0.05 / 2)
    assert first["paired"]["seeds_needed"] == needed > stats.seeds_needed(0.01, 0.02)
    assert (first["paired"]["p_holm"], second["paired"]["p_holm"]) == (0.06, 0.4)


@pytest.mark.slow
def test_a_diverged_arm_is_reported(study):
    # what a run is recognised by
    assert "is not finite" in trainer.Trainer.diverged(SimpleNamespace(kept=-1), 3)
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


def test_grids_and_named_arms():
    arms = make_arms(["a=1,2", "b=x,y"], ["both: c=3 --d='4 5'", "none:"])
    assert [(arm.name, arm.words) for arm in arms] == [
        ("a=1 b=x", ["--a=1", "--b=x"]), ("a=1 b=y", ["--a=1", "--b=y"]),
        ("a=2 b=x", ["--a=2", "--b=x"]), ("a=2 b=y", ["--a=2", "--b=y"]),
        ("both", ["--c=3", "--d=4 5"]), ("none", [])]


@pytest.mark.parametrize("arguments, said", [
    (["--seeds=0", *VARY], "must be at least 1"),
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
    (["--arm", "a\nb: precond=True", *VARY], "write --arm"),
    (["--vary", "precond=False,False"], "same name"),
    (["--arm", "a: precond=False", *VARY], "the arms 'precond=False' and 'a' are the same"),
    (["--vary", "seed=1,2"], "--seeds and --first_seed"),
    (["--vary", "dataset=a,b"], "cannot be paired"),
    (["--vary", "precond_power=1,0.5"],
     "the arm 'precond_power=1' sets precond_power, which changes nothing without --precond=True"),
    (["--seed=3", *VARY], "--seeds and --first_seed"),
    (["--eval_only", *VARY], "a comparison trains"),
    (["--max_iters=0", *VARY], "trains nothing"),
    (["--tune", "learning_rate", *VARY], "write --tune"),
    (["--tune", "learning_rte=1,2", *VARY], "did you mean --learning_rate"),
    (["--tune", "precond=False,True", *VARY], "is tuned, and set by the arm"),
    (["--tune", "dataset=a.txt,b.txt", *VARY],
     "--tune sets dataset: arms on different data cannot be paired"),
    (["--tune", "seed=1,2", *VARY], "--tune sets seed: --seeds and --first_seed choose the seeds"),
    (["--arm", "a: n_layer=1 n_layer=2", *VARY], "the arm 'a' sets one option twice"),
    (["--vary", "n_layer=1,2", "--vary", "n_layer=3,4"], "'n_layer=1 n_layer=3' sets one option"),
    (["--vary", "block_size=16,32"], "block_size would be 16 or 32: arms that are evaluated on"),
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
