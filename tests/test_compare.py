"""compare.py and report.py: arms, identity of runs, resuming, divergence, what the report says."""
import json
import math

import pytest

import compare
import report
from config import UserError
from conftest import SMALL, error

RUN = ["train.py", *SMALL, "--max_iters=4", "--eval_interval=2", "--log_interval=1", "--seeds=2"]


@pytest.fixture
def words(corpus, tmp_path):
    return [*RUN, *corpus, f"--out_dir={tmp_path / 'cmp'}"]


def test_arms():
    grid = compare.make_arms([("vary", "precond=False,True"), ("vary", "n_layer=1,2")])
    assert [arm.words for arm in grid] == [["--precond=False", "--n_layer=1"], ["--precond=False", "--n_layer=2"],
                                           ["--precond=True", "--n_layer=1"], ["--precond=True", "--n_layer=2"]]
    named = compare.make_arms([("arm", "off: precond=False"), ("arm", "half: precond=True precond_power=0.5")])
    assert [(arm.name, arm.words) for arm in named] == [("off", ["--precond=False"]), ("half", ["--precond=True", "--precond_power=0.5"])]


@pytest.mark.parametrize("arguments, message", [
    (["--vary", "precond=False,True", "--seeds=1"], "seeds=1: a comparison needs at least two"),
    (["--vary", "precnd=False,True"], "did you mean --precond?"),
    (["--vary", "precond=False,perhaps"], "is not of type bool"),
    (["--vary", "precond=True,on"], "are the same configuration"),
    (["--vary", "precond"], "write --vary KEY=VALUE,VALUE"),
    (["--arm", "off precond=False"], 'write --arm "NAME: KEY=VALUE'),
    (["--arm", "off: precond=False"], "nothing to compare"),
    (["--vary", "precond=False,True", "--seed=3"], "--seed is set by the comparison itself"),
    (["--vary", "precond=False,True", "--tune=learning_rate"], "write --tune KEY=VALUE,VALUE"),
])
def test_mistakes(arguments, message, words, call):
    assert message in error(call(compare, *words, *arguments))


def test_unknown_script(call):
    assert "name the script to compare first" in error(call(compare, "trian.py", "--vary", "precond=False,True"))


def test_same_command_keeps_runs_and_an_a_a_comparison_is_exactly_zero(words, tmp_path, call, monkeypatch):
    command = [*words, "--vary", "wandb_project=a,b", "--vary", "tensorboard=False"]
    assert "are the same configuration" in error(call(compare, *command))  # neither can change a result
    command = [*words, "--vary", "log_interval=1,2"]
    code, out, _ = call(compare, *command)
    assert code == 0 and "log_interval=2 equals log_interval=1 exactly on all 2 seeds." in out
    first = json.loads((tmp_path / "cmp/compare.json").read_text())
    assert first["arms"]["log_interval=2"]["differences"] == [0.0, 0.0]
    assert (tmp_path / "cmp/compare.md").read_text() in out + "\n"
    with monkeypatch.context() as patch:  # nothing is trained again
        patch.setattr(compare.Comparison, "start", lambda *_: pytest.fail("a finished run was started again"))
        assert call(compare, *command)[0] == 0
    assert call(compare, *[w.replace("/cmp", "/again") for w in command])[0] == 0
    again = json.loads((tmp_path / "again/compare.json").read_text())
    assert [arm["final"] for arm in again["arms"].values()] == [arm["final"] for arm in first["arms"].values()]


def test_another_configuration_thread_count_or_code_is_another_run(words, monkeypatch):
    arguments = [*words, "--vary", "precond=False,True"]

    def folder(extra=(), **attributes):
        comparison = compare.Comparison([*arguments, *extra])
        vars(comparison).update(attributes)
        return comparison.run_of(comparison.arms[0], 1).folder
    folders = [folder(), folder(["--dropout=0.1"]), folder(["--threads=2"]), folder(code="other")]
    assert len(set(folders)) == 4 and folder(["--tensorboard"]) == folder() == folder(["--jobs=2"])


def test_code_hash_covers_what_a_script_imports(monkeypatch, tmp_path):
    for name, text in (("a.py", "from data import b"), ("c.py", "x = 1"), ("other.py", "x = 1")):
        (tmp_path / name).write_text(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/b.py").write_text("def f():\n    import c")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    before = compare.code_hash("a.py")
    (tmp_path / "other.py").write_text("x = 2")
    assert compare.code_hash("a.py") == before
    (tmp_path / "c.py").write_text("x = 2")
    assert compare.code_hash("a.py") != before


def test_stopped_comparison_goes_on(words, tmp_path, call, monkeypatch):
    command = [*words, "--vary", "precond=False,True"]
    finish, finished = compare.Comparison.finish, []

    def stop_after_one(self, run):
        finish(self, run)
        finished.append(run)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(compare.Comparison, "finish", stop_after_one)
        code, _, err = call(compare, *command)
    assert code == 130 and "Type the same command again to go on" in err
    assert len(list((tmp_path / "cmp").glob("runs/*/record.json"))) == 1
    assert call(compare, *command)[0] == 0
    assert len(list((tmp_path / "cmp").glob("runs/*/record.json"))) == 4


def fake_run(folder, seed, values, diverged=None, metric="val_loss"):
    """A finished run with evaluations `values` at steps 0, 10, ..."""
    folder.mkdir(parents=True)
    lines = [{"step": 10 * i, metric: value, "elapsed_s": float(i), "tokens": 100 * i, "peak_memory_mb": 50.0,
              "kappa_before": [2.0, None], "kappa_after": [1.0, 3.0]} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "record.json").write_text(json.dumps({"seed": seed, "diverged": diverged, "serial": True}))
    return folder


def test_report(tmp_path):
    a = [fake_run(tmp_path / f"a{i}", i, [4.0, 3.0, 2.0 + i / 10]) for i in range(3)]
    b = [fake_run(tmp_path / f"b{i}", i, [4.0, 2.0, 1.5 + i / 10 + 0.01 * i]) for i in range(3)]
    c = [fake_run(tmp_path / f"c{i}", i, [4.0, 3.0, 2.1 + i / 10], "step 7" if i == 1 else None) for i in range(3)]
    summary = report.summarise({"a": a, "b": b, "c": c})["arms"]
    assert summary["a"]["mean"] == pytest.approx(2.1) and summary["a"]["sd"] == pytest.approx(0.1)
    assert summary["b"]["differences"] == pytest.approx([-0.5, -0.49, -0.48]) and summary["b"]["wins"] == 3
    assert summary["b"]["steps_to_target"] == 10 and summary["b"]["seconds_to_target"] == 1.0 and summary["b"]["reached_target"] == "3/3"
    assert summary["a"]["tokens_per_s"] == 100 and summary["a"]["kappa_before"] == [2.0, math.inf]
    assert summary["c"]["diverged"] == {1: "step 7"} and summary["c"]["differences"] == pytest.approx([0.1, 0.1])
    assert summary["c"]["reached_target"] == "0/2" and "steps_to_target" not in summary["c"]
    text = report.write(tmp_path, {"a": a, "b": b, "c": c}, "command", "", {})
    assert "b is better than a: val_loss lower by 0.4900" in text and "c diverged on seed 1; on the others, c is worse than a" in text
    assert "| a   | A   | 2       | inf     |" in text
    json.loads((tmp_path / "compare.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_report_of_accuracy_and_of_no_difference(tmp_path):
    a = [fake_run(tmp_path / f"a{i}", i, [0.1, 0.5 + 0.1 * i], metric="val_accuracy") for i in range(3)]
    b = [fake_run(tmp_path / f"b{i}", i, [0.1, v], metric="val_accuracy") for i, v in enumerate((0.52, 0.59, 0.71))]
    arm = report.summarise({"a": a, "b": b})["arms"]["b"]
    assert arm["wins"] == 2
    said = report.conclusion("b", arm, "a", "val_accuracy")
    assert said.startswith("b and a cannot be told apart with 3 seeds") and f"about {arm['paired']['seeds_needed']} seeds" in said


def test_a_diverged_run_is_recorded_and_another_failure_stops(words, tmp_path, call):
    code, out, _ = call(compare, *words, "--vary", "learning_rate=1e-3,1e38", "--grad_clip=0", "--warmup_iters=0")
    assert code == 0 and "learning_rate=1e38 diverged on seeds 1, 2" in out
    with pytest.raises(UserError, match="exit code"):
        comparison = compare.Comparison([*words, "--vary", "precond=False,True"])
        run = comparison.run_of(comparison.arms[0], 1)
        comparison.theirs.append("--dataset=nothere.txt")
        comparison.train([run], compare.tqdm(disable=True))
