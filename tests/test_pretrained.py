"""engine/pretrained.py: a random GPT-2 that transformers saved gives the same logits and tokens.

What cannot be read says so in one line.
"""
import json
import shutil
import time

import pytest
import torch

from engine import pretrained
from engine.kv_cache import KVCache
from engine.options import UserError
from model import GPT, ModelConfig

EXTRA = "pip install -r requirements-extra.txt"
transformers = pytest.importorskip("transformers", reason=EXTRA)
safetensors_torch = pytest.importorskip("safetensors.torch", reason=EXTRA)
huggingface_hub = pytest.importorskip("huggingface_hub", reason=EXTRA)

VOCAB = 61


@pytest.fixture(scope="module")
def reference():
    """initializer_range 0.1, biases and gains that are not 0 and 1: a wrong GELU, a wrong layout
    or a lost bias shows.

    Longer position vectors keep greedy text from repeating one token.
    """
    config = transformers.GPT2Config(n_positions=32, n_layer=3, n_head=4, n_embd=48,
                                     vocab_size=VOCAB, initializer_range=0.1, bos_token_id=0,
                                     eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.transformer.wpe.weight.mul_(8)
    return model


@pytest.fixture
def folder(reference, tmp_path):
    reference.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def build(source, **options):
    shapes, _, state = pretrained.read(source, **options)
    vocab_size = shapes.pop("vocab_size")
    model = GPT(ModelConfig(**shapes), vocab_size)
    model.load_state_dict(state)
    return model.eval()


def reconfigure(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def resave(folder, change):
    """Rewrite the folder's tensors after change(dict)."""
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    change(tensors)
    safetensors_torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def check_equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@torch.no_grad()
def test_logits_and_loss_equal_transformers(reference, folder):
    idx = torch.randint(VOCAB, (3, 32), generator=torch.Generator().manual_seed(1))
    model = build(str(folder))
    theirs = reference(idx, labels=idx)
    logits, loss = model(idx[:, :-1], idx[:, 1:].contiguous())
    assert theirs.logits.std() > 0.5  # the comparison is one of numbers that differ
    torch.testing.assert_close(model(idx)[0], theirs.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, theirs.loss, atol=1e-4, rtol=1e-4)
    assert logits.shape == (3, 31, VOCAB)


@torch.no_grad()
def test_greedy_tokens_equal_transformers(reference, folder):
    idx = torch.tensor([[3, 14, 15, 9], [2, 6, 5, 35]])
    theirs = reference.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20,
                                do_sample=False, eos_token_id=None)
    model = build(str(folder))
    cache = KVCache(model.config, batch=2)
    ours = x = idx
    for _ in range(20):
        x = model(x, cache=cache)[0].argmax(-1)
        ours = torch.cat([ours, x], dim=1)
    assert torch.equal(ours, theirs)
    assert ours[:, 4:].unique().numel() > 8


@torch.no_grad()
def test_cropped_positions(reference, folder):
    model = build(str(folder), block_size=10)
    idx = torch.arange(20).view(2, 10)
    assert model.config.block_size == 10 and model.wpe.weight.shape == (10, 48)
    torch.testing.assert_close(model(idx)[0], reference(idx).logits, atol=1e-4, rtol=1e-4)
    for wrong in (0, 33):
        with pytest.raises(UserError, match=f"block_size={wrong}.*1 to 32"):
            pretrained.read(str(folder), block_size=wrong)


@torch.no_grad()
def test_shards_half_precision_and_names_without_prefix(reference, tmp_path):
    half = transformers.GPT2LMHeadModel(reference.config).half()
    half.load_state_dict(reference.state_dict())
    half.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    state = pretrained.read(str(tmp_path / "shards"))[2]
    full = {key: tensor.float() for key, tensor in half.state_dict().items()}
    expected = full["transformer.h.1.attn.c_attn.weight"].t()
    assert torch.equal(state["blocks.1.attn.qkv.weight"], expected)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    reference.transformer.save_pretrained(tmp_path / "bare")
    assert "h.0.ln_1.weight" in safetensors_torch.load_file(tmp_path / "bare" / "model.safetensors")
    idx = torch.arange(12).view(1, 12)
    model = build(str(tmp_path / "bare"))
    torch.testing.assert_close(model(idx)[0], reference(idx).logits, atol=1e-4, rtol=1e-4)


def test_buffers_of_old_files_are_ignored(folder):
    expected = pretrained.read(str(folder))[2]
    resave(folder, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32),
                                       "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
                                       "lm_head.weight": t["transformer.wte.weight"].clone()}))
    state = pretrained.read(str(folder))[2]
    check_equal(state, expected)


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="gptj"), "model_type='gptj'"),
    (dict(model_type=...), "model_type=None"),
    (dict(activation_function="gelu"), "activation_function='gelu'"),
    (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06"),
    (dict(n_inner=100), "n_inner=100.*n_embd=192"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    (dict(scale_attn_weights=False), "scale_attn_weights=False"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
    (dict(n_embd=...), "n_embd=None must be a positive integer"),
    (dict(n_layer="3"), "n_layer='3' must be a positive integer"),
    (dict(n_head=5), "n_head=5 does not divide n_embd=48"),
    (dict(n_layer=4), "no tensor h.3.ln_1.weight"),
    (dict(n_layer=10**7), "no tensor h.3.ln_1.weight"),
    (dict(n_layer=10**9), "n_layer=1000000000 must be a positive integer, at most 16,777,216"),
    (dict(n_embd=10**20), "n_embd=100000000000000000000 must be a positive integer, at most"),
    (dict(n_positions=True), "n_positions=True must be a positive integer"),
    (dict(preconditioned_attention={"grad": 1, "eps": 10**400, "power": 1}), "needs grad, eps"),
    (dict(preconditioned_attention=[1]), "needs grad, eps and power"),
    (dict(n_layer=2), "12 tensors that GPT-2 does not have, h.2.attn.c_attn.bias"),
    (dict(vocab_size=60), r"wte.weight is torch.float32 of shape \(61, 48\).*\(60, 48\)"),
])
def test_another_architecture_is_refused(folder, changes, message):
    reconfigure(folder, **changes)
    with pytest.raises(UserError, match=message):
        pretrained.read(str(folder))


def test_settings_that_do_not_change_the_result_are_accepted(folder):
    reconfigure(folder, n_inner=192, reorder_and_upcast_attn=True,
                activation_function="gelu_pytorch_tanh", tie_word_embeddings=...)
    shapes = dict(block_size=32, n_layer=3, n_head=4, n_embd=48, vocab_size=VOCAB, bias=True)
    assert pretrained.read(str(folder))[0] == shapes


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), "no tensor h.1.mlp.c_fc.bias"),
    (lambda t: t.update(extra=torch.ones(1)), "1 tensors that GPT-2 does not have, extra"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(VOCAB, 48)}),
     "lm_head.weight is not wte.weight"),
    (lambda t: t.update({"transformer.wpe.weight": torch.zeros(32, 48, dtype=torch.int8)}),
     "wpe.weight is torch.int8"),
])
def test_wrong_tensors_are_refused(folder, change, message):
    resave(folder, change)
    with pytest.raises(UserError, match=message):
        pretrained.read(str(folder))


def test_damaged_and_missing_files(folder, reference, tmp_path):
    weights = folder / "model.safetensors"
    config = folder / "config.json"
    whole = weights.read_bytes()
    for length in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        message = "cannot read .*model.safetensors.*damaged or incomplete"
        with pytest.raises(UserError, match=message):
            pretrained.read(str(folder))
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        pretrained.read(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(UserError, match="pickle"):
        pretrained.read(str(folder))
    reference.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="model-00002.* is missing"):
        pretrained.read(str(tmp_path / "shards"))
    elsewhere = {"weight_map": {"wte.weight": "../gpt2/model.safetensors"}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(elsewhere))
    with pytest.raises(UserError, match="no weight_map"):
        pretrained.read(str(tmp_path / "shards"))
    config.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        pretrained.read(str(folder))
    config.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        pretrained.read(str(folder))
    config.unlink()
    with pytest.raises(UserError, match="cannot read .*config.json"):
        pretrained.read(str(folder))
    with pytest.raises(UserError, match="neither a folder nor one of gpt2, gpt2-medium"):
        pretrained.read("gpt3")


def test_published_names_go_through_the_hub(folder, tmp_path, monkeypatch):
    """Without a network: from huggingface_hub's cache if it is there, else one line, at once."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    line = "^cannot download openai-community/gpt2-medium[^\n]*$"
    with pytest.raises(UserError, match=line):
        pretrained.read("gpt2-medium")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://127.0.0.1:9")
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda s: pytest.fail(f"waits {s} s to try again"))
        with pytest.raises(UserError, match=line):
            pretrained.read("gpt2-medium")
    repository = tmp_path / "cache" / "models--openai-community--gpt2-medium"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    expected = pretrained.read(str(folder))
    shapes, _, state = pretrained.read("gpt2-medium")
    assert shapes == expected[0]
    check_equal(state, expected[2])
