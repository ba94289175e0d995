"""Long Range Arena: prepare its six tasks once as memory-mapped arrays, then read batches of them.

    python data/lra.py listops                                     # generated: 96,000 / 2,000 / 2,000 trees
    python data/lra.py listops --block_size=128 --generate max_length=129 min_length=16 max_depth=4 train=20000
    python data/lra.py retrieval --source=lra_release.gz           # an archive as it is released, or where it was unpacked
    python data/lra.py text --data_dir=data                        # data/aclImdb_v1.tar.gz or data/aclImdb

Tasks: Tay et al. 2020. listops, pathfinder and pathx are generated (listops.py, pathfinder.py) unless there is a source; text (IMDb
reviews), retrieval (pairs of papers) and image (CIFAR-10, grey) are read. A token is a byte: a symbol of ListOps, a character's byte,
a grey level. There is no padding token: a batch says which positions are real. What the releases leave open is settled so: text and
image hold a seeded 10% of their training part out as validation (published numbers for text validate on the test set), released
pathfinder and pathx are split 80/10/10 by a seeded permutation. Sequences are cut at block_size on the right, and counted.
"""
import argparse
import difflib
import hashlib
import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

if not __package__:  # run as a script: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import listops
from data.folders import ensure
from data.lra_sources import DAMAGED, SPLITS, TASKS, find, samples
from engine.options import DataError


def prepare(task: str, data_dir: str | Path = "data", *, source: str | Path | None = None, block_size: int | None = None, seed: int = 0,
            generate: dict | None = None) -> Path:
    """The folder data_dir/lra_<task>_<hash of all the parameters>; made, with a line that says so, unless it is there.

    block_size: tokens a sequence is cut at (None: the published length). source: a released archive or a folder it was unpacked to;
    with None, listops, pathfinder and pathx are generated from `seed` and `generate` (train, val, test: how many, and keyword
    arguments of listops.generate or pathfinder.generate), the other tasks are looked for in data_dir. The folder holds
    <split>_tokens.npy uint8 (all sequences one after the other), <split>_offsets.npy int64 and <split>_labels.npy uint8 for each split
    (retrieval: tokens1, offsets1, tokens2, offsets2) and meta.json. A source that changed under the same name is not noticed: delete
    the folder. Raises DataError.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, 1)
        raise DataError(f"unknown task {task!r}" + (f": do you mean {near[0]}?" if near else "") + f" (tasks: {', '.join(TASKS)})")
    spec, data_dir = TASKS[task], Path(data_dir)
    block_size = spec.block_size if block_size is None else block_size
    if block_size < 1:
        raise DataError(f"{task}: block_size={block_size} must be at least 1")
    generated = spec.counts is not None and source is None
    if generate and not generated:
        raise DataError(f"{task}: {', '.join(generate)} " + ("are for generated data: leave the source out" if spec.counts else
                                                              "mean nothing here: this task is read, not generated"))
    parameters = dict(task=task, block_size=block_size, source=None if source is None else str(Path(source).resolve()),
                      seed=seed if generated or task not in ("listops", "retrieval") else None,  # those two come with their splits
                      generate={**dict(zip(SPLITS, spec.counts)), **(generate or {})} if generated else None)
    for split in SPLITS if generated else ():
        count = parameters["generate"][split]
        if not isinstance(count, int) or count < 1:
            raise DataError(f"{task}: {split}={count} must be a number of samples, at least 1")
    folder = data_dir / f"lra_{task}_{hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:10]}"

    def fill(work: Path) -> dict:
        path = None if generated else find(task, data_dir) if source is None else Path(source)
        if path and not path.exists():
            raise DataError(f"{task}: there is no {path}" + " (leave the source out to generate)" * (spec.counts is not None))
        print(f"preparing {task} in {folder}: " + (f"reading {path}" if path else "generating " +
              ", ".join(f"{name}={value}" for name, value in parameters["generate"].items())), flush=True)
        try:
            meta = _fill(work, parameters, path)
        except DAMAGED as error:
            raise DataError(f"{path} is not a complete archive ({error}): download it again") from None
        print(f"prepared {task}: " + ", ".join(f"{count:,} {split}" for split, count in meta["counts"].items()) +
              f"; {sum(meta['cut'].values()):,} longer than block_size={block_size} and cut, "
              f"{sum(meta['skipped'].values()):,} empty or unreadable and skipped", flush=True)
        return meta

    try:
        ensure(folder, fill)
    except OSError as error:
        raise DataError(f"cannot prepare {task} in {folder}: {error}") from None
    return folder


def load(folder: str | Path) -> tuple[dict, dict[str, "Split"]]:
    """(meta, {"train": Split, "val": Split, "test": Split}) of a prepared folder. Raises DataError where files are missing or cut off."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        wrong = [name for name, size in meta["sizes"].items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is not a prepared folder ({error}): delete it and prepare it again") from None
    if wrong:
        raise DataError(f"{folder / wrong[0]} has not the size it was written with: delete the folder and prepare it again")
    return meta, {split: Split(folder, split) for split in SPLITS}


class Split:
    """One split of a prepared folder, memory-mapped. len() counts samples; labels is (len,) uint8."""

    def __init__(self, folder: Path, split: str):
        towers = ("1", "2") if (folder / f"{split}_tokens2.npy").exists() else ("",)
        self._sequences = [(np.asarray(np.load(folder / f"{split}_tokens{tower}.npy", mmap_mode="r")),
                            np.load(folder / f"{split}_offsets{tower}.npy")) for tower in towers]
        self.labels = np.load(folder / f"{split}_labels.npy")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens, offsets, labels (of the first tower), as listops' functions take them."""
        return *self._sequences[0], self.labels

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples `indices` (B) -> x int64 (B, T), mask bool (B, T), True = a real token, y int64 (B); retrieval: x and mask (B, 2, T).

        T is the longest of the batch; positions that are not real hold 0.
        """
        indices = np.asarray(indices)
        starts, ends = (np.stack([offsets[indices + i] for _, offsets in self._sequences], 1) for i in (0, 1))  # (B, towers)
        lengths = ends - starts
        x = np.zeros((*lengths.shape, lengths.max()), np.int64)
        for tower, (tokens, _) in enumerate(self._sequences):
            for row, start, end, length in zip(x[:, tower], starts[:, tower], ends[:, tower], lengths[:, tower]):
                row[:length] = tokens[start:end]
        mask = np.arange(x.shape[-1]) < lengths[..., None]
        if len(self._sequences) == 1:
            x, mask = x[:, 0], mask[:, 0]
        return torch.from_numpy(x), torch.from_numpy(mask), torch.from_numpy(self.labels[indices].astype(np.int64))


class _Writer:
    """One split, written as it comes: only lengths and labels stay in memory."""

    def __init__(self, folder: Path, split: str, towers: int, block_size: int):
        self.folder, self.split, self.block_size = folder, split, block_size
        self.labels, self.cut, self.skipped = [], 0, 0
        self.towers = ("1", "2") if towers == 2 else ("",)
        self.lengths = [[] for _ in self.towers]

    def __enter__(self):
        self.files = [open(self.folder / f"{self.split}_tokens{tower}.npy", "wb") for tower in self.towers]
        for file in self.files:
            self._header(file, 0)
        return self

    def _header(self, file, count: int):
        file.seek(0)  # numpy leaves room for the largest count, so that the header can be written again at the end
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(count,)))

    def add(self, label: int, *sequences: bytes):
        """A sample, one sequence a tower. One with an empty sequence is skipped and counted: there is nothing to attend to."""
        if not all(sequences):
            self.skipped += 1
            return
        self.cut += any(len(sequence) > self.block_size for sequence in sequences)
        for file, lengths, sequence in zip(self.files, self.lengths, sequences):
            lengths.append(file.write(sequence[:self.block_size]))
        self.labels.append(label)

    def __exit__(self, kind, *_):
        for file, lengths, tower in zip(self.files, self.lengths, self.towers):
            with file:
                if kind is None:
                    self._header(file, sum(lengths))
                    np.save(self.folder / f"{self.split}_offsets{tower}.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
        np.save(self.folder / f"{self.split}_labels.npy", np.array(self.labels, np.uint8))


def _fill(folder: Path, parameters: dict, source: Path | None) -> dict:
    """Write the arrays into the folder; meta.json's content."""
    task, scratch = parameters["task"], folder / "scratch"
    spec = TASKS[task]
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_Writer(folder, split, spec.towers, parameters["block_size"])) for split in SPLITS}
        for split, label, *sequences in samples(source=source, scratch=scratch, **{k: v for k, v in parameters.items() if k != "source"}):
            writers[split].add(label, *sequences)
        for split, writer in writers.items():
            if not writer.labels:
                raise DataError(f"{task}: the {split} split has no samples; each needs at least one")
    shutil.rmtree(scratch, ignore_errors=True)
    splits = {split: Split(folder, split) for split in SPLITS}
    train, heldout = splits["train"], SPLITS[1:]
    baselines = dict(majority={split: listops.majority_baseline(train.labels, splits[split].labels) for split in heldout})
    if task == "listops":
        baselines["root"] = {split: listops.root_baseline(train.arrays, splits[split].arrays) for split in heldout}
    return dict(parameters, classes=spec.classes, vocab_size=spec.vocab_size, towers=spec.towers,
                made="generated" if source is None else f"read from {source}", baselines=baselines,
                counts={split: len(splits[split]) for split in SPLITS}, cut={split: writers[split].cut for split in SPLITS},
                skipped={split: writers[split].skipped for split in SPLITS},
                sizes={file.name: file.stat().st_size for file in sorted(folder.glob("*.npy"))})


def main(arguments=None):
    usage = __doc__.split("Tasks:")[0].partition("\n")[2]
    parser = argparse.ArgumentParser(description="Prepare a task of Long Range Arena.", epilog=usage,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help=", ".join(TASKS))
    parser.add_argument("--data_dir", default="data", help="where prepared data is kept and releases are looked for (default: data)")
    parser.add_argument("--source", help="released archive, or the folder it was unpacked to")
    parser.add_argument("--block_size", type=int, help="cut sequences at this many tokens (default: the published length)")
    parser.add_argument("--seed", type=int, default=0, help="of generation and of splits that the release does not fix (default: 0)")
    parser.add_argument("--generate", nargs="+", metavar="NAME=NUMBER",
                        help="train=, val=, test=: how many samples; and options of the generator")
    options = parser.parse_args(arguments)
    try:
        generate = {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in options.generate or [])}
    except ValueError:
        parser.error("--generate takes NAME=NUMBER, such as --generate train=1000 max_length=128")
    try:
        folder = prepare(options.task, options.data_dir, source=options.source, block_size=options.block_size, seed=options.seed,
                         generate=generate)
        meta, _ = load(folder)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(folder)
    for name, accuracy in meta["baselines"].items():
        print(f"accuracy of answering the most frequent label{' of the root operator' * (name == 'root')}: "
              f"{accuracy['val']:.1%} val, {accuracy['test']:.1%} test")


if __name__ == "__main__":
    main()
