"""Long Range Arena: prepare its six tasks once as memory-mapped arrays, then read batches of them.

    python data/lra.py listops                             # generated: 96,000 / 2,000 / 2,000 trees
    python data/lra.py listops --block_size=128 --generate max_length=129 min_length=16 max_depth=4
    python data/lra.py retrieval --source=lra_release.gz   # as released, or where it was unpacked
    python data/lra.py text --data_dir=data         # data/aclImdb_v1.tar.gz or data/aclImdb

Tasks: Tay et al. 2020. listops, pathfinder and pathx are generated (listops.py, pathfinder.py)
unless there is a source; text (IMDb reviews), retrieval (pairs of papers) and image (CIFAR-10,
grey) are read. A token is a byte: a symbol of ListOps, a character's byte, a grey level. There is
no padding token: a batch says which positions are real.

What the releases leave open is settled so: text and image hold a seeded 10% of their training part
out as validation (published numbers for text validate on the test set). Released pathfinder and
pathx are split 80/10/10 by a seeded permutation. Sequences are cut at block_size on the right, and
counted.
"""
import argparse
import difflib
import hashlib
import json
import shutil
import sys
import tokenize
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

if not __package__:  # run as a script: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import listops
from data.archives import DAMAGED, find
from data.folders import check, checksums, ensure, read_meta
from data.lra_sources import SPLITS, TASKS, samples
from engine import options
from engine.options import DataError, UserError

# what arrays with a damaged header, and a meta.json with values of wrong types, raise
UNREADABLE = (OSError, EOFError, SyntaxError, tokenize.TokenError, AttributeError, KeyError,
              TypeError, ValueError)


def prepare(task: str, data_dir: str | Path = "data", *, source: str | Path | None = None,
            block_size: int | None = None, seed: int = 0, generate: dict | None = None) -> Path:
    """The folder data_dir/lra_<task>_<hash of all the parameters>; made unless it is there.

    block_size: tokens a sequence is cut at (None: the published length).
    source: a released archive or the folder it was unpacked to. None: listops, pathfinder and
        pathx are generated from `seed` and `generate`, the other tasks are looked for in data_dir.
        A source that changed under the same name is not noticed: delete the prepared folder.
    generate: how many samples (train, val, test), and keyword arguments of listops.generate or
        pathfinder.generate.

    For each split the folder holds <split>_tokens.npy, uint8, all sequences one after the other,
    <split>_offsets.npy, int64, and <split>_labels.npy, uint8 (retrieval: tokens1, offsets1,
    tokens2, offsets2), and a meta.json for all. Raises DataError.
    """
    if not str(data_dir):
        raise DataError("data_dir is empty: name a folder, such as data")
    parameters = _parameters(task, source, block_size, seed, generate)
    text = json.dumps(parameters, sort_keys=True)
    folder = Path(data_dir) / f"lra_{task}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    try:
        ensure(folder, lambda work: _fill(work, parameters, folder, source))
    except OSError as error:
        raise DataError(f"cannot prepare {task} in {folder}: {error}") from None
    return folder


def _parameters(task, source, block_size, seed, generate) -> dict:
    """All that decides what is prepared, checked."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, 1)
        hint = f": do you mean {near[0]}?" if near else ""
        raise DataError(f"unknown task {task!r}{hint} (tasks: {', '.join(TASKS)})")
    spec = TASKS[task]
    block_size = spec.block_size if block_size is None else block_size
    if block_size < 1:
        raise DataError(f"{task}: block_size={block_size} must be at least 1")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise DataError(f"{task}: seed={seed} must be in [0, 4294967296)")
    if source is not None and not str(source):
        raise DataError(f"{task}: the source is empty: give its path, or leave the option out")
    generated = spec.generate and source is None
    if generated:
        generate = {**dict(zip(SPLITS, spec.counts)), **(generate or {})}
        for split in SPLITS:
            if type(generate[split]) is not int or generate[split] < 1:
                raise DataError(f"{task}: {split}={generate[split]} must be a number of samples, "
                                "at least 1")
    elif generate:
        why = ("are for generated data: leave the source out" if spec.generate else
               "mean nothing here: this task is read, not generated")
        raise DataError(f"{task}: {', '.join(generate)} {why}")
    return {"task": task, "block_size": block_size,
            "source": None if source is None else str(Path(source).resolve()),
            # released listops and retrieval come with their splits, so that no seed decides them
            "seed": seed if generated or task not in ("listops", "retrieval") else None,
            "generate": generate if generated else None}


def _fill(work: Path, parameters: dict, folder: Path, source) -> dict:
    """Write the arrays into `work`, which becomes `folder`; -> what meta.json holds."""
    task = parameters["task"]
    spec = TASKS[task]
    if parameters["generate"]:
        path = None
        options = ", ".join(f"{name}={value}" for name, value in parameters["generate"].items())
        print(f"preparing {task} in {folder}: generating {options}", flush=True)
    else:
        path = find(spec.release, folder.parent) if source is None else Path(source)
        if not path.is_file() and not path.is_dir():  # a pipe would wait for its writer
            hint = " (leave the source out to generate)" if spec.generate else ""
            raise DataError(f"{task}: there is no {path} that is a file or a folder{hint}")
        print(f"preparing {task} in {folder}: reading {path}", flush=True)
    try:
        writers = _write(work, parameters, path)
    except DAMAGED as error:
        raise DataError(f"{path} is not a complete archive ({error}): download it again") from None

    meta = {**parameters, "made": f"read from {path}" if path else "generated",
            **_facts(task, {split: Split(work, split) for split in SPLITS}),
            "cut": {split: writer.cut for split, writer in writers.items()},
            "skipped": {split: writer.skipped for split, writer in writers.items()},
            "sizes": {file.name: file.stat().st_size for file in sorted(work.glob("*.npy"))},
            **checksums(work)}
    print(f"prepared {task}: "
          + ", ".join(f"{count:,} {split}" for split, count in meta["counts"].items())
          + f"; {sum(meta['cut'].values()):,} longer than block_size={meta['block_size']} and cut, "
          f"{sum(meta['skipped'].values()):,} empty or unreadable and skipped", flush=True)
    return meta


def _write(work: Path, parameters: dict, source: Path | None) -> dict:
    task = parameters["task"]
    scratch = work / "scratch"
    writers = {}
    with ExitStack() as stack:
        for split in SPLITS:
            names = ("1", "2") if TASKS[task].towers == 2 else ("",)
            paths = [work / f"{split}_tokens{name}.npy" for name in names]
            files = [stack.enter_context(open(path, "wb")) for path in paths]
            writers[split] = _SplitWriter(files, parameters["block_size"])
        parameters = {**parameters, "source": source, "scratch": scratch}
        for split, label, *sequences in samples(**parameters):
            writers[split].add(label, *sequences)
        for split, writer in writers.items():
            if not writer.labels:
                raise DataError(f"{task}: the {split} split has no samples; each needs at least "
                                "one")
            writer.finish()
            np.save(work / f"{split}_labels.npy", np.array(writer.labels, np.uint8))
    shutil.rmtree(scratch, ignore_errors=True)
    return writers


class _SplitWriter:
    """One split, written as it comes, a file a tower: only lengths and labels stay in memory."""

    def __init__(self, files: list[BinaryIO], block_size: int):
        self.files, self.block_size = files, block_size
        self.lengths = [[] for _ in files]
        self.labels = []
        self.cut = self.skipped = 0
        for file in files:
            _write_header(file, 0)

    def add(self, label: int, *sequences: bytes):
        if not all(sequences):  # there is nothing to attend to
            self.skipped += 1
            return
        self.cut += any(len(sequence) > self.block_size for sequence in sequences)
        for file, lengths, sequence in zip(self.files, self.lengths, sequences):
            lengths.append(file.write(sequence[:self.block_size]))
        self.labels.append(label)

    def finish(self):
        for file, lengths in zip(self.files, self.lengths):
            _write_header(file, sum(lengths))
            path = Path(file.name)
            np.save(path.with_name(path.name.replace("_tokens", "_offsets")),
                    np.cumsum([0, *lengths], dtype=np.int64))


def _write_header(file: BinaryIO, count: int):
    """numpy leaves room for the largest count, so that the true one can replace it at the end."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (count,)})


def _facts(task: str, splits: dict[str, "Split"]) -> dict:
    """What meta.json says that follows from the task and the arrays."""
    spec = TASKS[task]
    train = splits["train"]
    baselines = {"majority": {split: listops.majority_baseline(train.labels, splits[split].labels)
                              for split in ("val", "test")}}
    if task == "listops":
        baselines["root"] = {split: listops.root_baseline(train.arrays, splits[split].arrays)
                             for split in ("val", "test")}
    return {"classes": spec.classes, "vocab_size": spec.vocab_size, "towers": spec.towers,
            "baselines": baselines, "counts": {split: len(data) for split, data in splits.items()}}


def load(folder: str | Path) -> tuple[dict, dict[str, "Split"]]:
    """(meta.json, {"train": Split, "val": Split, "test": Split}) of a prepared folder.

    Its files are compared with their checksums; see data/folders.py for large ones. Raises
    DataError where a file is missing, cut off or another, or does not agree with meta.json.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    try:
        for name, size in meta["sizes"].items():
            if (folder / name).stat().st_size != size:
                raise DataError(f"{folder / name} has not the size it was written with: delete the "
                                "folder and prepare it again")
        if "sha256" in meta:  # earlier versions kept none
            check(folder, meta)
        spec = TASKS[meta["task"]]
        splits = {split: Split(folder, split) for split in SPLITS}
        for split in splits.values():
            split.check(spec.classes, spec.vocab_size, spec.towers, meta["block_size"])
        for name, fact in _facts(meta["task"], splits).items():
            if meta[name] != fact:
                raise ValueError(f"{name} in meta.json is not {fact}")
        if any(type(meta["cut"][split]) is not int for split in SPLITS):
            raise TypeError("cut in meta.json is no number for each split")
    except UNREADABLE as error:
        raise DataError(f"{folder} is not a prepared folder ({error}): delete it and prepare it "
                        "again") from None
    return meta, splits


class Split:
    """One split of a prepared folder, memory-mapped. len() counts samples.

    labels: (len,) uint8.
    """

    def __init__(self, folder: Path, split: str):
        self.labels = np.load(folder / f"{split}_labels.npy")
        self._sequences = []  # (tokens, offsets) of each tower
        for path in sorted(folder.glob(f"{split}_tokens*.npy")):
            tokens = np.asarray(np.load(path, mmap_mode="r"))  # a plain array is faster to slice
            offsets = np.load(path.with_name(path.name.replace("_tokens", "_offsets")))
            self._sequences.append((tokens, offsets))

    def check(self, classes: int, vocab_size: int, towers: int, block_size: int):
        """Raises ValueError where the arrays are not as `prepare` writes them."""
        if len(self._sequences) != towers:
            raise ValueError(f"{len(self._sequences)} arrays of tokens, expected {towers}")
        _expect("labels", self.labels, np.uint8, 0, classes - 1)
        for tokens, offsets in self._sequences:
            # in a vocabulary of 256 there is every byte, and gigabytes need not be read
            some = tokens if vocab_size < 256 else tokens[:1]
            _expect("tokens", some, np.uint8, 0, vocab_size - 1)
            _expect("lengths", np.diff(offsets), np.int64, 1, block_size)
            if (len(offsets), offsets[0], offsets[-1]) != (len(self) + 1, 0, len(tokens)):
                raise ValueError("offsets that do not fit tokens and labels")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens, offsets, labels (of the first tower), as listops' functions take them."""
        return *self._sequences[0], self.labels

    def batch(self, indices) -> tuple:
        """Samples `indices` (B) -> tensors x int64 (B, T), mask bool (B, T), y int64 (B).

        mask: True = a real token; x is 0 elsewhere. T is the longest of the batch. retrieval: x and
        mask are (B, 2, T).
        """
        import torch  # loading it takes seconds, which the command above needs not spend

        indices = np.asarray(indices)
        starts = np.stack([offsets[indices] for _, offsets in self._sequences], 1)  # (B, towers)
        ends = np.stack([offsets[indices + 1] for _, offsets in self._sequences], 1)
        lengths = ends - starts
        x = np.zeros((*lengths.shape, lengths.max()), np.int64)  # (B, towers, T)
        for tower, (tokens, _) in enumerate(self._sequences):
            for row, start, end in zip(x[:, tower], starts[:, tower], ends[:, tower]):
                row[:end - start] = tokens[start:end]
        mask = np.arange(x.shape[-1]) < lengths[..., None]
        if len(self._sequences) == 1:
            x, mask = x[:, 0], mask[:, 0]  # (B, 1, T) -> (B, T)
        y = self.labels[indices].astype(np.int64)
        return torch.from_numpy(x), torch.from_numpy(mask), torch.from_numpy(y)


def _expect(what: str, array: np.ndarray, dtype: type, least: int, most: int):
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{what} of type {array.dtype}, {array.ndim}-dimensional")
    if array.min() < least or array.max() > most:
        raise ValueError(f"{what} from {array.min()} to {array.max()}, expected {least} to {most}")


def main(arguments=None):
    usage = __doc__.split("Tasks:")[0].partition("\n")[2]
    parser = argparse.ArgumentParser(
        description="Prepare a task of Long Range Arena.", epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help=", ".join(TASKS))
    parser.add_argument("--data_dir", default="data", help="where prepared data is kept and "
                        "releases are looked for (default: data)")
    parser.add_argument("--source", help="released archive, or the folder it was unpacked to")
    parser.add_argument("--block_size", type=int,
                        help="cut sequences at this many tokens (default: the published length)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is generated, and splits "
                        "that the release does not fix (default: 0)")
    parser.add_argument("--generate", nargs="+", metavar="NAME=NUMBER", default=[],
                        help="train=, val=, test=: how many samples; and options of the generator")
    typed = parser.parse_args(arguments)
    generate = {}
    for pair in typed.generate:
        name, _, value = pair.partition("=")
        try:
            generate[name] = json.loads(value)
        except ValueError:
            raise UserError(f"--generate {pair[:60]}: it takes NAME=NUMBER, such as "
                            "--generate train=1000 max_length=128") from None
    folder = prepare(typed.task, typed.data_dir, source=typed.source, block_size=typed.block_size,
                     seed=typed.seed, generate=generate)
    meta, _ = load(folder)
    print(folder)
    names = {"majority": "label", "root": "label of the root operator"}
    for name, accuracy in meta["baselines"].items():
        print(f"accuracy of answering the most frequent {names[name]}: "
              f"{accuracy['val']:.1%} val, {accuracy['test']:.1%} test")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a path may hold what the terminal cannot show
    options.run(main)
