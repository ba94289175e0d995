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
import hashlib
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

if __name__ == "__main__":  # python data/lra.py looks for modules in data/
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from data import listops
from data.archives import check_unchanged, complete, find, read_from, stamps
from data.folders import check, checksums, ensure, read_meta, reading
from data.lra_sources import SPLITS, TASKS, samples
from engine import options
from engine.options import DataError, UserError


def prepare(task: str, data_dir: str | Path = "data", *, source: str | Path | None = None,
            block_size: int | None = None, seed: int = 0, generate: dict | None = None) -> Path:
    """The folder data_dir/lra_<task>_<hash of all the parameters>; made unless it is there.

    block_size: tokens a sequence is cut at (None: the published length).
    source: a released archive or the folder it was unpacked to. None: listops, pathfinder and
        pathx are generated from `seed` and `generate`, the other tasks are looked for in data_dir.
        That an archive or a table changed is an error; that one of many files did is not noticed.
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
    ensure(folder, lambda work: _fill(work, parameters, folder, source), task)
    if source is not None:
        files = read_from(Path(source), TASKS[task].release)
        check_unchanged(source, files, folder, read_meta(folder))
    return folder


def _parameters(task, source, block_size, seed, generate) -> dict:
    """All that decides what is prepared, checked."""
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}: {options.suggest(task, TASKS)}choose "
                        f"{', '.join(TASKS)}")
    spec = TASKS[task]
    if block_size is None:
        block_size = spec.block_size
    if block_size < 1:
        raise DataError(f"{task}: block_size={block_size} must be at least 1")
    if wrong := options.seed("seed", seed, None):
        raise DataError(f"{task}: {wrong}")
    if source is not None and not str(source):
        raise DataError(f"{task}: the source is empty: give its path, or leave the option out")
    generated = spec.generate and source is None
    if generated:
        generate = dict(zip(SPLITS, spec.counts)) | (generate or {})
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
    path = None
    made_of = {}
    made = "generated"
    if parameters["generate"]:
        said = ", ".join(f"{name}={value}" for name, value in parameters["generate"].items())
        print(f"preparing {task} in {folder}: generating {said}", flush=True)
    else:
        path = find(spec.release, folder.parent) if source is None else Path(source)
        made = f"read from {path}"
        if not path.is_file() and not path.is_dir():  # a pipe would wait for its writer
            hint = " (leave the source out to generate)" if spec.generate else ""
            raise DataError(f"{task}: there is no {path} that is a file or a folder{hint}")
        made_of = stamps(read_from(path, spec.release))  # a change meanwhile counts
        print(f"preparing {task} in {folder}: reading {path}", flush=True)
    with complete(path):
        writers = _write(work, parameters, path)

    cut = {split: writer.cut for split, writer in writers.items()}
    skipped = {split: writer.skipped for split, writer in writers.items()}
    splits = {split: Split(work, split) for split in SPLITS}
    counts = ", ".join(f"{len(data):,} {split}" for split, data in splits.items())
    print(f"prepared {task}: {counts}; {sum(cut.values()):,} longer than "
          f"block_size={parameters['block_size']} and cut, {sum(skipped.values()):,} empty or "
          "unreadable and skipped", flush=True)
    sizes = {file.name: file.stat().st_size for file in sorted(work.glob("*.npy"))}
    return {**parameters, "made": made, **_facts(task, splits), "cut": cut, "skipped": skipped,
            "sizes": sizes, "stamps": made_of, **checksums(work)}


def _write(work: Path, parameters: dict, source: Path | None) -> dict:
    """Store all samples; -> {split: its writer}."""
    task, block_size = parameters["task"], parameters["block_size"]
    towers = ("1", "2") if TASKS[task].towers == 2 else ("",)
    writers = {split: _SplitWriter(work, split, towers, block_size) for split in SPLITS}
    scratch = work / "scratch"
    for split, *sample in samples(**parameters | {"source": source, "scratch": scratch}):
        writers[split].add(*sample)
    shutil.rmtree(scratch, ignore_errors=True)
    for split, writer in writers.items():
        if not writer.labels:
            raise DataError(f"{task}: the {split} split has no samples; each needs at least one")
        writer.finish()
    return writers


class _SplitWriter:
    """One split, a file a tower: tokens go to the disk, only offsets and labels stay in memory."""

    def __init__(self, folder: Path, split: str, towers: tuple[str, ...], block_size: int):
        self.folder, self.split, self.block_size = folder, split, block_size
        self.towers = {tower: (TemporaryFile(dir=folder), [0]) for tower in towers}
        self.labels = []
        self.cut = self.skipped = 0

    def add(self, label: int, *sequences: bytes):
        if not all(sequences):  # there is nothing to attend to
            self.skipped += 1
            return
        self.cut += any(len(sequence) > self.block_size for sequence in sequences)
        for (file, offsets), sequence in zip(self.towers.values(), sequences):
            written = file.write(sequence[:self.block_size])
            offsets.append(offsets[-1] + written)
        self.labels.append(label)

    def finish(self):
        np.save(self.folder / f"{self.split}_labels.npy", np.array(self.labels, np.uint8))
        for tower, (file, offsets) in self.towers.items():
            np.save(self.folder / f"{self.split}_offsets{tower}.npy", np.array(offsets))
            header = {"descr": "|u1", "fortran_order": False, "shape": (offsets[-1],)}
            with file, open(self.folder / f"{self.split}_tokens{tower}.npy", "wb") as array:
                np.lib.format.write_array_header_1_0(array, header)
                file.seek(0)
                shutil.copyfileobj(file, array)


def _facts(task: str, splits: dict[str, "Split"]) -> dict:
    """What meta.json says that follows from the task and the arrays."""
    spec = TASKS[task]
    train = splits["train"]
    held_out = {"val": splits["val"], "test": splits["test"]}
    baselines = {"majority": {split: listops.majority_baseline(train.labels, data.labels)
                              for split, data in held_out.items()}}
    if task == "listops":
        baselines["root"] = {split: listops.root_baseline(train.arrays, data.arrays)
                             for split, data in held_out.items()}
    return {"classes": spec.classes, "vocab_size": spec.vocab_size, "towers": spec.towers,
            "baselines": baselines, "counts": {split: len(data) for split, data in splits.items()}}


def load(folder: str | Path) -> tuple[dict, dict]:
    """(meta.json, {"train": Split, "val": Split, "test": Split}) of a prepared folder.

    Its files are compared with their checksums; see data/folders.py for large ones. Raises
    DataError where a file is missing, cut off or another, or does not agree with meta.json.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    with reading(folder):
        check(folder, meta)
        splits = {split: Split(folder, split) for split in SPLITS}
        for name, fact in _facts(meta["task"], splits).items():
            if meta[name] != fact:
                raise ValueError(f"{name} in meta.json is not {fact}")
        if min(meta["cut"][split] for split in SPLITS) < 0:
            raise ValueError("cut in meta.json is negative")
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

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def arrays(self) -> tuple:
        """tokens, offsets, labels (of the first tower), as listops' functions take them."""
        return *self._sequences[0], self.labels

    def batch(self, indices) -> tuple:
        """Samples `indices` (B) -> tensors x int64 (B, T), mask bool (B, T), y int64 (B).

        mask: True = a real token; x is 0 elsewhere. T is the longest of the batch. retrieval: x and
        mask are (B, 2, T).
        """
        import torch  # loading it takes seconds, which the command above needs not spend

        indices = np.asarray(indices)
        lengths = np.stack([offsets[indices + 1] - offsets[indices]
                            for _, offsets in self._sequences], 1)  # (B, towers)
        x = np.zeros((*lengths.shape, lengths.max()), np.int64)  # (B, towers, T)
        for tower, (tokens, offsets) in enumerate(self._sequences):
            for row, start, length in zip(x[:, tower], offsets[indices], lengths[:, tower]):
                row[:length] = tokens[start:start + length]
        mask = np.arange(x.shape[-1]) < lengths[..., None]
        if len(self._sequences) == 1:
            x, mask = x[:, 0], mask[:, 0]  # (B, 1, T) -> (B, T)
        y = self.labels[indices].astype(np.int64)
        return torch.from_numpy(x), torch.from_numpy(mask), torch.from_numpy(y)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
