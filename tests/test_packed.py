"""engine/packed.py: packed weights write the same text, close to float32."""
import copy

import pytest
import torch

from engine import packed as packing
from sample import generate, stack
from test_sample import PROMPTS, random_model


@torch.no_grad()
def test_sampling_in_bfloat16_follows_float32():
    model = random_model()
    idx = torch.randint(13, (2, 24))
    wide = model(idx)[0].softmax(-1)
    narrow = model.to(torch.bfloat16)(idx)[0].float().softmax(-1)
    assert (wide - narrow).abs().mean() < 0.02
    assert len(list(generate(model, idx[:, :5], 30))) == 30


@pytest.mark.parametrize("options", [
    {}, {"bias": True}, {"precond": True}, {"precond": True, "precond_power": "learned"},
    {"attention": "linear", "precond": True}])
def test_packed_weights_write_the_same_text(options):
    """Weights that float16 holds exactly: the packed model is the model.

    36 rows of a prompt, 4 of a new token, and a moving window.
    """
    model = random_model(**options)
    for p in model.parameters():
        p.data = p.half().float()
    packed = packing.pack(copy.deepcopy(model), torch.float32)
    assert not any(isinstance(m, torch.nn.Linear) for m in packed.modules())
    tokens, padding = stack(PROMPTS)
    texts = [torch.stack(list(generate(m, tokens, 40, padding=padding, temperature=0)), dim=1)
             for m in (model, packed)]
    assert torch.equal(*texts) and len(texts[0].unique()) > 1


@torch.no_grad()
def test_packed_weights_are_closer_to_float32_than_bfloat16():
    model = random_model(precond=True)
    x = torch.randint(13, (1, 20))
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    wide, narrow = (m(x)[0].float().softmax(-1) for m in (model, rounded))
    packed = packing.for_sampling(model, torch.device("cpu"), torch.bfloat16)
    few, many = (packed(x[:, :n])[0].softmax(-1) for n in (8, 20))
    assert few.dtype == torch.float32
    rounding = (wide - narrow).abs().mean()
    assert 0 < (few - wide[:, :8]).abs().mean() < rounding / 4
    assert (many - wide).abs().mean() < 1.5 * rounding


def test_models_that_are_not_packed(monkeypatch):
    """In float32 the weights stay. Where PyTorch has no kernel for packed ones, as on ARM, they
    are cast."""
    cpu = torch.device("cpu")
    model = packing.for_sampling(random_model(), cpu, torch.float32)
    assert type(model.blocks[0].attn.qkv) is torch.nn.Linear
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    model = packing.for_sampling(random_model(), cpu, torch.bfloat16)
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
