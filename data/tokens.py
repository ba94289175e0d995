"""Tokens: how text becomes them (characters, bytes, GPT-2's byte pairs), how they are kept on disk, how training reads them.

A prepared folder holds files of token ids, uint16 or, for vocabularies above 65536, uint32, little-endian, with a meta.json beside them
(`read_meta`). data/text.py makes such folders.

    tokens = Tokens(prepare("shakespeare"), "train")
    x, y = Blocks(tokens, block_size=64, seed=0).batch(first=0, count=12)
    load_tokenizer(tokens.meta).decode(x[0])
"""
import hashlib
import json
from pathlib import Path

import numpy as np

from engine.options import DataError

SHARD = 2**27  # most tokens in one file


class Tokenizer:
    """Text <-> token ids in [0, vocab_size).

    `decode` takes any ids: those outside the vocabulary (the padding of a model's embedding) become U+FFFD, and so do bytes that are
    not UTF-8. `eot` is the end-of-text token, None where there is none. `load_tokenizer(tokenizer.state())` is the same tokenizer.
    """
    eot: int | None = None

    def __init__(self, name: str, table: list[bytes]):
        self.name, self.table, self.vocab_size = name, table, len(table)  # table: the bytes of each token

    def state(self) -> dict:
        return {"name": self.name}

    def decode_bytes(self, ids) -> bytes:
        unknown = "\ufffd".encode()
        return b"".join(self.table[i] if 0 <= i < self.vocab_size else unknown for i in map(int, ids))

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class CharTokenizer(Tokenizer):
    """One token for each character of `chars`."""

    def __init__(self, chars: str):
        super().__init__("char", [c.encode() for c in chars])
        self.chars, self.ids = chars, {c: i for i, c in enumerate(chars)}

    def state(self) -> dict:
        return {"name": self.name, "chars": self.chars}

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            raise DataError(f"the character {error.args[0]!r} is not among the {self.vocab_size} of the training text: leave it out, or "
                            "train with --tokenizer=bytes or --tokenizer=gpt2, which take every character") from None


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8."""

    def __init__(self):
        super().__init__("bytes", [bytes([i]) for i in range(256)])

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))  # a command line's undecodable bytes are themselves again


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, 50257 tokens, through tiktoken; "<|endoftext|>" inside a text is plain text."""

    def __init__(self):
        import tiktoken
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' network errors are OSErrors; ValueError: a damaged download
            raise DataError(f"the gpt2 vocabulary is not at hand ({type(error).__name__} while downloading it): run `TIKTOKEN_CACHE_DIR="
                            "FOLDER python -c 'import tiktoken; tiktoken.get_encoding(\"gpt2\")'` where there is a network, copy FOLDER "
                            "here, and set TIKTOKEN_CACHE_DIR to it") from error
        super().__init__("gpt2", [self.encoding.decode_single_token_bytes(i) for i in range(self.encoding.n_vocab)])
        self.eot = self.encoding.eot_token

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)


def load_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer of a `state()`, or of a whole meta.json. DataError where the name is unknown or gpt2's vocabulary is missing."""
    state = state.get("tokenizer", state)
    if state.get("name") == "char":
        return CharTokenizer(state["chars"])
    if state.get("name") in ("bytes", "gpt2"):
        return {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer}[state["name"]]()
    raise DataError(f"unknown tokenizer {state.get('name')!r}: choose char, bytes or gpt2")


class Writer:
    """Appends the tokens of one split to files of at most SHARD tokens in `folder`."""

    def __init__(self, folder: Path, split: str, vocab_size: int):
        self.folder, self.split, self.dtype = folder, split, np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.tokens, self.bytes, self.shards, self.sha256 = 0, 0, [], hashlib.sha256()

    def write(self, ids: list[int], n_bytes: int):
        """Append ids, the tokens of n_bytes of text."""
        block = np.array(ids, dtype=self.dtype)
        self.tokens, self.bytes = self.tokens + len(block), self.bytes + n_bytes
        self.sha256.update(block)
        while len(block):
            if not self.shards or self.shards[-1]["tokens"] == SHARD:
                self.shards.append({"file": f"{self.split}_{len(self.shards):05d}.bin", "tokens": 0})
            shard = self.shards[-1]
            part, block = np.split(block, [SHARD - shard["tokens"]])
            with open(self.folder / shard["file"], "ab") as file:
                file.write(part)
            shard["tokens"] += len(part)

    def meta(self) -> dict:
        return {"tokens": self.tokens, "bytes": self.bytes, "sha256": self.sha256.hexdigest(), "shards": self.shards}


def make_meta(tokenizer: Tokenizer, writers: dict[str, Writer], max_tokens: int | None = None) -> dict:
    """What meta.json holds, see `read_meta`."""
    splits = {split: writer.meta() for split, writer in writers.items()}
    return {"tokenizer": tokenizer.state(), "vocab_size": tokenizer.vocab_size, "dtype": writers["train"].dtype.str,
            "max_tokens": max_tokens, "splits": splits}


def read_meta(folder: str | Path) -> dict:
    """meta.json of a prepared folder: tokenizer (a state), vocab_size, dtype, max_tokens, splits (tokens, bytes, sha256, shards).

    DataError where it is missing or damaged.
    """
    try:
        return json.loads((Path(folder) / "meta.json").read_text())
    except (OSError, ValueError):
        raise DataError(f"{folder} holds no readable meta.json: remove the folder and prepare it again") from None


class Tokens:
    """The tokens of a split ("train" or "val") of a prepared folder, files seen as one sequence.

    `bytes` is the size of its text in UTF-8: loss per token * len / bytes / ln 2 is bits per byte. The files are memory-mapped; pages
    that were read count as the process's memory but are page cache, which the system takes back when it needs room.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split, self.meta = Path(folder), split, read_meta(folder)
        self.bytes, self.shards = self.meta["splits"][split]["bytes"], []
        dtype = np.dtype(self.meta["dtype"])
        for shard in self.meta["splits"][split]["shards"]:
            path, size = self.folder / shard["file"], shard["tokens"] * dtype.itemsize
            if not path.is_file() or path.stat().st_size != size:
                raise DataError(f"{path} is missing or damaged ({size} bytes expected): remove {folder} and prepare it again")
            self.shards.append(np.memmap(path, dtype=dtype, mode="r"))
        self.ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.shards else 0

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of `length` tokens from each of starts (n,) int64 -> (n, length) int64. IndexError outside [0, len - length]."""
        starts = np.asarray(starts)
        if len(starts) and not 0 <= starts.min() <= starts.max() <= len(self) - length:
            raise IndexError(f"windows of {length} from {starts.min()}..{starts.max()} in {len(self)} tokens of {self.folder}")
        index = starts[:, None] + np.arange(length)  # (n, length)
        if len(self.shards) == 1:
            return self.shards[0][index].astype(np.int64)
        out, where = np.empty(index.shape, np.int64), np.searchsorted(self.ends, index, side="right")
        for i in np.unique(where):
            here = where == i
            out[here] = self.shards[i][index[here] - (self.ends[i] - len(self.shards[i]))]
        return out


class Blocks:
    """Training samples without replacement: sample g belongs to epoch g // per_epoch.

    An epoch visits each of its per_epoch = (N - 1) // block_size - 1 blocks once, in an order and from an offset in [0, block_size) drawn
    from (seed, epoch). The same g gives the same tokens whatever the batch size and the number of processes.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int):
        self.tokens, self.block_size, self.seed, self._epochs = tokens, block_size, seed, {}
        self.per_epoch = (len(tokens) - 1) // block_size - 1
        if self.per_epoch < 1:
            raise DataError(f"the {tokens.split} split of {tokens.folder} has {len(tokens)} tokens, fewer than two blocks and one more "
                            f"({2 * block_size + 1}): lower block_size={block_size} or give a longer text")

    def _starts(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            rng = np.random.default_rng([self.seed, epoch])
            offset = rng.integers(self.block_size)
            self._epochs[epoch] = offset + rng.permutation(self.per_epoch) * self.block_size
            for old in list(self._epochs)[:-2]:  # a batch can span two epochs
                del self._epochs[old]
        return self._epochs[epoch]

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples first .. first + count - 1: (x, y), each (count, block_size) int64, y one token further than x."""
        epoch, i = np.divmod(np.arange(first, first + count), self.per_epoch)
        starts = np.concatenate([self._starts(e)[i[epoch == e]] for e in range(epoch[0], epoch[-1] + 1)])
        window = self.tokens.gather(starts, self.block_size + 1)
        return window[:, :-1].copy(), window[:, 1:].copy()


def eval_blocks(tokens: Tokens, block_size: int, count: int) -> np.ndarray:
    """Starts, int64, of at most `count` blocks spread evenly over the split: always the same, none overlapping another.

    A block is block_size inputs and the token after them: `tokens.gather(starts, block_size + 1)`. DataError where not even one fits.
    """
    available = (len(tokens) - 1) // block_size
    if available < 1:
        raise DataError(f"the {tokens.split} split of {tokens.folder} has {len(tokens)} tokens, fewer than one block and one more "
                        f"({block_size + 1}): lower block_size={block_size} or give a longer text")
    n = min(count, available)
    return np.arange(n) * available // n * block_size
