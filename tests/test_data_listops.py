"""data/listops.py: trees against a recursive reference, published statistics, baselines by hand."""
import random

import numpy as np
import pytest

from data import listops
from data.listops import CLOSE, MAX, MED, MIN, SM, generate, to_text, tokenize
from engine.options import DataError


def arrays(trees: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, offsets, labels, as a prepared folder keeps them."""
    tokens = np.frombuffer(b"".join(trees), np.uint8)
    return tokens, np.cumsum([0, *map(len, trees)]), np.array([*trees.values()], np.uint8)


def read(symbols):
    """Recursive reference of the tree that `symbols` starts with: (value, depth, arguments of the
    widest operator, operators)."""
    symbol = symbols.pop(0)
    if symbol.isdigit():
        return int(symbol), 1, 0, 0
    inner = []
    while symbols[0] != "]":
        inner.append(read(symbols))
    symbols.pop(0)
    values = sorted(value for value, *_ in inner)
    n = len(values)
    middle = values[n // 2] if n % 2 else int((values[n // 2 - 1] + values[n // 2]) / 2)
    value = {"[MIN": values[0], "[MAX": values[-1], "[SM": sum(values) % 10, "[MED": middle}[symbol]
    assert n >= 2
    depth = 1 + max(depth for _, depth, _, _ in inner)
    widest = max(n, *(width for _, _, width, _ in inner))
    return value, depth, widest, 1 + sum(operators for *_, operators in inner)


def value_of(tree) -> int:
    """The value of exactly one tree of ids, by the reference."""
    symbols = to_text(tree).split()
    value, *_ = read(symbols)
    assert not symbols
    return value


@pytest.fixture(scope="module")
def full():
    return generate(3000, seed=1)


def test_values_shapes_and_lengths_of_the_default_trees(full):
    assert len(full) == 3000
    deepest = widest = 0
    for tree, label in list(full.items())[:300]:
        symbols = to_text(tree).split()
        value, depth, arguments, operators = read(symbols)
        digits = sum(token < 10 for token in tree)
        assert not symbols and value == label
        assert len(tree) == digits + 2 * operators and 500 < len(tree) < 2000
        deepest, widest = max(deepest, depth), max(widest, arguments)
    assert deepest == 10 and widest == 10


@pytest.mark.slow
def test_every_label_is_the_value(full):
    assert [value_of(tree) for tree in full] == [*full.values()]


def test_statistics_are_the_published_ones(full):
    """Within four standard errors (of these 3000) of mean length 1036, median 957, class 0 17.1%,
    class 9 16.6%."""
    _, offsets, labels = arrays(full)
    lengths = np.diff(offsets)
    assert lengths.mean() == pytest.approx(1036, abs=4 * 394 / 3000**0.5)
    assert np.median(lengths) == pytest.approx(957, abs=45)
    for digit, share in (0, 0.171), (9, 0.166):
        assert (labels == digit).mean() == pytest.approx(share, abs=4 * (0.17 * 0.83 / 3000) ** 0.5)
    error = (0.36 * 0.64 / 3000) ** 0.5
    assert listops.root_baseline(arrays(full), arrays(full)) == pytest.approx(0.362, abs=4 * error)


@pytest.mark.slow
def test_small_trees_follow_the_recursive_distribution():
    """Shares of lengths and of roots, against trees that a recursion draws one by one."""
    source = random.Random(0)

    def draw(depth):
        if depth < 4 and source.random() < 0.25:
            return [source.choice("abcd"), *(draw(depth + 1) for _ in range(source.randint(2, 3)))]
        return source.randrange(10)

    def size(tree):
        return 2 + sum(map(size, tree[1:])) if isinstance(tree, list) else 1

    reference = [tree for tree in (draw(1) for _ in range(200_000)) if 7 < size(tree) < 30]
    tokens, offsets, _ = arrays(generate(10_000, max_depth=4, max_args=3, min_length=7,
                                         max_length=30, seed=3))
    ours, theirs = np.diff(offsets), np.array([size(tree) for tree in reference])
    assert ours.min() == 8 and ours.max() == 29
    for length in range(8, 20):
        share = (theirs == length).mean()
        error = (share * (1 - share) * (1 / 10_000 + 1 / len(theirs))) ** 0.5
        # 0.003: ours are distinct
        assert (ours == length).mean() == pytest.approx(share, abs=4 * error + 0.003)
    roots = np.bincount(tokens[offsets[:-1]], minlength=15)
    operators = roots[[MIN, MAX, MED, SM]]
    assert operators.sum() == 10_000 and abs(operators / 10_000 - 0.25).max() < 0.02


def test_seeded_distinct_and_excluding():
    options = dict(min_length=2, max_length=12, max_depth=3, max_args=3)
    first = generate(3000, seed=5, **options)
    assert list(first.items()) == list(generate(3000, seed=5, **options).items())
    other = generate(3000, seed=6, exclude=first, **options)
    assert len(first) == len(other) == 3000 and not first.keys() & other.keys()
    assert generate(3000, seed=6, **options).keys() & first.keys()


def test_text_and_tokens():
    tokens = tokenize("( ( ( [MAX 3 ) ( ( ( [MED 4 ) 9 ) ] ) ) ] )\r")
    assert tokens == bytes([MAX, 3, MED, 4, 9, CLOSE, CLOSE])
    assert to_text(tokens) == "[MAX 3 [MED 4 9 ] ]" and tokenize(to_text(tokens)) == tokens
    with pytest.raises(DataError, match="unknown symbol '.AVG'"):
        tokenize("( [AVG 3")


def test_baselines_by_hand():
    def stored(*samples):
        return arrays({tokenize(text): label for text, label in samples})

    train = stored(("[MIN 1 2 ]", 1), ("[MIN 1 3 ]", 1), ("[MIN 2 2 ]", 2), ("[MAX 9 1 ]", 9),
                   ("[SM 1 1 ]", 2), ("[SM 2 0 ]", 2))
    # MED, unseen: train's most frequent, 2
    test = stored(("[MIN 1 5 ]", 1), ("[MAX 0 8 ]", 8), ("[MAX 9 0 ]", 9), ("[MED 2 2 ]", 2))
    assert listops.root_baseline(train, test) == 3 / 4
    assert listops.majority_baseline(train[2], test[2]) == 1 / 4


@pytest.mark.parametrize("options, words", [
    (dict(max_args=1), "max_args=1 must be an integer of at least 2"),
    (dict(min_length=10, max_length=11), "max_length=11 must be an integer of at least 12"),
    (dict(max_depth=2.5), "max_depth=2.5"),
    (dict(max_args=10**30), "max_args=10{30} must be an integer of at least 2, at most 65536"),
    (dict(max_depth=10**9), "max_depth=1000000000 must be"),
    (dict(max_length=10**9), "max_length=1000000000 must be"),
    (dict(max_depth=1), "found 0 of 20 distinct trees with 500 < length < 2000"),
    (dict(min_length=0, max_length=2), "found 10 of 20"),  # the ten digits
])
def test_impossible_options_are_one_line(options, words):
    with pytest.raises(DataError, match=words) as error:
        generate(20, seed=0, **options)
    assert "\n" not in str(error.value)
