"""One batch followed through the code: writes docs/walkthrough.md with the numbers it meets.

    python docs/walkthrough.py > docs/walkthrough.md
"""
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from attention import softmax  # noqa: E402
from data import text  # noqa: E402
from engine.device import Compute  # noqa: E402
from engine.optim import learning_rate, make_optimizer, set_learning_rates  # noqa: E402
from precond import condition_number, precondition, record  # noqa: E402

TEXT = "To be, or not to be, that is the question:\n" * 20
STEPS = 50


def shape(tensor: torch.Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def row(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.2f}" for value in values.tolist())


def walk(folder: Path):
    """Print the walk. `folder` holds text.txt and receives its tokens."""
    config = train.Config(precond=True, block_size=16, n_layer=2, n_head=2, n_embd=16,
                          batch_size=4, max_iters=STEPS, warmup_iters=10, learning_rate=1e-2)
    prepared = text.prepare(str(folder / "text.txt"), folder)
    task = train.LanguageModelling(config, prepared)
    torch.manual_seed(config.seed)
    model = train.GPT(config, task.meta["vocab_size"])
    compute = Compute("cpu", "float32", config.n_embd)
    characters = task.meta["tokenizer"]["chars"]

    print(f"""\
# One batch, from text to checkpoint

This page follows one batch through the code, with the numbers that it meets on the way. The model
is tiny so that they fit on a page: {config.n_layer} layers, {config.n_head} heads, width \
{config.n_embd}, a context of
{config.block_size} characters. All else is as in `python train.py --precond=True`. The page is \
written by
[walkthrough.py](walkthrough.py), and a test runs that script, so it cannot go stale.

## Text -> tokens (`data/text.py`, `data/tokens.py`)

The text is one line of Hamlet, twenty times: {len(TEXT)} characters, {len(characters)} different \
ones. A token is the
number of a character in their sorted list. The first 90% are for training ({len(task.train)} \
tokens), the
rest for validation ({len(task.val)}).
""")

    x, y = task.batch(0, config.batch_size)
    shown = "".join(characters[i] for i in x[0].tolist()).replace("\n", "\\n")
    print(f"""\
## Tokens -> batch (`LanguageModelling.batch` in `train.py`)

Step 0 takes the samples 0 to {config.batch_size - 1} of an endless sequence, which depends on the \
seed alone.
`x` and `y` are {shape(x)}: B = {x.size(0)} sequences of T = {x.size(1)} tokens. `y` is one token \
further than `x`:
it is what the model has to predict.

    text   "{shown}"
    x[0]   {x[0].tolist()}
    y[0]   {y[0].tolist()}
""")

    print(f"""\
## Batch -> vectors (`Transformer.encode` in `model.py`)

Each token becomes its row of `wte` {shape(model.wte.weight)} plus the row of its place in `wpe`
{shape(model.wpe.weight)}: together (B, T, C) = ({x.size(0)}, {x.size(1)}, {config.n_embd}).
The blocks leave that shape as it is.
""")

    attn = model.blocks[0].attn
    with torch.no_grad():
        vectors = model.wte(x) + model.wpe.weight[:x.size(1)]
        qkv = attn.qkv(model.blocks[0].ln_1(vectors))
        B, T, _ = qkv.shape
        q, k, v = qkv.view(B, T, 3, config.n_head, -1).permute(2, 0, 3, 1, 4)
        a = softmax(q, k, v, is_causal=True)
        ca = precondition(a)
    lengths = a[0, 0].norm(dim=-1)
    after = ca[0, 0].norm(dim=-1)
    print(f"""\
## Attention, and C (`Attention.forward` in `model.py`)

One product makes q, k and v of all heads: {shape(qkv)}, then three times
(B, n_head, T, head_dim) = {shape(q)}. `attention.softmax` gives a matrix A of T = {T} rows for
each head and sequence, a row for each token. In the first layer, first head, first sequence:

    A[0]            {row(a[0, 0, 0, :4])}, ...
    ||A_i||         {row(lengths[:8])}, ...

`precond.precondition` multiplies row i by C_ii = 1 / ||A_i||, so that every row has length 1:

    C_ii            {row(1 / lengths[:8])}, ...
    A'[0]           {row(ca[0, 0, 0, :4])}, ...
    ||A'_i||        {row(after[:8])}, ...

The condition number of that matrix, its largest singular value over its smallest, is
{condition_number(a[0, 0]):.3g} before and {condition_number(ca[0, 0]):.3g} after. Then the heads \
stand side by side
again, ({B}, {T}, {config.n_embd}), and `proj` mixes them.
""")

    optimizer = make_optimizer(model, config)
    logits, loss = model(x, y)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    print(f"""\
## Vectors -> loss (`GPT.forward`)

After the last block and a norm, the product with `wte` gives the logits {shape(logits)}: a score
for each of the {logits.size(-1)} characters at each of the {T} places. The loss is the mean cross
entropy, {loss.item():.3f} nats. Guessing evenly would cost ln {logits.size(-1)} = \
{torch.tensor(float(logits.size(-1))).log().item():.3f}.

## Loss -> step (`Trainer.train_step` in `engine/trainer.py`)

The backward pass gives a gradient of length {norm.item():.3f}. Where that is above grad_clip =
{config.grad_clip:g}, all of it is shortened to that. C counts as a constant here, unless
`--precond_grad=True`. The optimizer's rate at step 0 of {config.warmup_iters} steps of warm-up is
{learning_rate(config, 0):.2e}. {len(optimizer.param_groups[0]["params"])} matrices of the blocks \
move by Muon, q, k and v
head by head, the embeddings and {len(optimizer.param_groups[2]["params"])} vectors by AdamW. The \
projections into the residual stream start
at zero, so that the first step moves them and the embeddings only.
""")

    for step in range(STEPS):
        if step:
            _, loss = model(*task.batch(step * config.batch_size, config.batch_size))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        set_learning_rates(optimizer, config, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with record() as calls, torch.no_grad():
        task.probe(model, compute)
    medians = [[condition_number(matrix).median().item() for matrix in call] for call in calls]
    value = task.evaluate(model, compute)["val_loss"]
    print(f"""\
## {STEPS} steps later (`Trainer.evaluate`)

The training loss is {loss.item():.3f} and the validation loss {value:.3f} nats per character.
Kappa is measured on a few validation sequences, before and after C: the median over heads and
sequences is, layer by layer,

    layer    A        C A""")
    for layer, (before, c) in enumerate(medians):
        print(f"    {layer}        {before:<8.3g} {c:.3g}")
    print(f"""
C is not sure to lower kappa, and these are numbers of one tiny model.

## Step -> checkpoint (`engine/run.py`)

`ckpt.pt` holds all that a resumed run needs to go on bit for bit: `model` \
({len(model.state_dict())} tensors),
`optimizer`, `step`, `config`, `task` (the tokenizer and the data's checksums), `best`, `scaler`,
`dtype`, `tokens`, `train_seconds`, `evaluated`, and in `ranks` the random state and running sums of
each process. `best.pt` holds the best model alone.""")


def main():
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text(TEXT)
        stdout, sys.stdout = sys.stdout, sys.stderr
        try:
            text.prepare(str(Path(folder) / "text.txt"), folder)  # says what it does
        finally:
            sys.stdout = stdout
        walk(Path(folder))


if __name__ == "__main__":
    main()
