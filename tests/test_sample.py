"""sample.py: generation with the cache against the same rule without one, choosing, streaming, mistakes."""
import pytest
import torch

import sample
import train
from conftest import SMALL, error
from model import GPT, ModelConfig
from sample import Writer, choose, generate


def slow_greedy(model, prompt, n):
    """The documented rule without a cache: keep the last half of the window when it is full."""
    block, tokens = model.config.block_size, prompt
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
    torch.manual_seed(1)
    model = GPT(ModelConfig(block_size=block, n_layer=2, n_head=2, n_embd=16, precond=precond), 13).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    prompt = torch.randint(13, (3, length))
    got = torch.stack(list(generate(model, prompt, 40, temperature=0)), 1)
    assert torch.equal(got, slow_greedy(model, prompt, 40))
    assert len(got.unique()) > 1


def test_choose_follows_the_distribution():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    draw = lambda **how: torch.stack([choose(logits.expand(20_000, 4), **dict(temperature=1.0, top_k=0, top_p=1.0) | how,  # noqa: E731
                                             generator=torch.Generator().manual_seed(0))]).flatten().bincount(minlength=4) / 20_000
    p = logits[0].softmax(-1)
    torch.testing.assert_close(draw(), p, rtol=0, atol=0.015)
    torch.testing.assert_close(draw(temperature=2.0), (logits[0] / 2).softmax(-1), rtol=0, atol=0.015)
    two = torch.tensor([p[0], p[1], 0, 0]) / (p[0] + p[1])
    torch.testing.assert_close(draw(top_k=2), two, rtol=0, atol=0.015)
    torch.testing.assert_close(draw(top_p=float(p[0] + p[1]) - 0.01), two, rtol=0, atol=0.015)  # 1 alone has too little
    assert draw(top_p=float(p[1]) - 0.01)[1] == 1
    torch.testing.assert_close(draw(top_k=3, top_p=float(p[0] + p[1])), two, rtol=0, atol=0.015)  # of three the two hold more
    assert draw(temperature=0)[1] == 1


class Bytes:
    decode_bytes = staticmethod(bytes)


def test_writer_holds_back_what_may_begin_the_stop_text():
    writer = Writer(Bytes, stop="END")
    assert [writer.add(token) for token in b"xENyENDz"] == ["x", "", "", "ENy", "", "", "", ""]
    assert writer.done and writer.text == "xENy" and writer.end() == ""
    writer = Writer(Bytes, stop="END")
    assert [writer.add(token) for token in b"xEN"] == ["x", "", ""]
    assert writer.end() == "EN" and writer.text == "xEN"


def test_writer_waits_for_whole_characters():
    writer = Writer(Bytes, stop="")
    assert [writer.add(token) for token in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    writer.add(0xE2)
    assert writer.end() == "\ufffd"


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *SMALL, *corpus, f"--out_dir={folder}", "--max_iters=3"])
        train.main()
    return folder


def test_samples_are_repeatable_and_continue_the_prompt(call, run, tmp_path):
    (tmp_path / "prompt.txt").write_text("Préc", encoding="utf-8")
    options = [f"--out_dir={run}", "--num_samples=3", "--max_new_tokens=30"]
    code, out, err = call(sample, *options, "--start=Préc")
    assert code == 0 and err == ""
    samples = out.split("\n--------------------\n")
    assert len(samples) == 3 and all(s.startswith("Préc") for s in samples)
    assert all(len(s.removesuffix("\n")) == 34 for s in samples[1:-1]) and samples[0] != samples[1]
    assert call(sample, *options, f"--start=FILE:{tmp_path / 'prompt.txt'}")[1] == out
    assert call(sample, *options, "--start=Préc", "--seed=1")[1] != out
    assert call(sample, *options, "--start=Préc", "--ckpt=latest")[0] == 0


def test_stop(call, run):
    options = [f"--out_dir={run}", "--num_samples=1", "--max_new_tokens=200", "--start=a", "--temperature=2"]
    whole = call(sample, *options)[1][:-1]
    assert len(whole) == 201
    stop = whole[40:42]
    assert call(sample, *options, f"--stop={stop}")[1][:-1] == whole[0] + whole[1:].split(stop)[0]


@pytest.mark.parametrize("arguments, words", [
    (["--start=a☃"], "'☃'"),
    (["--start=FILE:nothere.txt"], "no such file"),
    (["--start="], "the prompt is empty"),
    (["--temperature=-1"], "temperature=-1"),
    (["--top_p=0"], "top_p=0"),
    (["--ckpt=newest"], "choose best or latest"),
    (["--device=cuda:77"], "--device=cuda:77"),
])
def test_mistakes(call, run, arguments, words):
    assert words in error(call(sample, f"--out_dir={run}", *arguments))


def test_missing_run(call, tmp_path):
    assert "no checkpoint" in error(call(sample, f"--out_dir={tmp_path}"))
