"""data/order.py: the orders that earlier versions drew, which runs that are resumed rely on."""
import numpy as np
import pytest

from data.order import Shuffled


@pytest.mark.parametrize("n, stride", [(1, 1), (10, 1), (1000, 1), (1, 7), (50, 7), (2000, 64)])
def test_the_order_is_an_offset_and_a_permutation_of_seed_and_epoch(n, stride):
    for seed in (0, 1337):
        epochs = []
        for epoch in range(4):
            rng = np.random.default_rng([seed, epoch])
            offset = rng.integers(stride) if stride > 1 else 0
            epochs.append(offset + stride * rng.permutation(n))
        expected = np.concatenate(epochs)
        shuffled = Shuffled(n, stride)
        for first, count in (0, 4 * n), (n // 2, 2 * n), (0, 1), (3 * n, n), (2 * n - 1, 2), (n, 0):
            places = shuffled.indices(first, count, seed)
            assert places.dtype == np.int64
            assert (places == expected[first:first + count]).all()
