"""The order of training samples, a function of seed and sample number: no state to resume."""
from functools import lru_cache

import numpy as np


class Shuffled:
    """An endless sequence of epochs over n places that lie `stride` apart, from 0.

    Each epoch visits every place once, in an order drawn from (seed, epoch), and moves all of them
    by an offset in [0, stride), drawn first. With stride 1 the places are the indices 0 ... n - 1.
    """

    def __init__(self, n: int, stride: int = 1):
        self.n = n
        self.stride = stride
        self.epoch = lru_cache(maxsize=2)(self._draw)  # a batch can span two epochs

    def indices(self, first: int, count: int, seed: int) -> np.ndarray:
        """Samples first ... first + count - 1 of the sequence -> (count,) int64."""
        epoch, position = np.divmod(np.arange(first, first + count), self.n)
        places = np.empty(count, np.int64)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            places[here] = self.epoch(seed, e)[position[here]]
        return places

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        offset = rng.integers(self.stride)  # takes nothing from rng where stride is 1
        return offset + self.stride * rng.permutation(self.n)


def spread(n: int, size: int) -> np.ndarray:
    """At most n of `size` samples, evenly spread from the first on: always the same, int64."""
    n = min(n, size)
    return np.arange(n) * size // n
