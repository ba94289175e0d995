"""stats.py against scipy, and its promises by simulation."""
import numpy as np
import pytest

from study import stats

scipy_stats = pytest.importorskip("scipy.stats", reason="pip install -r requirements-extra.txt")


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_paired_is_scipys(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    ours, theirs = stats.paired((b - a).tolist()), scipy_stats.ttest_rel(b, a)
    interval = theirs.confidence_interval(0.95)
    expected = (theirs.pvalue, interval.low, interval.high)
    assert (ours.p, ours.low, ours.high) == pytest.approx(expected, rel=1e-8)


def test_equal_differences():
    same = stats.paired([0.0, 0.0, 0.0])
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    for differences in [0.5, 0.5], [0.05, 0.8 - 0.75], [1.0, 1.0 + 1e-9]:
        pair = stats.paired(differences)
        assert pair.mean == pytest.approx(differences[0])
        assert pair.p is pair.low is pair.high is None
    assert stats.paired([1e-8, -2e-8]).p < 1  # by themselves they have a spread
    assert stats.paired([1e-8, -2e-8], scale=2.0).p == 1  # but it is rounding, of losses near 2
    assert stats.paired([0.5, 0.5 + 1e-5]).p < 1e-4


@pytest.mark.slow
def test_interval_covers_and_effects_are_found():
    """Differences of mean 0.5 and standard deviation 1.

    The interval holds the mean in 95% of trials. With the seeds that seeds_needed says, zero is
    excluded in 80%.
    """
    rng = np.random.default_rng(0)
    n = stats.seeds_needed(0.5, 1.0)
    assert n == 34  # tables of the paired t test
    trials = [stats.paired(row.tolist()) for row in rng.normal(0.5, 1.0, size=(1000, n))]
    assert np.mean([t.low <= 0.5 <= t.high for t in trials]) == pytest.approx(0.95, abs=0.02)
    assert np.mean([t.p < 0.05 for t in trials]) == pytest.approx(0.80, abs=0.035)
    small = [stats.paired(row.tolist()) for row in rng.normal(0.0, 1.0, size=(1000, 4))]
    assert np.mean([t.p < 0.05 for t in small]) == pytest.approx(0.05, abs=0.02)


def test_no_number_of_seeds_for_no_effect():
    assert stats.seeds_needed(0.0, 1.0) is None and stats.seeds_needed(1e-6, 1.0) is None


def test_more_comparisons_take_more_seeds_and_never_fewer_than_there_were():
    # tables say 51: the formula is an approximation
    assert stats.seeds_needed(0.5, 1.0, alpha=0.01) in (50, 51)
    for m in (1, 2, 5):
        for differences in np.random.default_rng(m).normal(0.7, 1.0, size=(50, 5)).tolist():
            pair = stats.paired(differences)
            if m * pair.p >= 0.05:
                assert (stats.seeds_needed(pair.mean, pair.sd, alpha=0.05 / m) or 10**6) > 5


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []
