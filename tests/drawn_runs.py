"""For tests of figures: what runs have recorded, and folders of made-up numbers."""
import json

import numpy as np

from study.runs import Run


def records(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def column(folders, name, layer=None):
    """Steps, and the values of all folders: (runs, steps)."""
    rows = [[r for r in records(folder) if name in r] for folder in folders]
    values = [[r[name] if layer is None else r[name][layer] for r in row] for row in rows]
    return [r["step"] for r in rows[0]], np.array(values)


def read(groups):
    return {label: [Run.read(folder) for folder in folders] for label, folders in groups.items()}


def invent(folder, steps=(0, 10, 20), kappa=(2.0, 3.0), **config):
    """A run's folder with made-up numbers: a loss of step + seed."""
    folder.mkdir(parents=True)
    options = dict(dataset="text.txt", tokenizer="char", precond=False, precond_power=1.0,
                   n_layer=len(kappa), n_head=2, n_embd=32, block_size=16, attention="softmax",
                   grad_clip=1.0, learning_rate=0.01, init_from="scratch", seed=1,
                   out_dir=str(folder)) | config
    toml = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
    (folder / "config.toml").write_text(toml)
    lines = []
    for step in steps:
        lines.append({"step": step, "val_loss": step + options["seed"], "kappa_before": kappa,
                      "kappa_after": kappa, "elapsed_s": float(step)})
        if step:
            lines[-1] |= {"grad_norm": 1.0, "learning_rate": options["learning_rate"],
                          "tokens": 100 * step}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder
