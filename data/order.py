"""The order of training samples that fit into an epoch: a function of seed and sample number, so that a resumed run needs no state."""
import numpy as np


class Shuffled:
    """An endless sequence of epochs over n samples, each a permutation drawn from (seed, epoch)."""

    def __init__(self, n: int):
        self.n, self.epochs = n, {}

    def indices(self, first: int, count: int, seed: int) -> np.ndarray:
        """Samples first ... first + count - 1 of the sequence -> (count,) int64 in [0, n). The epochs of the last call are kept."""
        epoch, i = np.divmod(np.arange(first, first + count), self.n)
        self.epochs = {(seed, e): self.epochs[seed, e] if (seed, e) in self.epochs else np.random.default_rng([seed, e]).permutation(self.n)
                       for e in np.unique(epoch).tolist()}
        return np.array([self.epochs[seed, e][j] for e, j in zip(epoch.tolist(), i)])
