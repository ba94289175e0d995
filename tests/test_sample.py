"""sample.py: generation with the cache against the same rule without one; choosing, streaming."""
import json
import os
import re
import shutil
from dataclasses import asdict

import pytest
import torch

import export
import sample
import train
from conftest import SMALL, error, shell
from data.tokenizers import ByteTokenizer, GPT2Tokenizer
from engine import pretrained
from engine.options import DataError
from model import GPT, ModelConfig
from sample import TextStream, choose, generate, stack

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2, 3]]


def random_model(**options):
    torch.manual_seed(1)
    options = dict(block_size=24, n_layer=2, n_head=2, n_embd=16) | options
    model = GPT(ModelConfig(**options), 13).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def slow_greedy(model, prompt, n):
    """The documented rule without a cache: keep the last half of the window when it is full."""
    block = model.config.block_size
    tokens = prompt
    start = max(0, tokens.size(1) - block)
    for _ in range(n):
        if tokens.size(1) - start > block:
            start = tokens.size(1) - max(1, block // 2)
        new = model(tokens[:, start:])[0][:, -1].argmax(-1)
        tokens = torch.cat([tokens, new[:, None]], 1)
    return tokens[:, prompt.size(1):]


@pytest.mark.parametrize("precond", [False, True])
@pytest.mark.parametrize("block, length", [(8, 1), (8, 5), (8, 8), (8, 20), (7, 3), (1, 2)])
def test_greedy_with_the_cache_is_greedy_without(precond, block, length):
    model = random_model(block_size=block, precond=precond)
    prompt = torch.randint(13, (3, length))
    got = torch.stack(list(generate(model, prompt, 40, temperature=0)), 1)
    assert torch.equal(got, slow_greedy(model, prompt, 40))
    assert len(got.unique()) > 1


@pytest.mark.parametrize("options", [{}, {"precond": True}, {"attention": "linear"},
                                     {"rotary": True, "qk_norm": True}])
def test_prompts_of_different_length_continue_as_if_alone(options):
    model = random_model(**options)
    tokens, padding = stack(PROMPTS)
    assert padding.tolist() == [4, 8, 0, 6] and tokens[0].tolist() == [0] * 4 + PROMPTS[0]
    new = list(generate(model, tokens, 15, padding=padding, temperature=0))
    for row, prompt in zip(torch.stack(new, dim=1), PROMPTS):
        text = prompt.copy()
        for _ in range(15):  # without a cache
            text.append(model(torch.tensor([text]))[0][0, -1].argmax().item())
        assert row.tolist() == text[len(prompt):]
    assert stack([[1, 2], [3, 4]])[1] is None


def test_padding_that_the_moved_window_still_has():
    """It moves from 24 tokens to the last 12, of which a prompt of one token then has 2."""
    model = random_model()
    prompts = [[7], list(range(11)) * 2 + [3, 5]]
    tokens, padding = stack(prompts)
    assert padding.tolist() == [23, 0]
    text = prompts[0].copy()
    for new in generate(model, tokens, 10, padding=padding, temperature=0):
        assert new[0] == model(torch.tensor([text]))[0][0, -1].argmax()
        text.append(new[0].item())


def test_padding_is_forgotten_when_the_window_moves():
    """24 tokens after the longest prompt's start the window moves: then all rows are their last 12
    tokens and nothing else."""
    model = random_model()
    tokens, padding = stack(PROMPTS)
    new = list(generate(model, tokens, 18, padding=padding, temperature=0))
    for row, prompt in zip(torch.stack(new, dim=1), PROMPTS):
        text = prompt + row.tolist()
        # 9 + 16 and 9 + 17 tokens of the longest: one and two after the window has moved
        for end in (-2, -1):
            n = 12 + end + 2
            logits = model(torch.tensor([text[end - n:end]]))[0]
            assert logits[0, -1].argmax().item() == text[end]


def test_choose_follows_the_distribution():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])

    def draw(temperature=1.0, top_k=0, top_p=1.0):
        generator = torch.Generator().manual_seed(0)
        drawn = choose(logits.expand(20_000, 4), temperature, top_k, top_p, generator)
        return drawn.bincount(minlength=4) / 20_000

    def check(got, expected):
        torch.testing.assert_close(got, expected, rtol=0, atol=0.015)

    p = logits[0].softmax(-1)
    check(draw(), p)
    check(draw(temperature=2.0), (logits[0] / 2).softmax(-1))
    two = torch.tensor([p[0], p[1], 0, 0]) / (p[0] + p[1])
    check(draw(top_k=2), two)
    check(draw(top_p=float(p[0] + p[1]) - 0.01), two)  # 1 alone has too little
    assert draw(top_p=float(p[1]) - 0.01)[1] == 1
    check(draw(top_k=3, top_p=float(p[0] + p[1])), two)  # of three the two hold more
    assert draw(temperature=0)[1] == 1


@pytest.mark.parametrize("options", [
    dict(temperature=1e-45), dict(temperature=5e-324), dict(temperature=1e-5),
    dict(top_p=1e-45), dict(top_p=5e-324)])
def test_extreme_options_choose_the_likeliest_token(options):
    logits = torch.tensor([[1e4, 2e4, 0.0, -1e4], [0.0, 1.0, 3.0, -1.0]])
    how = dict(temperature=1.0, top_k=0, top_p=1.0, generator=None) | options
    for _ in range(20):
        assert choose(logits, **how).tolist() == [1, 2]
    assert choose(logits, 1e308, 0, 1.0, None).shape == (2,)


class Bytes:
    decode_bytes = staticmethod(bytes)


def test_a_stream_holds_back_what_may_begin_the_stop_text():
    stream = TextStream(Bytes, stop="END")
    parts = [stream.add(token) for token in b"xENyENDz"]
    assert parts == ["x", "", "", "ENy", "", "", "", ""]
    assert stream.done and stream.text == "xENy" and stream.end() == ""
    stream = TextStream(Bytes, stop="END")
    assert [stream.add(token) for token in b"xEN"] == ["x", "", ""]
    assert stream.end() == "EN" and stream.text == "xEN"


def test_a_stream_waits_for_whole_characters():
    stream = TextStream(Bytes, stop="")
    assert [stream.add(token) for token in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    stream.add(0xE2)
    assert stream.end() == "\ufffd"


def test_the_window_is_all_that_is_kept():
    """A length that no memory could hold begins at once."""
    tokens = generate(random_model(), torch.tensor([PROMPTS[0]]), 10**15, temperature=0)
    for _ in range(100):
        assert next(tokens).shape == (1,)


def test_prompts_of_a_file_s_lines(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo three\n", encoding="utf-8")
    assert sample.read_prompts(f"LINES:{tmp_path / 'prompts.txt'}") == ["one", "two three"]
    assert sample.read_prompts(f"FILE:{tmp_path / 'prompts.txt'}") == ["one\n\ntwo three\n"]
    assert sample.read_prompts("ROMEO:") == ["ROMEO:"]
    assert sample.read_prompts(r"a\n\tb\\n\x") == ["a\n\tb\\n\\x"]
    (tmp_path / "prompts.txt").write_text("\ufeffone\\n", encoding="utf-8")
    assert sample.read_prompts(f"FILE:{tmp_path / 'prompts.txt'}") == ["one\\n"]
    (tmp_path / "prompts.txt").write_bytes(b"one\r\ntwo\r\n")  # which training keeps, too
    assert sample.read_prompts(f"FILE:{tmp_path / 'prompts.txt'}") == ["one\r\ntwo\r\n"]
    assert sample.read_prompts(f"LINES:{tmp_path / 'prompts.txt'}") == ["one", "two"]


@pytest.fixture
def gpt2():
    try:
        return GPT2Tokenizer()
    except DataError as e:
        pytest.skip(str(e))


def save_model(folder, tokenizer, **changes):
    """A checkpoint of random weights."""
    config = train.Config(n_layer=1, n_head=1, n_embd=4, block_size=8, **changes)
    model = GPT(config, tokenizer.vocab_size)
    task = {"tokenizer": tokenizer.state(), "vocab_size": tokenizer.vocab_size}
    torch.save({"config": asdict(config), "task": task, "step": 1, "model": model.state_dict()},
               folder / "ckpt.pt")


def test_documents_begin_and_end_with_a_token(call, gpt2, tmp_path, monkeypatch):
    """In the prompt <|endoftext|> is one token. Where the model writes it the sample ends."""
    save_model(tmp_path, gpt2)
    written = [*gpt2.encode("two"), gpt2.eot, *gpt2.encode("three")]
    prompts = []

    def fake(model, prompt, *_, **__):
        prompts.append(prompt.tolist())
        return (torch.tensor([token]) for token in written)
    monkeypatch.setattr(sample, "generate", fake)
    options = [f"--out_dir={tmp_path}", "--num_samples=1", r"--start=<|endoftext|>one\n"]
    assert call(sample, *options)[1] == "<|endoftext|>one\ntwo\n"
    assert prompts == [[[gpt2.eot, *gpt2.encode("one\n")]]]
    assert call(sample, *options, "--stop=")[1] == "<|endoftext|>one\ntwo<|endoftext|>three\n"
    assert call(sample, *options, r"--stop=e\n")[1].endswith("two<|endoftext|>three\n")
    assert call(sample, *options, "--stop=xtw")[1].endswith("two<|endoftext|>three\n")
    assert call(sample, *options, "--stop=hr")[1].endswith("two<|endoftext|>t\n")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        words = ["train.py", *SMALL, *corpus, f"--out_dir={folder}", "--max_iters=3"]
        patch.setattr("sys.argv", words)
        train.main()
    return folder


def test_a_text_without_line_ends_begins_with_its_first_character(call, tmp_path):
    text = tmp_path / "dna.txt"
    text.write_text("gattaca" * 200)
    words = [*SMALL, f"--dataset={text}", f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}"]
    assert call(train, *words, "--max_iters=0")[0] == 0
    code, out, err = call(sample, f"--out_dir={tmp_path / 'out'}", "--max_new_tokens=5")
    assert code == 0 and out[0] == "a" and set(out) - set("acgt-\n") == set(), err


def test_samples_are_repeatable_and_continue_the_prompt(call, run, tmp_path):
    (tmp_path / "prompt.txt").write_text("Préc", encoding="utf-8")
    options = [f"--out_dir={run}", "--num_samples=3", "--max_new_tokens=30"]
    code, out, err = call(sample, *options, "--start=Préc")
    assert code == 0 and err == ""
    samples = out.split("\n--------------------\n")
    assert len(samples) == 3 and all(s.startswith("Préc") for s in samples)
    assert all(len(s.removesuffix("\n")) == 34 for s in samples[1:-1])
    assert samples[0] != samples[1]
    assert call(sample, *options, f"--start=FILE:{tmp_path / 'prompt.txt'}")[1] == out
    assert call(sample, *options, "--start=Préc", "--seed=1")[1] != out
    assert call(sample, *options, "--start=Préc", "--ckpt=latest")[0] == 0


def test_samples_are_drawn_in_batches(call, run, monkeypatch, tmp_path):
    """Each as if its batch were all; a number that no memory could hold begins at once."""
    (tmp_path / "prompts.txt").write_text("a\nbc\n")
    options = [f"--out_dir={run}", f"--start=LINES:{tmp_path / 'prompts.txt'}", "--num_samples=3",
               "--max_new_tokens=5", "--temperature=0"]
    together = call(sample, *options)[1]
    samples = together.split(f"\n{sample.SEPARATOR}\n")
    assert [s[:2] for s in samples[:3]] == [samples[0][:2]] * 3
    assert [s[:2] for s in samples[3:]] == ["bc"] * 3
    batches = []
    write = sample.write

    def count(model, tokenizer, prompts, *rest):
        batches.append(prompts)
        write(model, tokenizer, prompts, *rest)
    monkeypatch.setattr(sample, "write", count)
    monkeypatch.setattr(sample, "MOST", 4)
    assert call(sample, *options)[1] == together
    assert batches == [["a", "a", "a", "bc"], ["bc", "bc"]]

    class Enough(Exception):
        pass

    def stop(model, tokenizer, prompts, *_):
        raise Enough(len(prompts))
    monkeypatch.setattr(sample, "write", stop)
    with pytest.raises(Enough, match="4"):
        call(sample, f"--out_dir={run}", "--num_samples=1000000000000000")
    monkeypatch.setattr(sample, "CACHE", 1)
    with pytest.raises(Enough, match="1"):
        call(sample, f"--out_dir={run}", "--num_samples=1000000000000000")


@pytest.mark.slow
def test_output_that_the_terminal_cannot_hold(run, tmp_path):
    """Question marks, whatever is not ASCII: text, undecodable bytes of a prompt, a folder."""
    odd = tmp_path / os.fsdecode(b"run\xff")
    shutil.copytree(run, odd)
    done = shell("sample.py", f"--out_dir={odd}", "--start=Préc", "--max_new_tokens=0",
                 PYTHONIOENCODING="ascii")
    assert done.stdout.startswith("Pr?c\n")
    (odd / "best.pt").unlink()
    (odd / "ckpt.pt").write_bytes(b"")
    done = shell("sample.py", f"--out_dir={odd}", check=False)
    assert done.returncode == 2 and "run?/ckpt.pt is not a readable" in done.stderr

    save_model(tmp_path, ByteTokenizer())
    prompt = os.fsdecode(b"--start=\xff\xfe!")
    done = shell("sample.py", f"--out_dir={tmp_path}", prompt, "--max_new_tokens=2",
                 "--num_samples=1")
    assert done.stdout.startswith("??!")


@pytest.mark.parametrize("precond", [False, True])
def test_a_hugging_face_folder_writes_what_the_run_writes(call, corpus, tmp_path, precond):
    pytest.importorskip("tokenizers", reason="pip install -r requirements-extra.txt")
    run = tmp_path / "run"
    assert call(train, *SMALL, *corpus, f"--precond={precond}", "--precond_power=0.5",
                "--max_iters=2", f"--out_dir={run}")[0] == 0
    assert call(export, f"--out_dir={run}", f"--to={tmp_path / 'hf'}")[0] == 0
    options = ["--start=Préc", "--max_new_tokens=40"]
    expected = call(sample, f"--out_dir={run}", "--init_from=resume", *options)[1]
    assert call(sample, f"--init_from={tmp_path / 'hf'}", *options)[1] == expected

    tokenizer = tmp_path / "hf" / "tokenizer.json"
    whole = json.loads(tokenizer.read_text())
    for damage in ({"model": {"type": "WordLevel", "vocab": {"a": 0, "word": 1}}},
                   {"model": {"type": "BPE", "vocab": {"\u0120the": 5, "a": 6}}},
                   {"model": {"type": "BPE", "vocab": [1, 2]}}, {"model": 7}, {}):
        tokenizer.write_text(json.dumps(damage))
        message = error(call(sample, f"--init_from={tmp_path / 'hf'}", *options))
        assert "none of the tokenizers char, bytes and gpt2" in message
    whole["model"]["vocab"]["\u2603"] = len(whole["model"]["vocab"])
    tokenizer.write_text(json.dumps(whole))
    message = error(call(sample, f"--init_from={tmp_path / 'hf'}", *options))
    assert "knows 42 tokens, its tokenizer has 43" in message
    tokenizer.unlink()
    message = error(call(sample, f"--init_from={tmp_path / 'hf'}", *options))
    assert "has no tokenizer.json" in message


@pytest.mark.slow
def test_published_models_by_their_names(call, gpt2, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="pip install -r requirements-extra.txt")
    save_model(tmp_path, gpt2)
    assert call(export, f"--out_dir={tmp_path}", f"--to={tmp_path / 'hf'}")[0] == 0
    monkeypatch.setattr(pretrained, "download", lambda name: tmp_path / "hf")
    expected = call(sample, f"--out_dir={tmp_path}", "--max_new_tokens=30")[1]
    assert len(expected) > 30
    for name in ("gpt2-xl", tmp_path / "hf"):
        assert call(sample, f"--init_from={name}", "--max_new_tokens=30")[1] == expected
    assert "gpt3 is neither a folder nor one of gpt2" in error(call(sample, "--init_from=gpt3"))


DAMAGE = [
    (lambda saved: saved["config"].update(n_layer=2), "n_layer=2 and has weights for 1"),
    (lambda saved: saved["config"].update(n_layer=1000), "n_layer=1000 and has weights for 1"),
    (lambda saved: saved["config"].update(n_layer=10**9), "its n_layer is 1000000000"),
    (lambda saved: saved["config"].update(n_embd=10**5), "n_embd is 100000|not its configuration"),
    (lambda saved: saved["config"].update(n_head="x"), "n_head='x' is not of type int"),
    (lambda saved: saved["config"].update(dropout=float("nan")), "dropout=nan must be a finite"),
    (lambda saved: saved["task"].update(vocab_size=2), "size mismatch for wte.weight|knows 2 "),
    (lambda saved: saved["task"].update(vocab_size=-2), "not its configuration's|knows -2"),
    (lambda saved: saved["task"].update(tokenizer={"name": "gpt2"}), "knows 256|not at hand"),
    (lambda saved: saved["task"].update(tokenizer=7), "damaged description of a tokenizer"),
    (lambda saved: saved["task"].pop("vocab_size"), "lacks vocab_size"),
    (lambda saved: saved.pop("config"), "lacks config"),
    (lambda saved: saved.pop("model"), "lacks model"),
    (lambda saved: saved.update(model=7), "its model is a int"),
    (lambda saved: saved["model"].update({"ln_f.weight": 7}), "not its configuration's"),
    (lambda saved: saved["model"].update({5: torch.zeros(3)}), "not its configuration's"),
    (lambda saved: saved["model"]["ln_f.weight"].fill_(torch.nan), "not finite numbers"),
]


@pytest.mark.parametrize("command", [sample, export])
@pytest.mark.parametrize("damage, words", DAMAGE, ids=[words for _, words in DAMAGE])
def test_a_checkpoint_is_not_believed(call, tmp_path, command, damage, words):
    """One line, soon, whatever a checkpoint's configuration asks for."""
    save_model(tmp_path, ByteTokenizer())
    saved = torch.load(tmp_path / "ckpt.pt")
    damage(saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    assert re.search(words, error(call(command, f"--out_dir={tmp_path}")))


def test_stop(call, run):
    options = [f"--out_dir={run}", "--num_samples=1", "--max_new_tokens=200", "--start=a",
               "--temperature=2"]
    whole = call(sample, *options)[1][:-1]
    assert len(whole) == 201
    stop = whole[40:42]
    assert call(sample, *options, f"--stop={stop}")[1][:-1] == whole[0] + whole[1:].split(stop)[0]


@pytest.mark.parametrize("arguments, words", [
    (["--start=a☃"], "'☃'"),
    (["--start=FILE:nothere.txt"], "no such file"),
    (["--start="], "the prompt is empty"),
    (["--temperature=-1"], "temperature=-1"),
    (["--temperature=nan"], "temperature=nan must be a finite number"),
    (["--temperature=1e999"], "temperature=inf must be a finite number"),
    (["--top_p=nan"], "top_p=nan must be a finite number"),
    (["--seed=99999999999999999999999"], "seed=99999999999999999999999 must be in [0, 4294967296)"),
    (["--num_samples=0"], "num_samples=0 must be at least 1"),
    (["--max_new_tokens=-1"], "max_new_tokens=-1 must not be negative"),
    (["--top_p=0"], "top_p=0"),
    (["--ckpt=newest"], "choose best or latest"),
    (["--init_from="], "--init_from= is empty"),
    (["--device=cuda:77"], "--device=cuda:77"),
])
def test_mistakes(call, run, arguments, words):
    assert words in error(call(sample, f"--out_dir={run}", *arguments))


def test_missing_run(call, tmp_path):
    assert "no checkpoint" in error(call(sample, f"--out_dir={tmp_path}"))
    (tmp_path / "best.pt").touch()
    message = error(call(sample, f"--out_dir={tmp_path / 'best.pt'}"))
    assert f"--out_dir is the folder of a run, here {tmp_path}" in message
