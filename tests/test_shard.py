"""--shard=True: one model cut over processes, beside copies of it and beside one process."""
from types import SimpleNamespace

import pytest
import torch

import train
import train_lra
import train_vision
from conftest import SMALL, error, killer, messages, patched, read_metrics, torchrun
from engine import checkpoint
from engine.options import UserError
from engine.parallel import check_shard

RUN = [*SMALL, "--gradient_accumulation_steps=3", "--batch_size=2", "--precond=True",
       "--precond_grad=True", "--precond_power=learned", "--min_lr=0"]


def losses(folder) -> dict[int, float]:
    return {r["step"]: r["val_loss"] for r in read_metrics(folder) if "val_loss" in r}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, turns", [  # (processes, --shard) of a part of the run
    ("adamw", [(2, True), (2, False), (1, False), (2, True)]), ("muon", [(2, True), (1, False)])])
def test_each_kind_of_run_goes_on_from_the_others(optimizer, turns, corpus, tmp_path, call):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = [*RUN, *corpus, f"--optimizer={optimizer}", "--eval_interval=25", "--lr_decay_iters=100"]
    assert call(train, *run, f"--max_iters={25 * len(turns)}", f"--out_dir={whole}")[0] == 0
    for i, (processes, shard) in enumerate(turns):
        begin = ["--init_from=resume"] if i else run
        words = [*begin, f"--max_iters={25 * (i + 1)}", f"--shard={shard}", f"--out_dir={parts}"]
        if processes == 1:
            assert call(train, *words)[0] == 0
        else:
            torchrun(processes, "train.py", *words)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    a, b = (read_metrics(folder) for folder in (whole, parts))
    assert b[0]["kappa_before"] == pytest.approx(a[0]["kappa_before"], rel=1e-3)
    a, b = a[-1], b[-1]
    assert b["precond_power"] == pytest.approx(a["precond_power"], abs=1e-4)
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_blocks_of_shards_are_compiled_where_their_activations_are_not_kept(corpus, tmp_path):
    program = patched(tmp_path, """
        import torch
        from engine import trainer
        layers = []  # linear ones in each graph
        def backend(graph, inputs):
            layers.append(sum("linear" in str(node.target) for node in graph.graph.nodes))
            return graph.forward
        compiler = torch.compile
        torch.compile = lambda function: compiler(function, backend=backend)
        trainer.check_compiler = lambda device: None
        step = Trainer.train_step
        def counting(self):
            layers.clear()
            step(self)
            print("step", self.step, "compiled", layers)
        Trainer.train_step = counting
    """)
    run = [*RUN, *corpus, "--shard=True", "--max_iters=2", "--checkpoint_activations=True",
           "--gradient_accumulation_steps=2"]  # one part of a step, and one size
    said = torchrun(2, program, *run, "--compile=True", f"--out_dir={tmp_path / 'a'}").stdout
    assert "step 0 compiled [4]" in said and "step 1 compiled []" in said
    torchrun(2, "train.py", *run, f"--out_dir={tmp_path / 'b'}")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
    a, b = (checkpoint.read(tmp_path / name / "ckpt.pt")["model"] for name in "ab")
    assert a.keys() == b.keys()


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(corpus, tmp_path):
    run = [*RUN, *corpus, "--shard=True", "--max_iters=12", "--eval_interval=4", "--dropout=0.1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    torchrun(2, "train.py", *run, f"--out_dir={whole}")
    done = torchrun(2, killer(tmp_path, "train", 6), *run, f"--out_dir={killed}", check=False)
    assert done.returncode != 0
    torchrun(2, "train.py", "--init_from=resume", f"--out_dir={killed}")
    assert read_metrics(killed) == read_metrics(whole)
    for name in "ckpt.pt", "best.pt":
        a, b = (checkpoint.read(folder / name)["model"] for folder in (whole, killed))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("module, words", [
    # 21 samples in batches of 4: the second process has one batch less to evaluate.
    (train_lra, ["listops", "--n_train=60", "--n_val=21", "--n_test=21", "--batch_size=4"]),
    # A parameter without elements, and layers beside the blocks.
    (train_vision, ["segment", "--n_val=5", "--batch_size=2", "--n_layer=2", "--n_embd=16",
                    "--n_head=2", "--image_size=32"]),
], ids=["listops", "segment"])
def test_other_tasks(module, words, prepared, tmp_path, call):
    run = [*words, prepared, "--max_iters=3", "--eval_interval=3"]
    assert call(module, *run, f"--out_dir={tmp_path / 'one'}")[0] == 0
    done = torchrun(2, f"{module.__name__}.py", *run, "--shard=True", "--show=1",
                    f"--out_dir={tmp_path / 'two'}")
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    # Segmentation divides by the objects of a part: how a batch is split matters a little.
    assert two == pytest.approx(one, rel=0.02 if module is train_vision else 1e-5)
    assert one[3] != one[0]
    assert "predicted" in done.stdout or "val_0.png" in done.stdout


@pytest.mark.slow
def test_a_process_holds_its_part_and_rank_0_alone_gathers_what_is_saved(corpus, tmp_path):
    said = messages(tmp_path, """
        from torch.utils._pytree import tree_leaves
        gather, gathered = run.whole, []
        def counting(*arguments):
            result = gather(*arguments)
            tensors = [part for part in tree_leaves(result) if hasattr(part, "numel")]
            gathered.append(sum(t.numel() for t in tensors if t.dim()))
            return result
        run.whole = counting
        def save(self):
            self.train_step()
            state = [s for part in self.optimizer.state.values() for s in part.values()]
            tensors = [*self.raw.parameters(), *(s for s in state if s.dim())]
            held = sum(t.to_local().numel() for t in tensors)
            os.makedirs(self.folder, exist_ok=True)
            run.save_state(self)
            raise options.UserError(f"{held} {sum(gathered)} {self.raw.n_parameters()}")
        trainer.Trainer.run = save
    """, *SMALL, *corpus, "--shard=True", "--optimizer=adamw", f"--out_dir={tmp_path / 'out'}")
    (held, gathered, parameters), (other, nothing, _) = (map(int, words.split()) for words in said)
    whole = 3 * parameters  # with both of AdamW's moments
    assert held + other == whole and max(held, other) < 0.51 * whole
    assert (gathered, nothing) == (whole, 0)


def test_one_process_has_nothing_to_split(corpus, tmp_path, call):
    message = error(call(train, *SMALL, *corpus, "--shard=True", f"--out_dir={tmp_path}"))
    assert "start them with torchrun, or use --shard=False" in message


def test_float16_is_refused():
    with pytest.raises(UserError, match="float16's scaler"):
        check_shard(SimpleNamespace(ddp=True, dtype="float16"))
    check_shard(SimpleNamespace(ddp=True, dtype="bfloat16"))
