"""Paired comparisons: the t test, Holm's correction, and how many seeds a difference needs."""
import math
import statistics
from dataclasses import dataclass

import numpy as np

from engine.options import need

ROUNDING = 2.0**-23  # of float32, in which models are trained and evaluated


def scipy_stats():
    """The module with Student's t. Raises UserError where scipy is missing."""
    need("scipy", "intervals and tests need")
    from scipy import stats

    return stats


@dataclass
class Paired:
    """Differences of pairs: mean, standard deviation, 95% interval, two-sided p of the t test.

    A single difference, or equal ones, have no spread, so that they say nothing about another
    pair's: no interval, no p. Where equal ones are zero, both are there for what they are worth:
    zero, and 1.
    """
    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p: float | None


def paired(differences: list[float], scale: float = 0.0) -> Paired:
    """Differences of values of about the size `scale`, which says what rounding is.

    Without it that is judged by the differences.
    """
    n = len(differences)
    mean = statistics.fmean(differences)
    if n == 1:
        return Paired(n, mean, None, None, None, None)
    sd = statistics.stdev(differences)
    rounding = ROUNDING * max(scale, *map(abs, differences))
    if sd <= rounding:
        if abs(mean) <= rounding:
            return Paired(n, mean, sd, mean, mean, 1.0)
        return Paired(n, mean, sd, None, None, None)
    test = scipy_stats().ttest_1samp(differences, 0)
    low, high = map(float, test.confidence_interval(0.95))
    return Paired(n, mean, sd, low, high, float(test.pvalue))


def seeds_needed(mean: float, sd: float, alpha: float = 0.05) -> int | None:
    """Pairs at which a t test finds a true difference `mean` with a power of 80%.

    None above 100,000.

    The test is two-sided at level alpha. n >= ((t_(1 - alpha/2) + t_0.8) sd / mean)^2, with
    quantiles for n - 1 degrees of freedom.
    """
    def enough(freedom: float) -> float:
        quantiles = student.ppf([1 - alpha / 2, 0.8], freedom)
        return (sum(quantiles) * sd / mean) ** 2

    student = scipy_stats().t
    # Its quantiles fall towards the normal distribution's: fewer than these are never enough.
    if mean == 0 or enough(math.inf) > 100_000:
        return None
    n = max(2, math.ceil(enough(math.inf)))
    while n < enough(n - 1):
        n += 1
    return n


def holm(p_values: list[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the order given."""
    p = np.array(p_values)
    order = p.argsort(kind="stable")
    left = np.arange(len(p), 0, -1)  # hypotheses that are not rejected yet
    p[order] = np.maximum.accumulate(left * p[order]).clip(max=1)
    return p.tolist()
