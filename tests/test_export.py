"""Exported checkpoints in transformers: the same logits, greedy text and token ids; and back."""
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import compare
import export
import precond
import train
from conftest import ROOT, SMALL, error, read_metrics
from data import tokenizers
from engine import checkpoint, pretrained
from engine.options import DataError, UserError
from model import GPT, ModelConfig
from sample import generate

EXTRA = "pip install -r requirements-extra.txt"
transformers = pytest.importorskip("transformers", reason=EXTRA)
pytest.importorskip("safetensors", reason=EXTRA)

CHARS = "".join(map(chr, range(32, 90))) + "\né"


def saved(**changes):
    """A checkpoint of random weights, large enough for logits and greedy text that vary."""
    config = train.Config(**dict(block_size=24, n_layer=2, n_head=2, n_embd=16) | changes)
    torch.manual_seed(0)
    model = GPT(config, len(CHARS))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    task = {"tokenizer": {"name": "char", "chars": CHARS}, "vocab_size": len(CHARS)}
    return {"config": asdict(config), "task": task, "step": 7, "model": model.state_dict()}


def load(folder, options):
    if options:
        precond.register_transformers(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    dict(), dict(bias=True), dict(precond=True),
    dict(precond=True, precond_power=0.5, precond_eps=0.1, precond_grad=True, bias=True),
    dict(precond=True, precond_power=0.0), dict(precond=True, precond_scale="sqrt_d"),
    dict(precond=True, precond_power=0.0, precond_scale=1.5),
    dict(precond=True, precond_power=0.5, precond_scale="learned")],
    ids=lambda changes: " ".join(changes))
def test_transformers_computes_the_same(changes, tmp_path):
    state = saved(**changes)
    options = export.write(state, tmp_path / "hf")
    ours = pretrained.from_checkpoint(state, "state")
    theirs = load(tmp_path / "hf", options)
    idx = torch.randint(len(CHARS), (3, 24), generator=torch.Generator().manual_seed(1))
    expected = ours(idx)[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(theirs(idx).logits, expected, atol=1e-4, rtol=1e-4)
    text = torch.stack(list(generate(ours, idx[:, :4], 16, temperature=0)), dim=1)
    greedy = theirs.generate(idx[:, :4], attention_mask=torch.ones(3, 4), max_new_tokens=16,
                             do_sample=False)
    assert torch.equal(greedy[:, 4:], text) and text.unique().numel() > 4

    shapes, kept, weights = pretrained.read(str(tmp_path / "hf"))
    vocab_size = shapes.pop("vocab_size")
    assert kept.get("precond_grad", False) == changes.get("precond_grad", False)
    back = GPT(ModelConfig(**shapes, **kept), vocab_size)
    back.load_state_dict(weights)
    torch.testing.assert_close(back(idx)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_learned_scale_is_folded_exactly(tmp_path):
    """Scales that are powers of 2 leave no rounding."""
    state = saved(precond=True, precond_scale="learned")
    for layer in range(2):
        state["model"][f"blocks.{layer}.attn.scale"] = torch.tensor([0.5, 4.0])
    export.write(state, tmp_path)
    shapes, kept, weights = pretrained.read(str(tmp_path))
    assert "precond_scale" not in kept and not any("scale" in name for name in weights)
    for layer in range(2):
        name = f"blocks.{layer}.attn.proj.weight"
        factor = torch.tensor([0.5, 4.0]).repeat_interleave(8)
        assert torch.equal(weights[name], state["model"][name] * factor)


@torch.no_grad()
def test_plain_attention_does_not_pass_for_preconditioned(tmp_path, monkeypatch):
    """Without the registration transformers refuses the folder; asked for plain attention, it
    computes something else."""
    options = export.write(saved(precond=True, precond_power=0.5), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["preconditioned_attention"] == {"grad": False, "eps": 1e-8, "power": 0.5}
    from transformers import AttentionInterface
    monkeypatch.delitem(AttentionInterface._global_mapping, "preconditioned", raising=False)
    with pytest.raises(ValueError, match="preconditioned"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.undo()
    idx = torch.arange(20)[None]
    precond.register_transformers()  # another C than the one it was trained with
    with pytest.raises(ValueError, match="exported with power=0.5"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(idx)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert (plain(idx).logits - load(tmp_path, options)(idx).logits).abs().max() > 0.1


def check_tokenizer(folder, ours, samples):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in samples:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text) and theirs.decode(ids) == text, text
    return theirs


def with_tokenizer(ours, vocab_size):
    state = saved()
    state["task"] = {"tokenizer": ours.state(), "vocab_size": vocab_size}
    state["model"]["wte.weight"] = torch.zeros(vocab_size, 16)
    return state


def test_characters_and_bytes(tmp_path):
    export.write(saved(), tmp_path / "char")
    samples = ["TO BE,\n\nOR NOT  TO BE ", " é!", "I'M . ,"]
    theirs = check_tokenizer(tmp_path / "char", tokenizers.CharTokenizer(CHARS), samples)
    with pytest.raises(Exception, match="UNK"):
        theirs("~")
    export.write(with_tokenizer(tokenizers.ByteTokenizer(), 256), tmp_path / "bytes")
    samples = ["To be,\r\n\tor  not ", "é日本 \x00\x7f", "".join(map(chr, range(300)))]
    check_tokenizer(tmp_path / "bytes", tokenizers.ByteTokenizer(), samples)


@pytest.mark.slow
def test_gpt2_byte_pairs(tmp_path):
    try:
        ours = tokenizers.GPT2Tokenizer()
    except DataError as e:
        pytest.skip(str(e))
    export.write(with_tokenizer(ours, ours.vocab_size), tmp_path)
    samples = ["To be, or not  to be:\n\n that's the question...   ",
               "antidisestablishmentarianism 3.14159", "é日本語 \U0001f600 \x00",
               " def f(x):\n        return x**2\n"]
    theirs = check_tokenizer(tmp_path, ours, samples)
    assert theirs.eos_token_id == ours.eot
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == ours.eot
    assert theirs("<|endoftext|>")["input_ids"] == [ours.eot]
    if path := os.environ.get("TINYSHAKESPEARE"):
        text = open(path, encoding="utf-8").read(50_000)
        assert theirs(text)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize("changes, words", [
    (dict(attention="linear"), "attention=linear"), (dict(n_inner=40), "n_inner=40"),
    (dict(rotary=True), "rotary=True"), (dict(qk_norm=True), "qk_norm=True"),
    (dict(precond=True, precond_power="learned"), "learned")])
def test_what_gpt2_cannot_hold_is_refused(changes, words, tmp_path):
    state = saved()
    state["config"] |= changes
    with pytest.raises(UserError, match=words):
        export.write(state, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def trained(tmp_path, corpus, call, *options):
    """The folder of a preconditioned run of three steps."""
    run = tmp_path / "run"
    words = [*SMALL, *corpus, "--precond=True", "--max_iters=3", f"--out_dir={run}", *options]
    assert call(train, *words)[0] == 0
    return run


def test_the_script_and_the_way_back(corpus, tmp_path, call):
    run = trained(tmp_path, corpus, call)
    code, out, err = call(export, f"--out_dir={run}", "--ckpt=latest")
    assert code == 0 and "wrote step 3" in out, err
    lines = out.strip().splitlines()
    namespace = {}
    # The two lines that it prints load the model.
    exec("\n".join(line.strip() for line in lines[-2:]), namespace)
    idx = torch.arange(12)[None]
    ours = pretrained.from_checkpoint(checkpoint.read(run / "ckpt.pt"), run)
    torch.testing.assert_close(namespace["model"](idx).logits, ours(idx)[0], atol=1e-4, rtol=1e-4)

    assert "is not empty" in error(call(export, f"--out_dir={run}"))
    (run / "hf" / "notes.txt").write_text("mine")
    assert call(export, f"--out_dir={run}", "--overwrite")[0] == 0
    assert (run / "hf" / "notes.txt").exists()


def test_training_goes_on_from_an_export(corpus, tmp_path, call):
    """With its context and its preconditioner, unless the options say otherwise."""
    run = trained(tmp_path, corpus, call, "--precond_power=0.5")
    folder = tmp_path / "hf"
    assert call(export, f"--out_dir={run}", f"--to={folder}")[0] == 0
    more = [*corpus, f"--init_from={folder}", "--max_iters=0", *SMALL[-3:]]
    for name, typed, expected in (("same", [], (16, True, 0.5)),
                                  ("off", ["--precond=False", "--block_size=8"], (8, False, 0.5)),
                                  ("paper", ["--precond_power=1"], (16, True, 1.0))):
        code, _, err = call(train, *more, *typed, f"--out_dir={tmp_path / name}")
        assert code == 0, err
        config = checkpoint.read(tmp_path / name / "ckpt.pt")["config"]
        assert (config["block_size"], config["precond"], config["precond_power"]) == expected
    # A preset says what to start from; a scheduler, to go on where there is something.
    preset = tmp_path / "preset.toml"
    preset.write_text(f'init_from = "{folder}"\n')
    more = [preset, *corpus, "--max_iters=0", *SMALL[-3:], f"--out_dir={tmp_path / 'auto'}"]
    for _ in range(2):
        assert call(train, *more, "--init_from=auto")[0] == 0
    assert read_metrics(tmp_path / "auto")[0]["val_loss"] == read_metrics(
        tmp_path / "same")[0]["val_loss"]
    before, same, off = (read_metrics(tmp_path / name) for name in ("run", "same", "off"))
    assert same[0]["val_loss"] == pytest.approx(before[-1]["val_loss"], abs=1e-5)
    assert abs(off[0]["val_loss"] - before[-1]["val_loss"]) > 1e-4


def test_what_does_not_go_with_an_export_is_refused(corpus, tmp_path, call):
    run = trained(tmp_path, corpus, call, "--precond_power=0.5")
    folder = tmp_path / "hf"
    assert call(export, f"--out_dir={run}", f"--to={folder}")[0] == 0
    # Without a word about it an arm has the export's C.
    assert "the arms 'plain' and 'on' are the same" in error(call(
        compare, "train.py", *corpus, f"--init_from={folder}", "--arm", "plain:",
        "--arm", "on: precond=True"))
    more = [f"--init_from={folder}", "--max_iters=0", *SMALL[-3:], f"--out_dir={tmp_path / 'new'}"]
    for option in ("n_layer=3", "attention=linear", "n_inner=77"):
        assert f"{option}, but {folder} has" in error(call(train, *corpus, *more, f"--{option}"))

    text = Path(corpus[0].partition("=")[2]).read_text(encoding="utf-8")
    other, longer = tmp_path / "other.txt", tmp_path / "longer.txt"
    other.write_text(text.replace("e", "\u0436"), encoding="utf-8")  # as many, but another one
    longer.write_text(text + 20 * "\u0436", encoding="utf-8")
    data = f"--data_dir={tmp_path / 'data'}"
    assert "other characters" in error(call(train, f"--dataset={other}", data, *more))
    assert "has a vocabulary of" in error(call(train, f"--dataset={longer}", data, *more))

    config = json.loads((folder / "config.json").read_text())
    for options, words in (({"grad": False}, "needs grad, eps and power"),
                           ({"grad": False, "eps": -1, "power": 1},
                            "precond_eps=-1.0 must not be negative")):
        changed = config | {"preconditioned_attention": options}
        (folder / "config.json").write_text(json.dumps(changed))
        assert words in error(call(train, *corpus, *more))


def no_room():
    """Files of more than 4 KiB cannot be written, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.slow
def test_a_full_disk(tmp_path, call):
    """One line, and the earlier export stays whole."""
    torch.save(saved(), tmp_path / "ckpt.pt")
    assert call(export, f"--out_dir={tmp_path}")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    command = [sys.executable, "-B", "export.py", f"--out_dir={tmp_path}", "--overwrite"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=no_room)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith(f"export.py: error: cannot write to {tmp_path / 'hf'}: ")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}


def test_mistakes(tmp_path, call):
    assert "no checkpoint" in error(call(export, f"--out_dir={tmp_path}"))
    torch.save({"config": {}, "task": {}, "model": {}, "step": 1}, tmp_path / "ckpt.pt")
    assert "no language model of train.py" in error(call(export, f"--out_dir={tmp_path}"))
    torch.save(saved(), tmp_path / "ckpt.pt")
    (tmp_path / "file").write_text("")
    message = error(call(export, f"--out_dir={tmp_path}", f"--to={tmp_path / 'file'}"))
    assert "cannot write to" in message
    message = error(call(export, f"--out_dir={tmp_path / 'ckpt.pt'}"))
    assert f"--out_dir is the folder of a run, here {tmp_path}" in message


@pytest.mark.parametrize("package", ["safetensors", "tokenizers"])
def test_a_package_is_missing(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = f"^export needs {package}: pip install -r requirements-extra.txt$"
    with pytest.raises(DataError, match=message):
        export.write(saved(), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
