"""Checkpoint files: plain dictionaries, written atomically, read without executing anything."""
import os
import pickle
import struct
import textwrap
import zipfile
from pathlib import Path

import torch

from engine.options import UserError


def save(path: Path, state: dict):
    """Write beside `path`, fsync, rename. Raises UserError.

    Whatever happens, `path` is either the old checkpoint or the new one.
    """
    temporary = path.with_name(path.name + ".tmp")
    if temporary.is_dir():
        raise UserError(f"cannot save {path}: {temporary} is a folder. Move it away and go on")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        # torch.save turns a failed write into a RuntimeError, with the OSError as its cause or
        # context, or with neither and this message.
        failures = [x for x in (e, e.__cause__, e.__context__) if isinstance(x, OSError)]
        if not failures and not str(e).startswith("[enforce fail at inline_container"):
            raise
        reason = failures[0].strerror if failures else "the write failed"
        remedy = ". Make room first"
        if path.exists():
            remedy = f"; the previous {path.name} is intact. Make room and use --init_from=resume"
        raise UserError(f"cannot save {path}: {reason}{remedy}") from e


def read(path: Path) -> dict:
    """The checkpoint at `path`, on the CPU.

    Raises UserError where it is missing or truncated, or holds anything but tensors and plain
    values.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch.save does not compress: what is small on the disk is small in memory.
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("it is compressed, which torch.save never does")
                if archive.testzip():  # torch.load does not look at the checksums
                    raise ValueError("a checksum differs")
        state = torch.load(path, map_location="cpu", weights_only=True)
        check(state)
        # Of earlier versions of train_vision.py: where its images were read from.
        state.get("task", {}).pop("source", None)
        return state
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: train first, or name the run's folder with "
                        "--out_dir") from None
    except PermissionError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except pickle.UnpicklingError as e:
        raise UserError(f"{path} is refused: it is damaged or holds something other than tensors "
                        f"and plain values ({first_line(e)}){without(path)}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, struct.error,
            zipfile.BadZipFile) as e:
        raise UserError(f"{path} is not a readable checkpoint (truncated or damaged: "
                        f"{first_line(e)}){without(path)}") from None


def without(path: Path) -> str:
    """What is left of a run whose checkpoint at `path` cannot be read."""
    best = path.with_name("best.pt")
    if path == best or not best.exists():
        return ""
    return (f". {best} holds the best model: --eval_only and sampling read it; training cannot go "
            "on from it, only start anew in another --out_dir")


TYPES = {"config": dict, "model": dict, "step": int, "task": dict, "optimizer": dict,
         "ranks": list, "scaler": dict, "tokens": int, "evaluated": int, "dtype": str,
         "train_seconds": (int, float), "best": (dict, type(None))}


def check(state):
    """Raises ValueError where a checkpoint's parts cannot be what `save` was given."""
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    for key, kind in TYPES.items():
        if key in state and not isinstance(state[key], kind):
            raise ValueError(f"its {key} is a {type(state[key]).__name__}")
    if "ranks" in state and not (state["ranks"] and isinstance(state["ranks"][0], dict)):
        raise ValueError("its ranks have no state")
    # A size that the weights cannot have would be built before it is compared with them.
    weights = state.get("model", {}).values()
    numbers = sum(w.numel() for w in weights if isinstance(w, torch.Tensor))
    sizes = {**state.get("config", {}), **state.get("task", {})}
    names = ["n_layer", "n_embd", "n_inner", "vocab_size"]
    if not state.get("config", {}).get("rotary"):  # which has no weight for a position
        names.append("block_size")
    for key in names:
        size = sizes.get(key, 0)
        if "model" in state and not (isinstance(size, int) and size <= numbers):
            raise ValueError(f"its {key} is {size}, its weights are {numbers} numbers")


def choose(folder: Path, best: bool) -> Path:
    """A run's best checkpoint, where that is wanted and there; else the latest."""
    if folder.is_file():
        raise UserError(f"{folder} is a file: --out_dir is the folder of a run, here "
                        f"{folder.parent}")
    if best and (folder / "best.pt").exists():
        return folder / "best.pt"
    return folder / "ckpt.pt"


def read_language_model(folder: Path, best: bool) -> dict:
    """`choose` and `read`, for a run of train.py. Raises UserError where it is another script's."""
    saved = read(choose(folder, best))
    if "tokenizer" not in saved.get("task", {}):
        raise UserError(f"{folder} holds no language model of train.py")
    return saved


def first_line(e: Exception) -> str:
    lines = str(e).strip().splitlines() or [type(e).__name__]
    return textwrap.shorten(lines[0], 120, placeholder=" ...")


def same_data(saved: dict | None, state: dict) -> bool:
    """Whether a checkpoint, if there is one, is of the data that a task's state() identifies."""
    if saved is None or saved["task"] == state:
        return True
    # Earlier versions of train_lra.py, whose data alone has towers, did not write its hashes.
    older = {key: value for key, value in state.items() if key != "sha256"}
    return "towers" in older and saved["task"] == older


def restore_model(model: torch.nn.Module, task, saved: dict, folder: Path):
    """Load a checkpoint's weights. Raises UserError where the data or the model is another."""
    if not same_data(saved, task.state()):
        raise UserError(f"the data is not what the run in {folder} was trained on: restore it, or "
                        "start anew in another --out_dir")
    load_weights(model, saved["model"], f"the checkpoint in {folder}")


def load_weights(model: torch.nn.Module, state: dict, source: str):
    """model.load_state_dict with one line for what does not fit. Raises UserError."""
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        lines = [line.strip() for line in str(e).splitlines()[1:]]
        raise UserError(f"{source} does not fit this model: {lines[0] if lines else e}") from None
