"""Checkpoints: plain dictionaries, written atomically, read without executing anything in them."""
import os
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from engine.options import UserError


def save(path: Path, state: dict):
    """Write beside `path`, fsync, rename: whatever happens, `path` is either the old checkpoint or the new one. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as e:  # torch.save turns a failed write into a RuntimeError, with the OSError as its cause or context
        temporary.unlink(missing_ok=True)
        reason = next((x for x in (e, e.__cause__, e.__context__) if isinstance(x, OSError)), None)
        if reason is None and not str(e).startswith("[enforce fail at inline_container"):
            raise
        remedy = f"; the previous {path.name} is intact. Make room and use --init_from=resume" if path.exists() else ". Make room first"
        raise UserError(f"cannot save {path}: {reason.strerror if reason else 'the write failed'}{remedy}") from e


def read(path: Path) -> dict:
    """The checkpoint at `path`, on the CPU. Raises UserError where it is missing, truncated, or holds anything but tensors and plain values."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load does not look at the checksums
                    raise ValueError("a checksum differs")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: train first, or name the run's folder with --out_dir") from None
    except pickle.UnpicklingError as e:
        raise UserError(f"{path} is refused: it is damaged or holds something other than tensors and plain values ({first_line(e)})") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, struct.error, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is not a readable checkpoint (truncated or damaged: {first_line(e)})") from None


def choose(folder: Path, best: bool) -> Path:
    """The path of the best checkpoint in a run's folder, where one is wanted and there; else of the latest."""
    return folder / ("best.pt" if best and (folder / "best.pt").exists() else "ckpt.pt")


def read_language_model(folder: Path, best: bool) -> dict:
    """`choose` and `read`, for a run of train.py. Raises UserError where it is another script's."""
    saved = read(choose(folder, best))
    if "tokenizer" not in saved.get("task", {}):
        raise UserError(f"{folder} holds no language model of train.py")
    return saved


def first_line(e: Exception) -> str:
    text = str(e).strip().splitlines() or [type(e).__name__]
    return text[0][:120]


def restore_model(model: torch.nn.Module, task, saved: dict, folder: Path):
    """Load a checkpoint's weights. Raises UserError where it belongs to other data or another model."""
    if saved["task"] != task.state():
        raise UserError(f"the data is not what the run in {folder} was trained on: restore it, or start anew in another --out_dir")
    load_weights(model, saved["model"], f"the checkpoint in {folder}")


def load_weights(model: torch.nn.Module, state: dict, source: object):
    """model.load_state_dict with one line for what does not fit. Raises UserError."""
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        lines = [line.strip() for line in str(e).splitlines()[1:]]
        raise UserError(f"{source} does not fit this model: {lines[0] if lines else e}") from None
