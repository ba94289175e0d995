"""checkpoint.py: atomic saving, and reading that executes nothing."""
import os
import resource

import pytest
import torch

from engine import checkpoint, options
from engine.options import UserError


def test_round_trip(tmp_path):
    state = {"model": {"w": torch.randn(3)}, "config": {"n_head": 2}, "best": None,
             "ranks": [{"random": torch.get_rng_state()}]}
    checkpoint.save(tmp_path / "c.pt", state)
    read = checkpoint.read(tmp_path / "c.pt")
    assert torch.equal(read["model"]["w"], state["model"]["w"])
    assert torch.equal(read["ranks"][0]["random"], state["ranks"][0]["random"])
    assert read["config"] == {"n_head": 2} and read["best"] is None
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def locked(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(torch, "load", locked)
    (tmp_path / "ckpt.pt").write_bytes(b"")
    with pytest.raises(UserError, match="^cannot read .*ckpt.pt: Permission denied$"):
        checkpoint.read(tmp_path / "ckpt.pt")


def test_failing_write_leaves_the_previous_checkpoint(tmp_path, capsys):
    """A file-size limit makes the operating system refuse the write, as a full disk does."""
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1})
    state = {"step": 2, "w": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(SystemExit) as e:
            options.run(lambda: checkpoint.save(path, state))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert e.value.code == 2 and len(said.splitlines()) == 1
    assert "the previous c.pt is intact" in said
    assert checkpoint.read(path) == {"step": 1} and os.listdir(tmp_path) == ["c.pt"]


def test_a_folder_in_the_place_of_the_temporary_file(tmp_path):
    (tmp_path / "c.pt.tmp").mkdir()
    with pytest.raises(UserError, match="c.pt.tmp is a folder. Move it away and go on"):
        checkpoint.save(tmp_path / "c.pt", {"step": 1})


def test_truncated(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {"w": torch.zeros(1000)})
    whole = (tmp_path / "c.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "c.pt").write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a readable checkpoint|is refused"):
            checkpoint.read(tmp_path / "c.pt")


def test_one_flipped_bit(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {"w": torch.zeros(1000)})
    whole = bytearray((tmp_path / "c.pt").read_bytes())
    at = whole.index(bytes(4000)) + 2000
    whole[at] ^= 1
    (tmp_path / "c.pt").write_bytes(whole)
    with pytest.raises(UserError, match="a checksum differs"):
        checkpoint.read(tmp_path / "c.pt")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickle_payload_is_never_executed(tmp_path):
    torch.save({"config": Payload(str(tmp_path / "executed"))}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="is refused"):
        checkpoint.read(tmp_path / "c.pt")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "c.pt", weights_only=False)  # the payload does work
    assert (tmp_path / "executed").exists()


def test_missing(tmp_path):
    with pytest.raises(UserError, match="no checkpoint .*c.pt: train first"):
        checkpoint.read(tmp_path / "c.pt")


def test_weights_of_another_shape():
    with pytest.raises(UserError, match="run.pt does not fit this model: .*weight"):
        checkpoint.load_weights(torch.nn.Linear(2, 3), torch.nn.Linear(2, 4).state_dict(), "run.pt")
