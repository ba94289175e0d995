"""compare.py --tune: each arm gets its own values, from seeds that are not reported."""
import pytest

pytest.importorskip("scipy", reason="pip install -r requirements-extra.txt")

from conftest import error
from fake_runs import folders
from study.arms import beyond


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
    assert "precond_power=0, learning_rate=3e-3, seed 100001: " in out
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


@pytest.mark.slow
def test_values_that_an_arm_cannot_have_are_left_out(study):
    (code, out, _), result = study("--vary", "precond_power=0,1", "--seeds=2", "--tune_seeds=1",
                                   "--tune", "learning_rate=5e-4,1e-3,2e-3,1e-2,2e-2",
                                   "--tune", "min_lr=1e-4,2e-4,5e-3")
    assert code == 0
    assert "precond_power=0: min_lr=5e-3 is left out: min_lr=0.005 is above" in out
    tuned = result["tuned"]
    assert "5e-3" not in tuned["precond_power=0"]["min_lr"]
    assert "5e-3" in tuned["precond_power=1"]["min_lr"]
    assert out.count("(1 to go, ") == 1


@pytest.mark.slow
def test_what_only_the_tuned_values_make_possible_is_taken(study):
    """An arm's min_lr is above the learning rate that the script has by itself."""
    (code, _, err), result = study("--arm", "off: precond_power=0", "--seeds=1", "--tune_seeds=1",
                                   "--arm", "high: min_lr=0.013 precond_power=1",
                                   "--tune", "learning_rate=1.5e-2,3e-2")
    assert code == 0, err
    assert list(rates(result)["high"])[:2] == ["1.5e-2", "3e-2"]


@pytest.mark.slow
def test_an_arm_without_c_has_no_power_to_tune(study):
    (code, out, _), result = study("--arm", "off: precond=False", "--arm", "on:", "--seeds=2",
                                   "--tune_seeds=1", "--tune", "precond_power=0.5,1,2")
    assert code == 0 and list(result["tuned"]) == ["on"]
    assert "off, precond_power" not in out and "Mean val_loss by precond_power" in out
    assert out.count("(1 to go, ") == 1


@pytest.mark.slow
def test_whole_numbers_are_followed_by_whole_numbers(study):
    (_, out, _), result = study("--vary", "precond_power=0,1", "--seeds=1", "--tune_seeds=1",
                                "--tune", "warmup_iters=2,3")
    assert all(list(means)[:2] == ["2", "3"] and all(value.isdigit() for value in means)
               for means in (arm["warmup_iters"] for arm in result["tuned"].values()))
    assert "warmup_iters=2 is the best yet and at the end of the values tried; 1 is next" in out


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
                                "learning_rate=1e-3,1e-2", "--min_lr=0", script="train_lra.py")
    assert result["metric"] == "val_accuracy" and result["arms"]["precond_power=1"]["wins"] == 0
    assert "precond_power=1 is worse than precond_power=0" in out
    # The higher mean is chosen: the rate that is wrong by more, and one beyond it, three times.
    chosen = {name: max(means, key=means.get) for name, means in rates(result).items()}
    assert chosen == {"precond_power=0": "10", "precond_power=1": "1e-06"}


@pytest.mark.slow
def test_two_spellings_of_one_value_are_one_run(study, tmp_path):
    (code, _, _), result = study("--vary", "precond_power=0,1", "--seeds=2", "--tune",
                                 "learning_rate=1e-3,0.001", "--jobs=4")
    assert code == 0 and len(folders(tmp_path / "out")) == 2 * 2 + 2 * 2
    assert all(len(set(means.values())) == 1 for means in rates(result).values())


@pytest.mark.slow
def test_a_rate_that_diverges_on_one_seed_is_out(study):
    (code, out, _), result = study("--vary", "precond_power=0,1", "--seeds=2", "--tune",
                                   "learning_rate=1e-3,1e-2,2e-2,100", "--jobs=4")
    means = rates(result)["precond_power=1"]
    assert code == 0 and means["100"] is None and "| diverged" in out
    # The means over both seeds, 100001 and 100002, as the fake run has them.
    assert means["1e-2"] == pytest.approx(2 + 0.01 * 100001.5 - 0.1 * (1 + 0.1 * 100001.5))
    assert result["arms"]["precond_power=1"]["diverged"] == {}


@pytest.mark.slow
def test_every_rate_diverges(study):
    said = error(study("--vary", "precond_power=0,8", "--tune", "learning_rate=1,2",
                       "--tune_seeds=1", "--seeds=2")[0])
    assert "every value of --tune learning_rate=1,2 diverged for the arm precond_power=8" in said


def test_the_value_beyond_an_end():
    assert beyond(["1e-3", "2e-3", "4e-3"], "2e-3") is None
    assert beyond(["2e-3", "1e-3"], "2e-3") == "0.004"
    assert beyond(["2e-3", "1e-3"], "1e-3") == "0.0005"
    assert beyond(["8", "16"], "16") == "32"
    assert beyond(["0", "0.1"], "0") is None and beyond(["cosine", "linear"], "linear") is None
