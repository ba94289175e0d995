"""data/tokens.py: windows of tokens, and the blocks of an epoch and of an evaluation."""
import json
from pathlib import Path

import numpy as np
import pytest

from data import tokenizers, tokens
from data.tokens import Blocks, Tokens, eval_blocks
from engine.options import DataError


def numbers(folder: Path, n: int, shard: int, monkeypatch) -> Tokens:
    """A prepared folder whose train split is 0 .. n-1, with a vocabulary of n characters."""
    monkeypatch.setattr(tokens, "SHARD", shard)
    folder.mkdir()
    writers = {split: tokens.Writer(folder, split, 2**17) for split in ("train", "val")}
    for start in range(0, n, 7):
        writers["train"].write(list(range(start, min(n, start + 7))), 1)
    meta = tokens.make_meta(tokenizers.CharTokenizer("".join(map(chr, range(n)))), writers)
    (folder / "meta.json").write_text(json.dumps(meta))
    return Tokens(folder, "train")


@pytest.mark.parametrize("shard", [13, 100, 2**27])
def test_windows_are_the_same_however_the_files_are_cut(tmp_path, monkeypatch, shard):
    train = numbers(tmp_path / "n", 1000, shard, monkeypatch)
    assert len(train.shards) == -(-1000 // shard) and len(train) == 1000
    assert train.meta["dtype"] == "<u4"
    starts = np.array([0, 5, 990, 87, 990, 12])
    window = train.gather(starts, 10)
    assert window.dtype == np.int64 and (window == starts[:, None] + np.arange(10)).all()
    for outside in (-1, 991):
        with pytest.raises(IndexError, match="in 1000 tokens"):
            train.gather(np.array([3, outside]), 10)
    with pytest.raises(DataError, match="val split of .* has 0 tokens"):
        Blocks(Tokens(tmp_path / "n", "val"), 1, 0)


@pytest.mark.parametrize("n, block_size", [(1000, 7), (1001, 10), (21, 10), (1000, 1)])
def test_an_epoch_visits_every_block_once_from_a_random_offset(tmp_path, monkeypatch,
                                                               n, block_size):
    blocks = Blocks(numbers(tmp_path / "n", n, 64, monkeypatch), block_size, seed=3)
    P = blocks.per_epoch
    assert P == (n - 1) // block_size - 1
    offsets = set()
    orders = set()
    for epoch in range(12):
        x, y = blocks.batch(epoch * P, P)
        assert x.shape == y.shape == (P, block_size) and x.dtype == y.dtype == np.int64
        assert (y == x + 1).all()
        assert x.flags.c_contiguous and y.flags.c_contiguous
        first = np.sort(x[:, 0])
        assert (np.diff(first) == block_size).all() and 0 <= first[0] < block_size and y.max() < n
        offsets.add(int(first[0]))
        orders.add(tuple(x[:, 0] - first[0]))
    assert P == 1 or len(orders) == 12
    assert len(offsets) > 3 or block_size == 1


def test_a_sample_depends_on_seed_and_index_alone(tmp_path, monkeypatch):
    train = numbers(tmp_path / "n", 500, 64, monkeypatch)
    x, y = Blocks(train, 9, seed=1).batch(0, 300)  # over five epochs
    for count in (1, 7, 100):
        blocks = Blocks(train, 9, seed=1)
        for first in reversed(range(0, 300, count)):
            count = min(count, 300 - first)
            x_part, y_part = blocks.batch(first, count)
            assert (x_part == x[first:first + count]).all()
            assert (y_part == y[first:first + count]).all()
    assert (Blocks(train, 9, seed=2).batch(0, 300)[0] != x).any()


def test_eval_blocks_never_overlap_and_span_the_split(tmp_path, monkeypatch):
    train = numbers(tmp_path / "n", 1000, 64, monkeypatch)
    for block_size, count in (10, 7), (10, 99), (10, 5000), (333, 3), (999, 4), (1, 998):
        starts = eval_blocks(train, block_size, count)
        assert starts.dtype == np.int64 and len(starts) == min(count, 999 // block_size)
        assert starts[0] == 0 and (np.diff(starts) >= block_size).all()
        assert len(train.gather(starts, block_size + 1)) == len(starts)
        assert starts[-1] + block_size > 999 - 2 * -(-999 // len(starts))
        assert (starts == eval_blocks(train, block_size, count)).all()


def test_too_short_for_a_block_says_the_numbers(tmp_path, monkeypatch):
    train = numbers(tmp_path / "n", 20, 64, monkeypatch)
    words = r"train split of .* has 20 tokens.*\(21\): lower block_size=10"
    with pytest.raises(DataError, match=words):
        Blocks(train, 10, 0)
    assert eval_blocks(train, 19, 5).tolist() == [0]
    with pytest.raises(DataError, match=r"has 20 tokens.*\(21\): lower block_size=20"):
        eval_blocks(train, 20, 5)
