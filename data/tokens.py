"""Tokens on disk: how they are kept, and how training reads them.

A prepared folder, which data/text.py makes, holds files of token ids, little-endian uint16 or, for
vocabularies above 65536, uint32, and a meta.json: tokenizer (a `Tokenizer.state()`), vocab_size,
dtype, max_tokens, and for each split its tokens, bytes (of text), sha256 (of its ids) and shards.
A split of more than WHOLE bytes has a sample besides, the sha256 of PIECES pieces of PIECE tokens,
spread evenly over it: what `Tokens` checks where reading everything would take too long.

    tokens = Tokens(prepare("shakespeare"), "train")
    x, y = Blocks(tokens, block_size=64, seed=0).batch(first=0, count=12)
    load_tokenizer(tokens.meta).decode(x[0])
"""
import hashlib
from pathlib import Path

import numpy as np

from data.folders import read_meta, reading
from data.order import Shuffled, spread
from data.tokenizers import Tokenizer
from engine.options import DataError

SHARD = 2**27  # most tokens in one file
WHOLE = 2**28  # most bytes of a split that are checked whole when it is opened: about 0.4 s
PIECES = 256
PIECE = 2**13
VOCABULARIES = {"bytes": 256, "gpt2": 50257}  # sizes; that of characters depends on the text


class Writer:
    """Appends the tokens of one split to files of at most SHARD tokens in `folder`."""

    def __init__(self, folder: Path, split: str, vocab_size: int):
        self.folder = folder
        self.split = split
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.tokens = 0
        self.bytes = 0
        self.shards = []
        self.sha256 = hashlib.sha256()

    def write(self, ids: list[int], n_bytes: int):
        """Append ids, the tokens of n_bytes of text."""
        block = np.array(ids, dtype=self.dtype)
        self.tokens += len(block)
        self.bytes += n_bytes
        self.sha256.update(block)
        while len(block):
            if not self.shards or self.shards[-1]["tokens"] == SHARD:
                file = f"{self.split}_{len(self.shards):05d}.bin"
                self.shards.append({"file": file, "tokens": 0})
            shard = self.shards[-1]
            part, block = np.split(block, [SHARD - shard["tokens"]])
            with open(self.folder / shard["file"], "ab") as file:
                file.write(part)
            shard["tokens"] += len(part)

    def meta(self) -> dict:
        meta = {"tokens": self.tokens, "bytes": self.bytes, "sha256": self.sha256.hexdigest(),
                "shards": self.shards}
        if self.tokens * self.dtype.itemsize > WHOLE:
            paths = [self.folder / shard["file"] for shard in self.shards]
            sample = _sample([np.memmap(path, self.dtype, "r") for path in paths])
            meta["sample"] = hashlib.sha256(sample).hexdigest()
        return meta


def writers_for(folder: Path, tokenizer: Tokenizer) -> dict[str, Writer]:
    return {split: Writer(folder, split, tokenizer.vocab_size) for split in ("train", "val")}


def make_meta(tokenizer: Tokenizer, writers: dict[str, Writer],
              max_tokens: int | None = None) -> dict:
    """What meta.json holds, see the top of this file."""
    return {"tokenizer": tokenizer.state(), "vocab_size": tokenizer.vocab_size,
            "dtype": writers["train"].dtype.str, "max_tokens": max_tokens,
            "splits": {split: writer.meta() for split, writer in writers.items()}}


def _windows(files: list[np.ndarray], starts: np.ndarray, length: int) -> np.ndarray:
    """`length` ids from each of starts (n,) in the sequence of all files -> (n, length) int64."""
    index = starts[:, None] + np.arange(length)  # (n, length)
    if len(files) == 1:  # most texts: a hundred times as fast
        return files[0][index].astype(np.int64)
    windows = np.empty(index.shape, np.int64)
    ends = np.cumsum([len(file) for file in files])
    file_of = np.searchsorted(ends, index, side="right")  # (n, length)
    for i in np.unique(file_of):
        here = file_of == i
        windows[here] = files[i][index[here] - (ends[i] - len(files[i]))]
    return windows


def _sample(files: list[np.ndarray]) -> np.ndarray:
    """PIECES pieces, from the first token to the last -> (PIECES, PIECE), the files' dtype."""
    last = sum(map(len, files)) - PIECE
    starts = np.arange(PIECES) * last // (PIECES - 1)
    return _windows(files, starts, PIECE).astype(files[0].dtype)


class Tokens:
    """The tokens of a split ("train" or "val") of a prepared folder, files seen as one sequence.

    `bytes` is the size of its text in UTF-8: loss per token * len / bytes / ln 2 is bits per byte.
    The files are memory-mapped: what was read of them counts as this process's memory, but is page
    cache, which the system takes back when it needs room.

    Raises DataError where the files are not as they were prepared. All of a split of at most WHOLE
    bytes is checked; of a larger one all sizes, and the sample where meta.json has its sha256
    (older versions did not write it). So a change of a few places of a large file can go unseen.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        self.split = split
        self.meta = read_meta(folder)
        self.remedy = f"remove {folder} and prepare it again"
        with reading(folder):
            tokenizer = self.meta["tokenizer"]
            known = VOCABULARIES.get(tokenizer["name"]) or len(tokenizer["chars"])
            if self.meta["vocab_size"] != known:
                raise ValueError(f"its vocab_size is not {known}")
            stored = self.meta["splits"][split]
            self.bytes = int(stored["bytes"])
            try:
                self.shards = [self._map(**shard) for shard in stored["shards"]]
                self._check(stored)
            except OSError as error:
                raise DataError(f"the {split} tokens in {folder} cannot be read "
                                f"({error.strerror}): check the disk and who may read it") from None

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def _map(self, file: str, tokens: int) -> np.memmap:
        if Path(file).name != file:
            raise ValueError(f"it names {file!r}, outside of it")
        path = self.folder / file
        dtype = np.dtype(self.meta["dtype"])
        size = tokens * dtype.itemsize
        if not size or not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path} is missing or damaged ({size} bytes expected): {self.remedy}")
        return np.memmap(path, dtype, "r")

    def _check(self, stored: dict):
        sha256 = hashlib.sha256()
        expected = stored["sha256"]
        if sum(shard.nbytes for shard in self.shards) > WHOLE:
            expected = stored.get("sample")
            sha256.update(_sample(self.shards))
        else:
            # Not through the memory maps: what is read of these would count as this process's.
            for shard in self.shards:
                with open(shard.filename, "rb") as file:
                    while block := file.read(2**20):
                        sha256.update(block)
        if expected not in (None, sha256.hexdigest()):
            raise DataError(f"the {self.split} tokens in {self.folder} are not those that were "
                            f"prepared (their sha256 differs): {self.remedy}")

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of `length` tokens from each of starts (n,) int64 -> (n, length) int64.

        Raises IndexError where a start is outside [0, len - length], and DataError where a token is
        outside the vocabulary.
        """
        if len(starts) and not 0 <= starts.min() <= starts.max() <= len(self) - length:
            raise IndexError(f"windows of {length} from {starts.min()}..{starts.max()} "
                             f"in {len(self)} tokens of {self.folder}")
        windows = _windows(self.shards, starts, length)
        largest = windows.max(initial=0)
        if largest >= self.meta["vocab_size"]:  # a large split was checked in places only
            raise DataError(f"the {self.split} tokens in {self.folder} hold {largest}, outside "
                            f"the vocabulary of {self.meta['vocab_size']}: {self.remedy}")
        return windows


class Blocks:
    """Training samples without replacement: sample g belongs to epoch g // per_epoch.

    An epoch visits each of its per_epoch = (N - 1) // block_size - 1 blocks once, in an order and
    from an offset in [0, block_size) drawn from (seed, epoch). The same g gives the same tokens
    whatever the batch size and the number of processes.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int):
        self.tokens = tokens
        self.block_size = block_size
        self.seed = seed
        self.per_epoch = (len(tokens) - 1) // block_size - 1  # one less: the offset moves them all
        if self.per_epoch < 1:
            raise _too_short(tokens, block_size, "two blocks", 2 * block_size + 1)
        self.starts = Shuffled(self.per_epoch, stride=block_size)

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples first ... first + count - 1: (x, y), each (count, block_size) int64.

        y is one token further than x.
        """
        starts = self.starts.indices(first, count, self.seed)
        window = self.tokens.gather(starts, self.block_size + 1)  # (count, block_size + 1)
        return window[:, :-1].copy(), window[:, 1:].copy()


def eval_blocks(tokens: Tokens, block_size: int, count: int) -> np.ndarray:
    """Starts, int64, of at most `count` blocks spread evenly over the split, always the same.

    A block is block_size inputs and the token after them, `tokens.gather(starts, block_size + 1)`;
    none overlaps another. Raises DataError where not even one fits.
    """
    available = (len(tokens) - 1) // block_size
    if available < 1:
        raise _too_short(tokens, block_size, "one block", block_size + 1)
    return spread(count, available) * block_size


def _too_short(tokens: Tokens, block_size: int, what: str, needed: int) -> DataError:
    return DataError(f"the {tokens.split} split of {tokens.folder} has {len(tokens)} tokens, "
                     f"fewer than {what} and one more ({needed}): lower block_size={block_size} or "
                     "give a longer text")
