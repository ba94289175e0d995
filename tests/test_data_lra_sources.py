"""data/lra_sources.py: each reader on a small archive of the released form, and the generated
tasks, through prepare."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lra_archives as made
from data import listops
from data.lra import SPLITS, load, prepare
from engine.options import DataError
from lra_archives import archive, stored, unpack

# ListOps as released: header, CRLF, nested binary pairs


def test_listops_released(tmp_path):
    assert made.nested("[MAX 3 4 ]") == "( ( ( [MAX 3 ) 4 ) ] )"
    expected = {split: [(int(float(label)), listops.tokenize(text))
                        for text, label in trees] for split, trees in made.TREES.items()}
    others = {"lra_release/lra_release/tsv_data/readme.txt": b"text",
              "lra_release/my-listops-1000/basic_train.tsv": b"x"}
    for source in (archive(tmp_path / "lra_release.gz", {**others, **made.listops_files()}),
                   archive(tmp_path / "plain.tar", made.listops_files("./"), compress=False),
                   unpack(tmp_path / "unpacked", made.listops_files()),
                   tmp_path / "unpacked/lra_release/lra_release/listops-1000"):
        folder = prepare("listops", tmp_path / "data", source=source)
        assert stored(folder) == expected
    meta, splits = load(folder)
    assert meta["counts"] == {"train": 3, "val": 1, "test": 2}
    assert meta["classes"] == 10 and meta["vocab_size"] == 15
    assert meta["baselines"] == {"majority": {"val": 0, "test": 0}, "root": {"val": 0, "test": 0}}
    assert splits["test"].labels.tolist() == [9, 2]


@pytest.mark.parametrize("make", [archive, unpack])
def test_a_source_that_changed_is_noticed(make, tmp_path):
    source = make(tmp_path / "source", made.listops_files(""))
    folder = prepare("listops", tmp_path / "data", source=source)
    assert prepare("listops", tmp_path / "data", source=source) == folder
    changed = source if source.is_file() else source / "listops-1000/basic_val.tsv"
    os.utime(changed, (1, 1))
    with pytest.raises(DataError, match="source has changed since .* was made of it: delete"):
        prepare("listops", tmp_path / "data", source=source)
    source.rename(tmp_path / "gone")  # the prepared folder is enough
    assert prepare("listops", tmp_path / "data", source=source) == folder


def test_listops_of_two_copies_the_inner_folder_and_the_first_in_an_archive(tmp_path):
    other = {split: [("[MAX 0 0 ]", "0")] for split in SPLITS}
    both = {**made.listops_files("lra_release/", other), **made.listops_files()}
    unpacked = prepare("listops", tmp_path, source=unpack(tmp_path / "unpacked", both))
    assert len(stored(unpacked)["train"]) == 3
    packed = prepare("listops", tmp_path, source=archive(tmp_path / "a.gz", both))
    assert len(stored(packed)["train"]) == 1
    half = dict(both)
    del half["lra_release/listops-1000/basic_val.tsv"]
    # never one copy's train with another's test
    with pytest.raises(DataError, match="lacks listops-1000/basic_val.tsv"):
        prepare("listops", tmp_path, source=archive(tmp_path / "half.gz", half))


@pytest.mark.parametrize("line, words", [
    ("( ( [MAX 3 ) ] )\t10", r"basic_val.tsv, line 2: label b'10' is not one of 0 to 9"),
    ("( ( [MAX 3 ) ] )\t1.5", "line 2: label b'1.5'"),
    ("( ( [MAX 3 ) ] )\tnan", "line 2: label b'nan'"),
    ("( ( [AVG 3 ) ] )\t3", "line 2: .*unknown symbol"),
    ("( ( [MAX 3 ) ] )", "line 2: expected an expression, a tab and a label"),
])
def test_listops_wrong_lines(tmp_path, line, words):
    files = made.listops_files("")
    files["listops-1000/basic_val.tsv"] = f"Source\tTarget\r\n{line}\r\n".encode()
    with pytest.raises(DataError, match=words) as error:
        prepare("listops", tmp_path / "data", source=unpack(tmp_path, files))
    assert "\n" not in str(error.value) and not list((tmp_path / "data").glob("lra*"))


def test_listops_missing_file_header_and_source(tmp_path):
    files = made.listops_files("")
    del files["listops-1000/basic_test.tsv"]
    for source in unpack(tmp_path / "unpacked", files), archive(tmp_path / "archive.gz", files):
        with pytest.raises(DataError, match=r"lacks listops-1000/basic_test.tsv.*lra_release.gz"):
            prepare("listops", tmp_path, source=source)
    files["listops-1000/basic_train.tsv"] = b"1\t2\r\n"
    with pytest.raises(DataError, match="basic_train.tsv, line 1: expected the header"):
        prepare("listops", tmp_path, source=unpack(tmp_path / "unpacked", files))
    with pytest.raises(DataError, match="there is no .*nowhere"):
        prepare("listops", tmp_path, source=tmp_path / "nowhere")


# IMDb as released


def test_text_archive_and_folder_give_the_same(tmp_path):
    files = made.imdb_files()
    packed = prepare("text", tmp_path / "a", block_size=100, source=archive(
        tmp_path / "aclImdb_v1.tar.gz", dict(reversed(files.items()))))
    unpack(tmp_path / "b", files)
    found = prepare("text", tmp_path / "b", block_size=100)  # found in data_dir
    result = stored(found)
    assert result == stored(packed) and [len(result[split]) for split in SPLITS] == [18, 2, 20]
    train = {name: content[:100] for name, content in files.items()
             if "train/pos" in name or "train/neg" in name}
    expected = sorted((int("/pos/" in name), content) for name, content in train.items())
    assert sorted(result["train"] + result["val"]) == expected
    meta, _ = load(found)
    longer = [name for name, content in files.items() if "/test/" in name and len(content) > 100]
    assert meta["cut"]["test"] == len(longer) > 0
    assert stored(prepare("text", tmp_path / "b", block_size=100, seed=1))["val"] != result["val"]


def test_text_incomplete(tmp_path):
    files = made.imdb_files()
    files["aclImdb/test/neg/3_2.txt"] = b""
    source = unpack(tmp_path / "empty", files)
    meta, splits = load(prepare("text", tmp_path / "data", source=source))
    assert len(splits["test"]) == 19 and meta["skipped"] == {"train": 0, "val": 0, "test": 1}
    del files["aclImdb/test/neg/3_2.txt"]
    with pytest.raises(DataError, match="test holds 10 positive and 9 negative"):
        prepare("text", tmp_path / "data", source=archive(tmp_path / "a.tar.gz", files))
    with pytest.raises(DataError, match=r"download aclImdb_v1.tar.gz \(80 MiB\) from "
                                        "https://ai.stanford.edu.* into .*data.*--source"):
        prepare("text", tmp_path / "data")


# Retrieval as released


def test_retrieval(tmp_path):
    source = archive(tmp_path / "lra_release.gz", made.retrieval_files())
    folder = prepare("retrieval", tmp_path, source=source, block_size=20)
    expected = [(1, b"first text", b"second one"), (0, b'"quoted, not closed', b"x" * 20),
                (1, b"a", b"b")]
    assert stored(folder) == dict.fromkeys(SPLITS, expected)
    meta, splits = load(folder)
    assert meta["towers"] == 2 and meta["cut"]["val"] == meta["skipped"]["val"] == 1
    x, mask, y = splits["val"].batch([2, 0])
    assert x.shape == mask.shape == (2, 2, 10)
    assert mask.sum(-1).tolist() == [[1, 1], [10, 10]] and y.tolist() == [1, 1]


@pytest.mark.parametrize("line, words", [
    (b"2\t1\t2\ta\tb", "new_aan_pairs.train.tsv, line 1: label b'2' is not one of 0 to 1"),
    (b"1\t1\t2\ta", "line 1: expected label, id1, id2, text1, text2 with tabs between them, "
                     "got 4 fields"),
    (b"x" * 2000, "line longer than 1,000 bytes"),
])
def test_retrieval_wrong_lines(tmp_path, line, words, monkeypatch):
    monkeypatch.setattr("data.archives.LONGEST_LINE", 1000)
    with pytest.raises(DataError, match=words):
        prepare("retrieval", tmp_path, source=unpack(tmp_path, made.retrieval_files([line])))


@pytest.mark.slow
def test_retrieval_is_streamed(tmp_path):
    """60 MB of pairs must not make the process 60 MB larger."""
    line = b"1\t1\t2\t" + b"a" * 30_000 + b"\t" + b"b" * 30_000
    source = unpack(tmp_path, made.retrieval_files([line]))
    large = source / "lra_release/lra_release/tsv_data/new_aan_pairs.train.tsv"
    large.write_bytes((line + b"\n") * 1000)
    code = """if True:
        import resource, sys
        from data.lra import prepare
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        prepare("retrieval", sys.argv[1], source=sys.argv[1])
        print(peak() - before)"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                          text=True, cwd=Path(__file__).parents[1])
    assert int(done.stdout.split()[-1]) < 30_000, done.stderr  # KiB


# Pathfinder


def test_pathfinder_released(tmp_path):
    files, samples = made.pathfinder_files()
    empty = "lra_release/lra_release/pathfinder32/curv_contour_length_14/imgs/1/sample_7.png"
    outside = empty.replace("imgs/1/", "imgs/" + 3 * "../")
    source = archive(tmp_path / "lra_release.gz", {**files, empty: b"", outside: b"outside"})
    with pytest.raises(DataError, match="imgs.* would lie outside"):
        prepare("pathfinder", tmp_path / "a", source=source)
    source = archive(tmp_path / "lra_release.gz", {**files, empty: b""})
    folder = prepare("pathfinder", tmp_path / "a", source=source)
    assert not list(tmp_path.rglob("sample_7.png"))
    result = stored(folder)
    source = unpack(tmp_path, {**files, empty: b""})
    assert result == stored(prepare("pathfinder", tmp_path / "b", source=source))
    assert sum(map(len, result.values())) == 19
    assert len(result["train"]) in (15, 16) and len(result["test"]) in (1, 2)
    read = [sample for split in SPLITS for sample in result[split]]
    assert sorted(read) == sorted(samples[:7] + samples[8:])
    assert sum(load(folder)[0]["skipped"].values()) == 1 and not (folder / "scratch").exists()


def test_pathfinder_of_another_size(tmp_path):
    files, _ = made.pathfinder_files(size=16)
    files = {name.replace("pathfinder16", "pathfinder32"): content
             for name, content in files.items()}
    with pytest.raises(DataError, match="16 x 16 pixels, mode L, expected 1024"):
        prepare("pathfinder", tmp_path, source=unpack(tmp_path, files))
    with pytest.raises(DataError, match="lacks pathfinder128/curv_contour_length_14/metadata"):
        prepare("pathx", tmp_path, source=archive(tmp_path / "lra_release.gz", files))


def test_pathfinder_generated(tmp_path, monkeypatch):
    easy = dict(train=7, val=3, test=3, contour_length=4, distractors=0)
    once = stored(prepare("pathfinder", tmp_path / "a", generate=easy))
    assert [len(once[split]) for split in SPLITS] == [7, 3, 3]
    assert len({image for split in SPLITS for _, image in once[split]}) == 13
    assert once == stored(prepare("pathfinder", tmp_path / "b", generate=easy))
    monkeypatch.setattr("data.lra_sources.GENERATED_AT_ONCE", 4 * 1024)
    pieces = stored(prepare("pathfinder", tmp_path / "c", generate=easy))
    assert len({image for split in SPLITS for _, image in pieces[split]}) == 13
    assert pieces["train"][:4] == once["train"][:4]
    large = prepare("pathx", tmp_path / "a", generate=dict(train=1, val=1, test=1))
    x, mask, _ = load(large)[1]["train"].batch([0])
    assert x.shape == (1, 128**2) and mask.all()
    with pytest.raises(DataError, match="no option seed=3; take .*contour_length"):
        prepare("pathfinder", tmp_path, generate=dict(seed=3))
