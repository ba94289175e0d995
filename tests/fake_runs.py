"""A program in the place of a training script, for tests of a comparison: it trains nothing."""

# conftest's fixture `fake` writes METRIC, the name of what is recorded, before it.
FAKE = """\
import json, os, signal, sys, time
from pathlib import Path
typed = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
rate = float(typed.get("learning_rate", 1e-3))
seed = float(typed.get("seed", 0))
power = float(typed.get("precond_power", 0))
folder = Path(typed["out_dir"])
if power == 7:
    sys.exit("no space left")
if (power == 8 and seed in (2, 100001)) or (rate > 50 and seed == 100002):
    print("train.py: error: the loss is not finite at step 3. Lower --learning_rate")
    sys.exit(2)
if power == 9 and seed == 1 and not (folder / "ckpt.pt").exists():
    (folder / "ckpt.pt").write_text(typed["init_from"])
    signal.signal(signal.SIGTERM, lambda *_: (folder / "saved").touch() or sys.exit(143))
    (folder / "metrics.jsonl").write_text('{"step": 2, "val_loss": 1}\\n')
    time.sleep(60)
(folder / "started.txt").write_text(" ".join(sys.argv[1:]))
loss = 2 + abs(rate - (1e-3 if power == 0 else 1e-2)) + 0.01 * seed
loss -= 0.1 * power * (1 + 0.1 * seed)
with open(folder / "metrics.jsonl", "w") as f:
    for step in range(0, 7, 2):
        value = loss + (6 - step)
        kappa = {"kappa_before": [10.0 + seed, None], "kappa_after": [5.0 + seed, 2.0]}
        costs = {"elapsed_s": step / 2, "tokens": 10 * step, "peak_memory_mb": 7}
        f.write(json.dumps({"step": step, METRIC: value, **costs, **kappa}) + "\\n")
"""


def folders(out):
    return sorted(path for path in (out / "runs").iterdir())
