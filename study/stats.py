"""Paired comparisons: Student's t distribution, intervals, Holm's correction, and how many seeds a difference needs."""
import functools
import math
import statistics
from dataclasses import dataclass


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by Lentz's continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    f = d
    for m in range(1, 1000):
        for term in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)), -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            d, c = 1 / (1 + term * d), 1 + term / c
            f *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * f


def t_tail(t: float, df: float) -> float:
    """P(|T| > |t|) of Student's t with df degrees of freedom."""
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


@functools.cache
def t_quantile(p: float, df: float) -> float:
    """The t >= 0 with P(T <= t) = p, for p in [0.5, 1)."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > 2 * (1 - p):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 2 * (1 - p) else (low, middle)
    return (low + high) / 2


@dataclass
class Paired:
    """Differences of pairs: mean, standard deviation, 95% interval, two-sided p value of the t test."""
    n: int
    mean: float
    sd: float
    low: float
    high: float
    p: float


def paired(differences: list[float]) -> Paired:
    """At least two differences. Where all are equal the interval has no width, and p is 1 at zero and 0 elsewhere."""
    n = len(differences)
    mean, sd = statistics.fmean(differences), statistics.stdev(differences)
    if sd == 0:
        return Paired(n, mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0)
    error = sd / math.sqrt(n)
    half = t_quantile(0.975, n - 1) * error
    return Paired(n, mean, sd, mean - half, mean + half, t_tail(mean / error, n - 1))


def seeds_needed(mean: float, sd: float, power: float = 0.8, alpha: float = 0.05, most: int = 100_000) -> int | None:
    """Pairs at which a two-sided t test at level alpha finds a true difference `mean` with the given power; None above `most`.

    By n >= ((t_(1 - alpha/2) + t_power) sd / mean)^2, with quantiles for n - 1 degrees of freedom.
    """
    normal = statistics.NormalDist()
    least = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)  # t's quantiles exceed the normal distribution's
    if mean == 0 or (least * sd / mean) ** 2 > most:
        return None
    n = max(2, math.ceil((least * sd / mean) ** 2))
    while n < ((t_quantile(1 - alpha / 2, n - 1) + t_quantile(power, n - 1)) * sd / mean) ** 2:
        n += 1
    return n


def holm(p_values: list[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
