"""data/archives.py: archives and folders as users have them, touched, damaged or hostile."""
import gzip
import io
import os
import tarfile

import pytest

from data.lra import prepare
from engine.options import DataError
from lra_archives import RELEASES, archive, imdb_files, listops_files, stored, unpack


@pytest.mark.parametrize("task", RELEASES)
def test_what_file_managers_leave_behind_is_never_read(task, tmp_path):
    files = RELEASES[task]()
    left = {}
    for name, content in files.items():
        folder, _, file = name.rpartition("/")
        left[f"{folder}/._{file}"] = left[f"{folder}/.hidden/{file}"] = b"\0\5\26\7" + content
        left[f"__MACOSX/{folder}/._{file}"] = left[f"__MACOSX/{name}"] = b"\0\5\26\7"
        left[f"{folder}/Thumbs.db"] = left[f"{folder}/.DS_Store"] = b"\0\0\0\1Bud1"
        stem, dot, suffix = file.partition(".")
        left[f"{folder}/{stem} copy{dot}{suffix}"] = left[f"{folder}/{file}~"] = content
    clean = stored(prepare(task, tmp_path / "data", source=archive(tmp_path / "clean.tar", files)))
    touched = {**left, **files}
    for source in (archive(tmp_path / "touched.tar.gz", touched),
                   unpack(tmp_path / "touched", touched)):
        assert stored(prepare(task, tmp_path / "data", source=source)) == clean


def test_a_file_that_is_there_twice(tmp_path):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name, content in [*listops_files().items()][:1] * 2:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match="holds basic_train.tsv twice"):
        prepare("listops", tmp_path / "data", source=tmp_path / "twice.tar")


def member(name="aclImdb/train/pos/0_9.txt", size=0, **fields):
    """The 512 bytes before a file in a tar; sizes that octal digits cannot hold are binary."""
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT)


def sparse():
    """A file of 8 GB, of which one block is not a hole."""
    header = bytearray(member(size=512, type=tarfile.GNUTYPE_SPARSE))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % (2**33 - 1)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("content, words", [
    (member("/aclImdb/train/pos/0_9.txt"), "'/aclImdb/train/pos/0_9.txt' would lie outside"),
    (member("../aclImdb/train/pos/0_9.txt"), "would lie outside"),
    (member("aclImdb/train/pos/../../0_9.txt"), "would lie outside"),
    (member(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "0_9.txt' is a link, a device or"),
    (member(type=tarfile.LNKTYPE, linkname="aclImdb/train/pos/1_9.txt"), "is a link, a device or"),
    (member(type=tarfile.CHRTYPE), "is a link, a device or"),
    (member(type=tarfile.FIFOTYPE), "is a link, a device or"),
    (sparse(), "or sparse"),
    (member(size=2**60) + b"x" * 5000, "is not a complete archive .unexpected end of data"),
    (member(size=-1024), "is not a complete archive"),
    (member(pax_headers={"GNU.sparse.map": "a"}), "is not a complete archive .a broken header"),
    (member(size=2**24) + bytes(2**24), "bytes inflate to over "),
    (member("././@LongLink", 2**24, type=tarfile.GNUTYPE_LONGNAME) + bytes(2**24), "inflate"),
    (member(size=2**24, type=tarfile.XHDTYPE) + bytes(2**24), "inflate to over"),
    (member() + bytes(2**24), "inflate to over"),
])
def test_hostile_archives_end_in_one_line(content, words, tmp_path, monkeypatch):
    monkeypatch.setattr("data.archives.INFLATED", 2**20)
    source = tmp_path / "aclImdb_v1.tar.gz"
    source.write_bytes(gzip.compress(content + bytes(1024)))
    with pytest.raises(DataError, match=words) as error:
        prepare("text", tmp_path / "data", source=source)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not list((tmp_path / "data").glob("lra*"))


def test_truncated_and_broken_archives(tmp_path):
    """Wherever it is cut off: in the middle of a member, or just short of the end."""
    files = {**imdb_files(), "aclImdb/zzz": os.urandom(5000)}
    source = archive(tmp_path / "aclImdb_v1.tar.gz", files)
    whole = source.read_bytes()
    broken = whole[:2000] + b"\0" * 50 + whole[2050:]
    cut = whole[:300], whole[:len(whole) // 2], whole[:-4]
    for content in *cut, broken, b"", b"<html>not found</html>":
        source.write_bytes(content)
        with pytest.raises(DataError, match="aclImdb_v1.tar.gz is not a complete archive "
                                            ".*download it again") as error:
            prepare("text", tmp_path / "data", source=source)
        assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".tmp"]


def test_pipes_are_not_waited_for(tmp_path):
    files = listops_files("")
    del files["listops-1000/basic_test.tsv"]
    unpack(tmp_path, files)
    os.mkfifo(tmp_path / "listops-1000/basic_test.tsv")
    with pytest.raises(DataError, match="lacks listops-1000/basic_test.tsv"):
        prepare("listops", tmp_path / "data", source=tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="there is no .*pipe that is a file or a folder"):
        prepare("listops", tmp_path / "data", source=tmp_path / "pipe")
