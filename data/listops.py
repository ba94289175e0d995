"""ListOps: the value, 0 to 9, of a nested expression such as [MAX 3 [MIN 5 8 ] 4 ].

A generator, and what reads trees. Task: Nangia and Bowman 2018; this distribution: Long
Range Arena (Tay et al. 2020). The root has depth 1. A node above max_depth is an operator with
probability 1/4, else a digit, uniform; at max_depth it is a digit. An operator is MIN, MAX, MED or
SM, uniform, with 2 to max_args arguments, uniform. MED is the median truncated toward zero, SM the
sum modulo 10. An operator counts 2 towards the length (its name and `]`), a digit 1; trees with
min_length < length < max_length are kept.

    for tree, value in generate(2000, seed=1).items():
        print(to_text(tree), value)

One core makes some 3,000 trees of the default kind a second: candidates, most of which are too
short or too long, grow a whole batch at a time.

Token ids: digits are themselves, then [MIN [MAX [MED [SM ] from 10 to 14. The parentheses of the
released text are dropped: they only repeat what the brackets say.
"""
from numbers import Integral

import numpy as np
from tqdm import tqdm

from engine.options import DataError

SYMBOLS = [*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]
MIN, MAX, MED, SM, CLOSE = range(10, 15)
P_OPERATOR = 0.25
CHUNK = 16_384  # candidate trees drawn together
LONGEST = 65_536  # tokens of a tree: a chunk of such candidates takes about two gigabytes
HOPELESS = 100  # chunks without a new tree before giving up
_IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
_TOKENS = [bytes([i]) for i in range(len(SYMBOLS))]


def generate(n: int, *, max_depth: int = 10, max_args: int = 10, min_length: int = 500,
             max_length: int = 2000, seed: int, exclude=frozenset()) -> dict[bytes, int]:
    """n distinct trees, a byte a token, each with its value.

    exclude: trees to leave out.
    Raises DataError where the options are impossible or there are not n such trees to be found.
    """
    for name, value, least, most in (
            ("n", n, 1, 2**32), ("max_depth", max_depth, 1, LONGEST),
            ("max_args", max_args, 2, LONGEST), ("min_length", min_length, 0, LONGEST),
            ("max_length", max_length, min_length + 2, LONGEST)):
        if not isinstance(value, Integral) or not least <= value <= most:
            why = " (min_length + 2)" if name == "max_length" else ""
            raise DataError(f"listops: {name}={value} must be an integer of at least {least}{why}, "
                            f"at most {most}")
    found = {}
    chunks = barren = 0
    with tqdm(total=n, unit=" trees", disable=None) as bar:
        while len(found) < n:
            rng = np.random.default_rng([seed, chunks])
            chunks += 1
            before = len(found)
            for tree, value in _draw(rng, max_depth, max_args, min_length, max_length):
                if tree not in exclude and len(found) < n:
                    found[tree] = value
            bar.update(len(found) - before)
            barren = barren + 1 if len(found) == before else 0
            if barren == HOPELESS:
                raise DataError(
                    f"listops: found {len(found):,} of {n:,} distinct trees with {min_length} < "
                    f"length < {max_length}, max_depth={max_depth}, max_args={max_args}, and no "
                    f"new one in {HOPELESS * CHUNK:,} tries: allow longer or deeper trees, or ask "
                    "for fewer")
    return found


def _draw(rng, max_depth: int, max_args: int, min_length: int, max_length: int):
    """(bytes, value) of each tree of the right length among CHUNK candidates.

    All candidates grow together, one depth at a time, as shapes alone; a tree whose length so far
    and nodes to come reach max_length is dropped at once. Operators and digits are drawn for the
    survivors only.
    """
    levels = []
    tree = np.arange(CHUNK)  # for each node of this depth the candidate it belongs to, in order
    length = np.zeros(CHUNK)
    for depth in range(1, max_depth + 1):
        if not len(tree):
            break
        arity = np.zeros(len(tree), np.int64)  # 0: a digit
        if depth < max_depth:
            operators = np.flatnonzero(rng.random(len(tree)) < P_OPERATOR)
            arity[operators] = rng.integers(2, max_args + 1, len(operators))
        levels.append((tree, arity))
        length += np.bincount(tree, 1 + (arity > 0), CHUNK)
        to_come = np.bincount(tree, arity, CHUNK)
        length[length + to_come >= max_length] = np.inf
        tree = np.repeat(tree, np.where(np.isinf(length[tree]), 0, arity))
    kept = (min_length < length) & (length < max_length)
    return _fill(rng, [arity[kept[tree]] for tree, arity in levels])


def _fill(rng, levels: list[np.ndarray]):
    """Draw operators and digits into tree shapes -> (bytes, value) of each tree.

    levels: the arity of each node of each depth, children in their parents' order.
    """
    texts, values = [], []
    for arity in reversed(levels):  # from the leaves up: of each node its subtree's bytes and value
        below, arguments = texts, values
        nodes = rng.integers(10, size=len(arity))
        values = nodes.tolist()
        parents = np.flatnonzero(arity)
        nodes[parents] = rng.integers(MIN, SM + 1, len(parents))
        texts = [_TOKENS[node] for node in nodes.tolist()]
        last = 0
        for i, count in zip(parents.tolist(), arity[parents].tolist()):
            first, last = last, last + count  # its children are below[first:last]
            values[i] = _apply(nodes[i], arguments[first:last])
            texts[i] = b"".join([texts[i], *below[first:last], _TOKENS[CLOSE]])
    return zip(texts, values)


def _apply(operator: int, arguments: list[int]) -> int:
    if operator == MIN:
        return min(arguments)
    if operator == MAX:
        return max(arguments)
    if operator == SM:
        return sum(arguments) % 10
    n = len(arguments)
    middle = sorted(arguments)[(n - 1) // 2:n // 2 + 1]  # one of them, or two
    return sum(middle) // len(middle)


def tokenize(text: str) -> bytes:
    """Text such as `( ( ( [MAX 3 ) 4 ) ] )` -> ids, without parentheses. Raises DataError."""
    try:
        symbols = text.replace("(", " ").replace(")", " ").split()
        return bytes(_IDS[symbol] for symbol in symbols)
    except KeyError as error:
        raise DataError(f"ListOps text holds the unknown symbol {str(error)[:60]}; "
                        f"symbols are ( ) {' '.join(SYMBOLS)}") from None


def to_text(tokens) -> str:
    """Ids -> text without parentheses."""
    return " ".join(SYMBOLS[token] for token in tokens)


def majority_baseline(train_labels: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on `labels` of always answering the most frequent of `train_labels`."""
    return float(np.mean(labels == np.bincount(train_labels).argmax()))


def root_baseline(train: tuple, test: tuple) -> float:
    """Accuracy on `test` of answering each root's most frequent label in `train`.

    A root is a tree's first token. Both are (tokens, offsets, labels). A root that `train` lacks
    gets train's most frequent label.
    """
    counts = np.zeros((len(SYMBOLS), 10), np.int64)
    tokens, offsets, labels = train
    np.add.at(counts, (tokens[offsets[:-1]], labels), 1)
    counts[counts.sum(1) == 0] = counts.sum(0)
    tokens, offsets, labels = test
    return float(np.mean(counts.argmax(1)[tokens[offsets[:-1]]] == labels))
