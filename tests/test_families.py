"""wrap and the other ways on small random models of transformers and timm, as docs/families.py."""
import importlib
import importlib.util
import os
import sys
import time

import pytest
import torch

import precond
from conftest import ROOT

pytest.importorskip("transformers", reason="pip install -r requirements-extra.txt")
spec = importlib.util.spec_from_file_location("families", ROOT / "docs" / "families.py")
families = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families)

FULLY = ["SwinV2", "PVT", "Nystromformer", "Longformer", "Deformable DETR", "RT-DETR", "SAM",
         "GPT-Neo"]


@pytest.mark.parametrize("family", FULLY)
def test_wrap_reaches_every_attention(family):
    """Power 0 is the model to the bit, gradients are finite, check has nothing to say."""
    result = families.attempt(families.make_transformers, family, "wrap")
    assert result.startswith("all"), result


@pytest.mark.parametrize("family", ["ViT", "GPT-2", "Whisper", "T5"])
def test_the_three_ways_are_equal(family):
    outputs = {}
    for way in families.WAYS:
        model, _, inputs = families.make_transformers(family, way, 1.0)
        with torch.no_grad(), families.preconditioned(way, model, 1.0), precond.record() as calls:
            outputs[way] = families.tensors(model(**inputs))[0]
        norm = torch.cat([after.norm(dim=-1).flatten() for _, after in calls])
        assert ((norm - 1).abs() < 1e-5).all()
    first, *others = outputs.values()
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["SigLIP", "XLNet", "Bloom"])
def test_what_is_left_is_said(family):
    """MultiheadAttention's head and XLNet are out of wrap's reach, Bloom of the other ways."""
    way = families.WAYS[0] if family == "Bloom" else "wrap"
    assert not families.attempt(families.make_transformers, family, way).startswith("all")


@pytest.mark.parametrize("family, instead", [("SAM", "'sdpa' inside precondition_sdpa"),
                                             ("GPT-Neo", "'eager' and use precond.wrap")])
def test_models_with_a_table_of_classes_say_what_to_do(family, instead):
    """They ended in KeyError: 'preconditioned'."""
    with pytest.raises(ValueError, match=f"looks its attention up by name.*{instead}"):
        families.make_transformers(family, families.WAYS[0], 1.0)


@pytest.fixture
def every(monkeypatch):
    """docs/families_all.py, which imports families.py as the file beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("families_all")


@pytest.mark.parametrize("kind, way", [("bert", families.WAYS[0]), ("bloom", "wrap")])
def test_a_type_is_made_small_and_reached(every, kind, way):
    assert every.transformers_type(kind)["result"] == way


def test_small_widths_fit(every):
    """Heads keep their number, half a head its three parts of positions, lists their layers."""
    import transformers
    config = every.small_config(transformers.Glm4vConfig(), 16, 2).text_config
    assert (config.hidden_size, config.num_attention_heads) == (256, 32)
    assert config.num_hidden_layers == 2
    assert sum(config.rope_parameters["mrope_section"]) == 4


@pytest.mark.slow
def test_a_model_that_takes_too_long_or_dies_is_not_run(every, monkeypatch):
    assert every.in_a_child(os._exit, 1) == dict(result="not run", why="its process died")
    assert every.in_a_child(int, "x")["why"].startswith("ValueError: invalid literal")
    monkeypatch.setattr(every, "LIMIT", 0.5)
    assert every.in_a_child(time.sleep, 60) == dict(result="not run", why="not done after 0.5 s")


@pytest.fixture(scope="module")
def timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("pip install --no-deps timm")
    found_before = list(sys.meta_path)
    families.without_torchvision()
    import timm
    yield timm
    if sys.meta_path != found_before:
        sys.meta_path[:] = found_before
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("family", [
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "xcit_nano_12_p16_224", "davit_tiny",
    "cait_xxs24_224", "levit_128s", "nest_tiny_jx", "tnt_s_patch16_224"])
def test_wrap_reaches_timm(timm, family):
    result = families.attempt(families.make_timm, family, "wrap")
    assert result.startswith("all"), result


@pytest.mark.slow
def test_nests_heads_are_apart(timm):
    """What enters its projection is (D, n_head): each head's row has length 1 there."""
    model, args, _ = families.make_timm("nest_tiny_jx", "wrap", 1.0)
    with torch.no_grad(), precond.wrap(model) as handle:
        name, heads = next(iter(handle.attached.items()))
        seen = []
        model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        model(*args)
    norm = seen[0].unflatten(-1, (-1, heads)).norm(dim=-2)
    torch.testing.assert_close(norm, torch.ones_like(norm))
