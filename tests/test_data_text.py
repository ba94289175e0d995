"""data/text.py: how a text becomes a prepared folder, and what bad input gets."""
import bz2
import copy
import gzip
import hashlib
import io
import json
import lzma
import random
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data import text, tokens
from data.text import Blocks, Tokens, load_tokenizer, prepare, read_meta
from engine.options import DataError
from prepared_text import MIXED, everything, write

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("tokenizer", ["char", "bytes", "gpt2"])
@pytest.mark.parametrize("chunk", [3, 64, 2**20])
def test_text_is_split_at_nine_tenths_and_pieces_change_nothing(tmp_path, monkeypatch, request,
                                                               tokenizer, chunk):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2")
    monkeypatch.setattr(text, "CHUNK", chunk)
    folder = prepare(write(tmp_path / "mixed.txt", MIXED), tmp_path / "data", tokenizer)
    meta = read_meta(folder)
    whole = load_tokenizer(meta)
    cut = int(0.9 * len(MIXED))
    for split, part in ("train", MIXED[:cut]), ("val", MIXED[cut:]):
        assert everything(folder, split) == whole.encode(part)
        assert Tokens(folder, split).bytes == len(part.encode())
        stored = meta["splits"][split]
        content = b"".join((folder / shard["file"]).read_bytes() for shard in stored["shards"])
        assert stored["sha256"] == hashlib.sha256(content).hexdigest()
        assert content == np.array(whole.encode(part), "<u2").tobytes()
    assert meta["vocab_size"] == whole.vocab_size and meta["dtype"] == "<u2"


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_pieces_of_awkward_texts_have_the_tokens_of_the_whole(tmp_path, monkeypatch, gpt2, chunk):
    monkeypatch.setattr(text, "CHUNK", chunk)
    texts = [" " * 501, "\n" * 501, "a" * 501, "a\n" * 250, "\t \n" * 200, "日本" * 150,
             "a1," * 99]
    draw = random.Random(chunk)
    for alphabet in (" \n\t\raB'1.é日", " \na", "  \n\n\x1c\xa0\u2003!", "a'sll1 "):
        texts += ["".join(draw.choices(alphabet, k=300)) for _ in range(20)]
    for content in texts:
        path = Path(write(tmp_path / "awkward.txt", content))
        for start, stop in (0, len(content)), (7, len(content) - 5):
            pieces = list(text._slice(path, start, stop))
            assert "".join(pieces) == content[start:stop]
            ids = [i for piece in pieces for i in gpt2.encode(piece)]
            assert ids == gpt2.encode(content[start:stop]), content


@pytest.mark.parametrize("unit", [" ", "\n", "a", "\t\r"])
def test_text_without_a_place_to_cut_is_searched_once(tmp_path, monkeypatch, unit):
    searched = 0
    cut = text.CUT

    class Counting:
        def match(self, rest, start):
            nonlocal searched
            searched += len(rest) - start
            return cut.match(rest, start)

    monkeypatch.setattr(text, "CUT", Counting())
    monkeypatch.setattr(text, "CHUNK", 2**10)
    path = Path(write(tmp_path / "long.txt", unit * (2**16 // len(unit))))
    assert sum(map(len, text._slice(path, 0, 2**16))) == 2**16
    assert searched <= 2**16 + 2**6  # a character more for each of 64 pieces


def test_text_without_a_space_is_read_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 10)
    monkeypatch.setattr(text, "LONGEST", 160)
    path = Path(write(tmp_path / "dna.txt", "ACGT" * 500))
    pieces = list(text._slice(path, 100, 1900))
    assert "".join(pieces) == "ACGT" * 450 and max(map(len, pieces)) == 170


def test_prepared_once_and_anew_when_the_file_changes(tmp_path, capsys):
    path = write(tmp_path / "my.text.txt", "abc" * 50)
    first = prepare(path, tmp_path / "data")
    assert capsys.readouterr().out.count("\n") == 1
    assert first.name.startswith("my.text-") and first.name.endswith("_char")
    before = (first / "meta.json").stat().st_mtime_ns
    assert prepare(path, tmp_path / "data", "char") == first and capsys.readouterr().out == ""
    assert (first / "meta.json").stat().st_mtime_ns == before
    others = {prepare(path, tmp_path / "data", "bytes")}
    others.add(prepare(write(tmp_path / "my.text.txt", "abd" * 50), tmp_path / "data"))
    assert len(others | {first}) == 3
    long = prepare(write(tmp_path / f"{60 * chr(0x4e66)}.txt", "abc" * 50), tmp_path / "data")
    assert long.exists() and long.name.startswith(50 * chr(0x4e66) + "-")


def test_killed_preparation_is_done_again(tmp_path, capsys):
    path = write(tmp_path / "a.txt", "some text " * 30)
    code = ("import os, sys; sys.path.insert(0, sys.argv[1])\n"
            "from data import text, tokens\n"
            # dies when the tokens are written, before meta.json and the rename
            "text.make_meta = lambda *args: os._exit(9)\n"
            "text.prepare(sys.argv[2], sys.argv[3])")
    command = [sys.executable, "-c", code, str(ROOT), path, str(tmp_path / "data")]
    killed = subprocess.run(command, capture_output=True)
    left = list((tmp_path / "data" / ".tmp").glob("*/train_*.bin"))
    assert killed.returncode == 9 and left
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".tmp"]
    left[0].write_bytes(b"rubbish")
    folder = prepare(path, tmp_path / "data")
    decode = load_tokenizer(read_meta(folder)).decode
    assert decode(everything(folder, "train")) == ("some text " * 30)[:270]
    assert not [p for p in (tmp_path / "data" / ".tmp").iterdir() if p.is_dir()]


def test_two_preparations_at_once_make_one_folder(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "some text " * 3000)
    original = text._write_text
    made = []
    monkeypatch.setattr(text, "_write_text", lambda *args: made.append(args) or original(*args))
    folders = []

    def work():
        folders.append(prepare(path, tmp_path / "data"))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(folders) == 4 and len(set(folders)) == 1
    assert len(everything(folders[0], "train")) == 27000


@pytest.mark.parametrize("content, words", [
    (None, r"dataset '.*' is not a file: .* shakespeare, tinyshakespeare, tinystories"),
    (b"", "is empty"),
    ("a directory", "Is a directory"),
    ("ab日".encode() * 3 + b"\xff\n", "byte 15 is 0xff"),
    ("ab日".encode()[:-1], "byte 2 is 0xe6"),
])
@pytest.mark.parametrize("chunk", [4, 2**20])
def test_files_that_are_no_text_are_one_line(tmp_path, monkeypatch, content, words, chunk):
    monkeypatch.setattr(text, "CHUNK", chunk)
    path = tmp_path / "input.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(DataError, match=words) as error:
        prepare(str(path), tmp_path / "data")
    assert "\n" not in str(error.value) and "input.txt" in str(error.value)
    assert [p.name for p in (tmp_path / "data").glob("*")] in ([], [".tmp"])


ZIPPED = io.BytesIO()
with zipfile.ZipFile(ZIPPED, "w") as zipped:
    zipped.writestr("a.txt", MIXED)
TARRED = io.BytesIO()
with tarfile.open(fileobj=TARRED, mode="w") as tarred:
    tarred.addfile(tarfile.TarInfo("a.txt"))


@pytest.mark.parametrize("content, words", [
    (gzip.compress(MIXED.encode()), "gzip data: unpack it with gunzip"),
    (bz2.compress(MIXED.encode()), "bzip2 data: unpack it with bunzip2"),
    (lzma.compress(MIXED.encode()), "xz data: unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd rest", "zstandard data: unpack it with unzstd"),
    (ZIPPED.getvalue(), "a zip archive or an office document: unpack it with unzip"),
    (TARRED.getvalue(), "a tar archive: unpack it with tar -xf"),
    (b"%PDF-1.7\n", "a PDF: convert it with pdftotext"),
    (b"PAR1\x15\x04", "a parquet file: write its column of text"),
    (MIXED.encode("utf-16"), "UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff" + MIXED.encode("utf-16be"), "UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
    (MIXED.encode("utf-16le"), "UTF-16: convert it with iconv -f UTF-16LE -t UTF-8"),
    (MIXED.encode("utf-16be"), "UTF-16: convert it with iconv -f UTF-16BE -t UTF-8"),
    (MIXED.encode("utf-32"), "UTF-32: convert it with iconv -f UTF-32 -t UTF-8"),
    (bytes(1000), "zero bytes: copy or download it again"),
])
def test_other_formats_are_named_with_their_remedy(tmp_path, content, words):
    path = tmp_path / "input.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        prepare(str(path), tmp_path / "data")
    assert str(error.value).startswith(f"{path} is not UTF-8 text but {words}")


def test_a_byte_order_mark_is_not_a_character(tmp_path):
    mark = b"\xef\xbb\xbf"
    path = tmp_path / "marked.txt"
    path.write_bytes(mark + MIXED.encode())
    folder = prepare(str(path), tmp_path / "data")
    plain = prepare(write(tmp_path / "plain.txt", MIXED), tmp_path / "data")
    assert hashlib.sha256(mark + MIXED.encode()).hexdigest()[:12] in folder.name
    assert read_meta(folder) == read_meta(plain)  # the same characters, tokens, bytes and sha256
    path.write_bytes(mark + b"ab\xff")
    with pytest.raises(DataError, match="byte 5 is 0xff"):
        prepare(str(path), tmp_path / "data")
    path.write_bytes(mark)
    with pytest.raises(DataError, match="is empty"):
        prepare(str(path), tmp_path / "data")
    inside = prepare(write(tmp_path / "inside.txt", "a\ufeffb"), tmp_path / "data")
    assert "\ufeff" in read_meta(inside)["tokenizer"]["chars"]


def test_full_disk_and_damaged_folders_are_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "some text " * 30)

    def full(*args):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(tokens.Writer, "write", full)
        with pytest.raises(DataError, match="cannot prepare .*a.txt in .*No space left"):
            prepare(path, tmp_path / "data")
    assert not [p for p in (tmp_path / "data" / ".tmp").iterdir() if p.is_dir()]
    folder = prepare(path, tmp_path / "data")
    (folder / "train_00000.bin").write_bytes(b"short")
    words = r"train_00000.bin is missing or damaged \(540 bytes expected\): remove"
    with pytest.raises(DataError, match=words):
        Tokens(folder, "train")
    (folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match="no readable meta.json: remove"):
        prepare(path, tmp_path / "data")


def overwrite(path: Path, at: int, ids: list[int]):
    """Put ids in place of others, as a copy that went wrong would: the size stays."""
    with open(path, "r+b") as file:
        file.seek(2 * at)
        file.write(np.array(ids, "<u2").tobytes())


def claim(folder: Path, split: str, **values):
    """Change what meta.json says of a split."""
    meta = read_meta(folder)
    meta["splits"][split] |= values
    (folder / "meta.json").write_text(json.dumps(meta))


def test_files_that_changed_in_place_are_refused(tmp_path):
    folder = prepare(write(tmp_path / "a.txt", "some text " * 30), tmp_path / "data")
    Tokens(folder, "train")
    overwrite(folder / "train_00000.bin", 100, [3, 3])
    words = "train tokens in .* are not those that were prepared .*: remove .* and prepare it again"
    with pytest.raises(DataError, match=words):
        Tokens(folder, "train")
    Tokens(folder, "val")


def test_files_that_may_not_be_read_are_one_line(tmp_path, monkeypatch):
    folder = prepare(write(tmp_path / "a.txt", "some text " * 30), tmp_path / "data")

    def memmap(*args):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(np, "memmap", memmap)
    with pytest.raises(DataError, match=r"train tokens in .* cannot be read \(Permission denied\)"):
        Tokens(folder, "train")


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    folder = prepare(write(tmp_path / "a.txt", "some text " * 30), tmp_path / "data")
    overwrite(folder / "val_00000.bin", 7, [7])
    content = (folder / "val_00000.bin").read_bytes()
    claim(folder, "val", sha256=hashlib.sha256(content).hexdigest())
    words = "val tokens in .* hold 7, outside the vocabulary of 7: remove"
    with pytest.raises(DataError, match=words):
        everything(folder, "val")


def test_of_a_large_split_a_sample_is_checked(tmp_path, monkeypatch):
    for name, value in ("WHOLE", 500), ("PIECES", 3), ("PIECE", 10), ("SHARD", 100):
        monkeypatch.setattr(tokens, name, value)
    folder = prepare(write(tmp_path / "a.txt", "some text " * 30), tmp_path / "data")
    ids = everything(folder, "train")  # 270 of two bytes: more than WHOLE
    sample = np.array(ids[:10] + ids[130:140] + ids[260:], "<u2")
    stored = read_meta(folder)["splits"]
    assert stored["train"]["sample"] == hashlib.sha256(sample).hexdigest()
    assert "sample" not in stored["val"]
    overwrite(folder / "train_00001.bin", 50, [999])  # between the pieces
    with pytest.raises(DataError, match="hold 999, outside the vocabulary of 7"):
        Blocks(Tokens(folder, "train"), 10, 0).batch(0, 25)
    overwrite(folder / "train_00001.bin", 35, [3])  # in the second piece
    with pytest.raises(DataError, match="train tokens in .* are not those that were prepared"):
        Tokens(folder, "train")
    meta = read_meta(folder)  # of an older version: there is nothing to compare with
    del meta["splits"]["train"]["sample"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert Tokens(folder, "train").gather(np.array([135]), 1) == [[3]]


OTHERS = (None, -1, 6, 0.5, True, "7", "../a", "\0", [], ["name"], {}, {"train": 7}, 10**30)


def changes(value):
    """Every copy of a value out of JSON in which one part is missing or something else."""
    parts = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, part in parts:
        for other in OTHERS:
            changed = copy.copy(value)
            changed[key] = other
            yield changed
        changed = copy.copy(value)
        del changed[key]
        yield changed
        if isinstance(part, dict | list):
            for inner in changes(part):
                changed = copy.copy(value)
                changed[key] = inner
                yield changed


def test_a_garbled_meta_is_one_line(tmp_path):
    path = write(tmp_path / "a.txt", "some text " * 30)
    folder = prepare(path, tmp_path / "data")
    refused = 0
    for meta in [[], 7, None, *changes(read_meta(folder))]:
        (folder / "meta.json").write_text(json.dumps(meta))
        try:
            train = Tokens(prepare(path, tmp_path / "data"), "train")
            val = Tokens(folder, "val")
        except DataError as error:
            message = str(error).replace("the folder", str(folder))
            assert "\n" not in message and f"remove {folder} and prepare" in message
            refused += 1
        else:  # what nothing depends on
            assert (len(train), len(val), train.meta["vocab_size"]) == (270, 30, 7)
    assert refused > 250


def test_command_line(tmp_path, monkeypatch):
    def run(*args):
        command = [sys.executable, str(ROOT / "data" / "text.py"), *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    write(tmp_path / "a.txt", "some text " * 30)
    done = run("a.txt", "--tokenizer=bytes")
    assert done.returncode == 0, done.stderr
    assert "vocabulary 256" in done.stdout and "270 tokens of 270 bytes" in done.stdout
    missing = run("b.txt", "--data_dir", "other")
    assert missing.returncode == 2 and missing.stdout == ""
    assert missing.stderr.startswith("text.py: error: dataset 'b.txt' is not a file")
    assert missing.stderr.count("\n") == 1 and not (tmp_path / "other").exists()
    assert run("--help").returncode == 0
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    shown = run(write(tmp_path / "täglich.txt", "some text " * 30))
    assert shown.returncode == 0 and "t?glich-" in shown.stdout, shown.stderr
