"""ListOps: the value, 0 to 9, of a nested expression such as [MAX 3 [MIN 5 8 ] 4 ].

A generator, and what reads and checks trees. Task: Nangia and Bowman 2018; this distribution: Long
Range Arena (Tay et al. 2020). The root has depth 1. A node above max_depth is an operator with
probability 1/4, else a digit, uniform; at max_depth it is a digit. An operator is MIN, MAX, MED or
SM, uniform, with 2 to max_args arguments, uniform. MED is the median truncated toward zero, SM the
sum modulo 10. An operator counts 2 towards the length (its name and `]`), a digit 1; trees with
min_length < length < max_length are kept.

    tokens, offsets, labels, stats = generate(2000, seed=1)
    tree = tokens[offsets[0]:offsets[1]]
    to_text(tree), labels[0]    # what it says and its value

One core makes over 10,000 trees of the default kind a second: candidates grow a whole batch at a
time.

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


def generate(n: int, *, max_depth: int = 10, max_args: int = 10, min_length: int = 500,
             max_length: int = 2000, seed: int, exclude=frozenset(),
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """n distinct trees: tokens uint8 (all trees one after the other), offsets int64 (n + 1),
    labels uint8 (n), statistics.

    exclude: trees to leave out, a set of the bytes of each.
    Statistics: candidates (trees drawn), acceptance (share of them within the lengths), duplicates
    (trees within the lengths that were had before or excluded), mean_length, median_length.
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
    trees = {}  # the bytes of each, in the order of drawing, with its value
    chunks = accepted = duplicates = barren = 0
    with tqdm(total=n, unit=" trees", disable=None) as bar:
        while len(trees) < n:
            rng = np.random.default_rng([seed, chunks])
            tokens, offsets, values = _draw(rng, max_depth, max_args, min_length, max_length)
            chunks += 1
            accepted += len(values)
            before = len(trees)
            ends = zip(offsets[:-1].tolist(), offsets[1:].tolist())
            for (start, end), value in zip(ends, values.tolist()):
                tree = tokens[start:end].tobytes()
                if tree in trees or tree in exclude:
                    duplicates += 1
                elif len(trees) < n:
                    trees[tree] = value
            bar.update(len(trees) - before)
            barren = barren + 1 if len(trees) == before else 0
            if barren == HOPELESS:
                raise DataError(
                    f"listops: found {len(trees):,} of {n:,} distinct trees with {min_length} < "
                    f"length < {max_length}, max_depth={max_depth}, max_args={max_args}, and no "
                    f"new one in {HOPELESS * CHUNK:,} tries: allow longer or deeper trees, or ask "
                    "for fewer")
    lengths = np.array([len(tree) for tree in trees])
    candidates = chunks * CHUNK
    stats = {"candidates": candidates, "acceptance": accepted / candidates,
             "duplicates": duplicates, "mean_length": float(lengths.mean()),
             "median_length": float(np.median(lengths))}
    tokens = np.frombuffer(b"".join(trees), np.uint8)
    return tokens, _offsets(lengths), np.array([*trees.values()], np.uint8), stats


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _draw(rng, max_depth: int, max_args: int, min_length: int, max_length: int):
    """The trees of the right length among CHUNK candidates: tokens, offsets, labels.

    All candidates grow together, one depth at a time, as shapes alone; a tree whose length so far
    and nodes to come reach max_length is dropped at once. Operators, digits, values and tokens are
    drawn and laid out for the survivors only.
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
    levels = [arity[kept[tree]] for tree, arity in levels]
    return _fill(rng, levels, _offsets(length[kept]))


def _fill(rng, levels: list[np.ndarray], offsets: np.ndarray):
    """Draw operators and digits into tree shapes -> tokens, offsets, labels.

    levels: the arity of each node of each depth, children in their parents' order.
    """
    # of each node of each depth: its token, how many tokens its subtree has, its value
    nodes, sizes, values = ([None] * len(levels) for _ in range(3))
    for depth in reversed(range(len(levels))):
        arity = levels[depth]
        nodes[depth] = rng.integers(10, size=len(arity))
        sizes[depth] = np.ones(len(arity), np.int64)
        values[depth] = nodes[depth].copy()
        at = np.flatnonzero(arity)
        if len(at):
            nodes[depth][at] = rng.integers(MIN, SM + 1, len(at))
            sizes[depth][at] = 2 + np.add.reduceat(sizes[depth + 1], _offsets(arity[at])[:-1])
            values[depth][at] = _apply(nodes[depth][at], values[depth + 1], arity[at])
    tokens = np.empty(offsets[-1], np.uint8)
    position = offsets[:-1]  # of each node's first token
    for depth, arity in enumerate(levels):
        tokens[position] = nodes[depth]
        at = np.flatnonzero(arity)
        if not len(at):
            break
        tokens[position[at] + sizes[depth][at] - 1] = CLOSE
        before = _offsets(sizes[depth + 1])[:-1]  # tokens to the left, in subtrees of that depth
        first = _offsets(arity[at])[:-1]  # child of each operator
        position = before + np.repeat(position[at] + 1 - before[first], arity[at])
    return tokens, offsets, values[0].astype(np.uint8)


def _apply(operators: np.ndarray, arguments: np.ndarray, arity: np.ndarray) -> np.ndarray:
    """Values of operators (n), whose arguments stand one after the other, arity (n) of each."""
    first = _offsets(arity)[:-1]
    value = np.maximum.reduceat(arguments, first)
    value = np.where(operators == MIN, np.minimum.reduceat(arguments, first), value)
    value = np.where(operators == SM, np.add.reduceat(arguments, first) % 10, value)
    medians = np.flatnonzero(operators == MED)
    if len(medians):
        first, arity = first[medians], arity[medians]
        column = np.arange(arity.max())
        # a row an operator: its arguments, sorted, then tens, which no argument is
        place = np.minimum(first[:, None] + column, len(arguments) - 1)
        table = np.where(column < arity[:, None], arguments[place], 10)
        table.sort(axis=1)
        row = np.arange(len(medians))
        value[medians] = (table[row, (arity - 1) // 2] + table[row, arity // 2]) // 2
    return value


def tokenize(text: str) -> np.ndarray:
    """Text such as `( ( ( [MAX 3 ) 4 ) ] )` -> ids uint8, without parentheses. Raises DataError."""
    try:
        symbols = text.replace("(", " ").replace(")", " ").split()
        return np.array([_IDS[symbol] for symbol in symbols], np.uint8)
    except KeyError as error:
        raise DataError(f"ListOps text holds the unknown symbol {str(error)[:60]}; "
                        f"symbols are ( ) {' '.join(SYMBOLS)}") from None


def to_text(tokens) -> str:
    """Ids -> text without parentheses."""
    return " ".join(SYMBOLS[token] for token in tokens)


def evaluate(tokens) -> int:
    """The value of one tree. Raises DataError where it is not a complete expression."""
    stack = [[]]  # arguments of the operators that are open, each list headed by its operator
    for token in np.asarray(tokens).tolist():
        if token < 10:
            stack[-1].append(token)
        elif token < CLOSE:
            stack.append([token])
        else:
            operator, *arguments = stack.pop() if len(stack) > 1 else [None]
            if not arguments:
                raise DataError(f"not a ListOps expression: {to_text(tokens)[:60]!r} closes an "
                                "operator without arguments")
            middle = sorted(arguments)[(len(arguments) - 1) // 2:len(arguments) // 2 + 1]
            values = {MIN: min(arguments), MAX: max(arguments),
                      MED: sum(middle) // len(middle), SM: sum(arguments) % 10}
            stack[-1].append(values[operator])
    if len(stack) > 1 or len(stack[0]) != 1:
        raise DataError(f"not a ListOps expression: {to_text(tokens)[:60]!r} is not exactly one "
                        "complete tree")
    return stack[0][0]


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
