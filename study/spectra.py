"""A run's model again, from its best checkpoint, and the singular values of its head outputs."""
import numpy as np
import torch

from data.folders import only_prepared
from engine import checkpoint, options
from engine.device import Compute
from engine.options import DataError, UserError
from precond import condition_number, precondition, record
from study.runs import Groups, Run, every, script_of


def read_checkpoint(run: Run) -> dict:
    """The best one, or else the latest. Raises DataError where there is none of use."""
    path = checkpoint.choose(run.folder, best=True)
    if not path.exists():
        raise DataError(f"{run.folder} holds no checkpoint")
    saved = checkpoint.read(path)
    if not {"config", "model", "task"} <= saved.keys():
        raise DataError(f"{path} was not written by this project")
    return saved


def load(run: Run):
    """-> (model in evaluation mode, on the CPU; task with the run's data; configuration).

    Nothing is prepared or downloaded for it. Raises DataError where data or checkpoint are gone.
    """
    saved = read_checkpoint(run)
    script = script_of(saved["config"])
    try:
        config = options.resume(script.Config, saved["config"], {})
        with only_prepared(f"the data of {run.folder} is not in {config.data_dir}; "
                           "training prepares it again"):
            task, model = script.open(config, on_cpu())
        checkpoint.restore_model(model, task, saved, run.folder)
    except UserError as e:
        raise DataError(str(e)) from None
    return model.eval(), task, config


def on_cpu() -> Compute:
    return Compute("cpu", "float32", n_embd=0)  # the width would only choose an automatic dtype


def check_data(groups: Groups):
    """Raises UserError where the data had changed between the trainings of two runs."""
    first, *others = every(groups)
    data = read_checkpoint(first)["task"]
    for run in others:
        if read_checkpoint(run)["task"] != data:
            raise UserError(f"{first.folder} and {run.folder} were trained on different data: "
                            "the file has changed between them, or its size here. Draw them "
                            "separately")


@torch.no_grad()
def spectra(groups: Groups, layer: int) -> dict[str, list[tuple[np.ndarray, float]]]:
    """By label, first of A, then of C A: singular values (matrices, r) and the median kappa.

    A matrix is a head's output for one sample of one run, of its real tokens. Its singular values
    are divided by the largest, which comes first. r is the most that any matrix has; those with
    fewer rows are left out.
    """
    check_data(groups)
    result = {}
    for label, runs in groups.items():
        before, after = [], []
        for run in runs:
            model, task, config = load(run)
            with record() as calls:
                mask = task.probe(model, on_cpu())
            a, ca = calls[layer % config.n_layer]  # (B, n_head, T, head_dim)
            if not config.precond:
                ca = precondition(a, **config.would_be)
            before += matrices(a, mask)
            after += matrices(ca, mask)
        rank = max(min(matrix.shape) for matrix in before)
        result[label] = []
        for found in before, after:
            full = [matrix for matrix in found if min(matrix.shape) == rank]
            values = torch.stack([torch.linalg.svdvals(matrix.double()) for matrix in full])
            values /= values[:, :1].clone()
            kappas = torch.stack([condition_number(matrix) for matrix in full])
            result[label].append((values.numpy(), kappas.median().item()))
    return result


def matrices(heads: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """(B, n_head, T, D) -> B * n_head of (tokens, D); mask (B, T) marks the real tokens."""
    samples = heads if mask is None else [x[:, real] for x, real in zip(heads, mask)]
    return [head for sample in samples for head in sample]
