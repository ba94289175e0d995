"""The attention implementation for transformers, on small random models.

Each output projection gets C A, a no-op is an error, and power 0 is the model's own attention.
"""
import copy
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import precond

WIDTH = 32
HEADS = 4
VOCAB = 50
EXTRA = "pip install -r requirements-extra.txt"


@pytest.fixture(scope="module")
def tf():
    transformers = pytest.importorskip("transformers", reason=EXTRA)
    precond.register_transformers()
    precond.register_transformers("flow", grad=True)
    precond.register_transformers("half", power=0.5, eps=0.0)
    precond.register_transformers("plain", power=0.0)
    return transformers


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_names_of_transformers_own_are_kept(name, tf):
    with pytest.raises(ValueError, match=f"'{name}' is an attention implementation already"):
        precond.register_transformers(name)


def ids(*shape):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def boxes():
    target = dict(class_labels=torch.tensor([0, 1]),
                  boxes=torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.2, 0.3, 0.1, 0.1]]))
    return [copy.deepcopy(target) for _ in range(2)]


def make(tf, kind, implementation="preconditioned", seed=0):
    """(model, inputs with labels, the end of its output projections' names, calls in a pass)."""
    text = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    small = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
                 intermediate_size=WIDTH)
    inputs = dict(input_ids=ids(2, 10), labels=ids(2, 10))
    projection = None
    calls = 0
    if kind == "gpt2":
        cls = tf.GPT2LMHeadModel
        config = tf.GPT2Config(n_positions=32, n_layer=2, n_head=HEADS, n_embd=WIDTH,
                               initializer_range=0.3, **text)
        projection = "attn.c_proj"
        calls = 2
    elif kind == "llama":
        cls = tf.LlamaForCausalLM
        config = tf.LlamaConfig(num_key_value_heads=2, max_position_embeddings=32,
                                initializer_range=0.3, **small, **text)
        projection = "o_proj"
        calls = 2
    elif kind == "bert":
        cls = tf.BertForMaskedLM
        config = tf.BertConfig(max_position_embeddings=32, **small, **text)
        projection = "attention.output.dense"
        calls = 2
    elif kind == "vit":
        cls = tf.ViTForImageClassification
        config = tf.ViTConfig(image_size=32, patch_size=8, num_labels=3, **small)
        inputs = dict(pixel_values=images(), labels=torch.tensor([0, 2]))
        projection = "attention.o_proj"
        calls = 2
    elif kind == "yolos":
        cls = tf.YolosForObjectDetection
        config = tf.YolosConfig(image_size=[32, 32], patch_size=8, num_detection_tokens=5, **small)
        inputs = dict(pixel_values=images(), labels=boxes())
        projection = "attention.output.dense"
        calls = 2
    elif kind == "detr":
        cls = tf.DetrForObjectDetection
        backbone = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                   layer_type="basic", out_features=["stage2"])
        config = tf.DetrConfig(backbone_config=backbone, d_model=WIDTH, num_queries=5,
                               encoder_layers=2, encoder_attention_heads=HEADS,
                               encoder_ffn_dim=WIDTH, decoder_layers=2,
                               decoder_attention_heads=HEADS, decoder_ffn_dim=WIDTH)
        inputs = dict(pixel_values=images(), labels=boxes())
        projection = "o_proj"
        calls = 6
    elif kind == "eomt":
        cls = tf.EomtForUniversalSegmentation
        config = tf.EomtConfig(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS,
                               image_size=32, patch_size=8, num_upscale_blocks=1, num_blocks=1,
                               num_queries=5, num_register_tokens=1, mlp_ratio=2)
        masks = torch.zeros(2, 32, 32)
        masks[0, 4:20, 4:20] = 1
        masks[1, 16:, :] = 1
        inputs = dict(pixel_values=images(), mask_labels=[masks, masks],
                      class_labels=[torch.tensor([0, 1])] * 2)
        projection = "attention.out_proj"
        calls = 3
    elif kind == "fnet":
        cls = tf.FNetForMaskedLM
        config = tf.FNetConfig(hidden_size=WIDTH, num_hidden_layers=1, intermediate_size=WIDTH,
                               max_position_embeddings=32, **text)
    elif kind == "bloom":
        cls = tf.BloomForCausalLM
        config = tf.BloomConfig(hidden_size=WIDTH, n_layer=1, n_head=HEADS,
                                initializer_range=0.3, **text)
    elif kind == "blip":
        cls = tf.BlipTextLMHeadModel
        config = tf.BlipTextConfig(encoder_hidden_size=WIDTH, max_position_embeddings=32,
                                   initializer_range=0.3, is_decoder=True, **small, **text)
    elif kind == "nllb_moe":
        cls = tf.NllbMoeForConditionalGeneration
        config = tf.NllbMoeConfig(d_model=WIDTH, encoder_layers=1, encoder_attention_heads=HEADS,
                                  encoder_ffn_dim=WIDTH, decoder_layers=1, num_experts=2,
                                  decoder_attention_heads=HEADS, decoder_ffn_dim=WIDTH,
                                  decoder_start_token_id=0, init_std=0.3, **text)
    elif kind == "gpt_oss":
        cls = tf.GptOssForCausalLM
        config = tf.GptOssConfig(num_key_value_heads=2, head_dim=8, num_local_experts=2,
                                 num_experts_per_tok=1, max_position_embeddings=32,
                                 **small, **text)
    elif kind == "inkling2":
        cls = tf.Inkling2ForCausalLM
        config = tf.Inkling2TextConfig(num_key_value_heads=2, head_dim=8, num_experts=2,
                                       num_experts_per_tok=1, moe_intermediate_size=WIDTH,
                                       **small, **text)
    elif kind == "gemma2":
        cls = tf.Gemma2ForCausalLM
        config = tf.Gemma2Config(num_key_value_heads=2, head_dim=8, **small, **text)
    elif kind == "gemma4":
        cls = tf.Gemma4ForCausalLM
        config = tf.Gemma4TextConfig(num_key_value_heads=2, head_dim=8, global_head_dim=8,
                                     num_kv_shared_layers=1, hidden_size_per_layer_input=8,
                                     vocab_size_per_layer_input=VOCAB,
                                     layer_types=["full_attention"] * 2, **small, **text)
        calls = 2
    elif kind == "minimax_m3":
        cls = tf.MiniMaxM3VLForCausalLM
        config = tf.MiniMaxM3VLTextConfig(
            num_key_value_heads=2, head_dim=8, rotary_dim=8, dense_intermediate_size=WIDTH,
            shared_intermediate_size=WIDTH, num_local_experts=2, num_experts_per_tok=1,
            index_n_heads=2, index_head_dim=8, index_block_size=2, index_topk_blocks=1,
            layer_types=["full_attention", "minimax_m3_sparse"], **small, **text)
        calls = 2
    torch.manual_seed(seed)
    model = cls._from_config(config, attn_implementation=implementation)
    return model, inputs, projection, calls


def head_outputs(model, projection, inputs):
    """(output, {name: what enters the output projection, (B, T, n_head, head_dim)}) of a pass."""
    seen = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith(projection):
            def keep(_, args, name=name):
                seen[name] = args[0].unflatten(-1, (HEADS, -1))

            hooks.append(module.register_forward_pre_hook(keep))
    output = model(**inputs)
    for hook in hooks:
        hook.remove()
    return output, seen


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "vit", "yolos", "detr", "eomt"])
def test_transformers_models(tf, kind):
    if kind in ("yolos", "detr", "eomt"):
        pytest.importorskip("scipy", reason=EXTRA)  # the matching in their losses
    model, inputs, projection, calls = make(tf, kind)
    assert precond.check(model.eval(), **inputs) == precond.check(model.train(), **inputs) == calls

    output, heads = head_outputs(model, projection, inputs)
    for a in heads.values():  # in training, dropout can take all that a token attends to
        norm = a.norm(dim=-1)
        assert ((norm == 0) | ((norm - 1).abs() < 1e-5)).all()
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert output.loss.isfinite() and all(g.isfinite().all() for g in gradients)
    assert any(g.any() for g in gradients)

    plain, *_ = make(tf, kind, "plain")
    with torch.no_grad():
        a = head_outputs(plain.eval(), projection, inputs)[1]
        b = head_outputs(model.eval(), projection, inputs)[1]
    assert len(b) == calls
    for name, rows in b.items():
        # DETR's decoder starts from zeros, and biases from 0.
        zero = name == "model.decoder.layers.0.self_attn.o_proj"
        expected = torch.full(rows.shape[:-1], 0.0 if zero else 1.0)
        torch.testing.assert_close(rows.norm(dim=-1), expected, atol=1e-5, rtol=0)
    first = next(iter(a))  # what precedes the first attention is the same in both
    assert (a[first].norm(dim=-1) - 1).abs().max() > 0.1
    torch.testing.assert_close(b[first], F.normalize(a[first], dim=-1), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_masks(tf, kind):
    """Padding does not change what real tokens get; causal models do not see later tokens."""
    model, *_ = make(tf, kind)
    model.eval()
    short = ids(1, 6)
    junk = torch.full((1, 3), 7)
    alone = model(input_ids=short).logits
    left = (torch.cat([junk, short], dim=1), slice(3, 9))
    right = (torch.cat([short, junk], dim=1), slice(0, 6))
    for x, real in (left, right):
        mask = torch.zeros(1, 9, dtype=torch.long)
        mask[:, real] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(input_ids=x, attention_mask=mask, position_ids=positions).logits
        assert padded.isfinite().all()
        torch.testing.assert_close(padded[:, real], alone, atol=1e-5, rtol=1e-5)
    changed = short.clone()
    changed[0, -1] = 3 if short[0, -1] != 3 else 4
    difference = (model(input_ids=changed).logits - alone).abs().amax(dim=-1)[0]
    assert difference[-1] > 1e-3
    if kind == "bert":
        assert (difference[:-1] > 1e-6).all()
    else:
        assert (difference[:-1] < 1e-6).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_with_a_cache_equals_without(tf, kind):
    model, *_ = make(tf, kind)
    model.eval()
    prompt = ids(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    with precond.record() as calls:
        cached = model.generate(prompt, use_cache=True, **options)
    assert any(a.size(-2) == 1 for a, _ in calls)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    plain, *_ = make(tf, kind, "plain")
    assert not torch.equal(cached, plain.eval().generate(prompt, **options))


def test_options_of_registration(tf):
    """power, eps and grad reach the formula, as in precondition_sdpa; power 0 is plain SDPA."""
    def step(implementation):
        model, inputs, projection, _ = make(tf, "gpt2", implementation)
        output, heads = head_outputs(model.eval(), projection, inputs)
        output.loss.backward()
        rows = heads["transformer.h.0.attn.c_proj"].detach()
        return output.logits.detach(), rows, model.transformer.h[0].attn.c_attn.weight.grad

    names = ("sdpa", "plain", "preconditioned", "flow", "half")
    results = {name: step(name) for name in names}
    a = results["sdpa"][1]
    assert torch.equal(results["plain"][0], results["sdpa"][0])
    root = a.norm(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(results["half"][1], a / root, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results["flow"][0], results["preconditioned"][0])
    assert not torch.allclose(results["flow"][2], results["preconditioned"][2], rtol=1e-2)
    half = dict(power=0.5, eps=0.0)
    for name, options in ("preconditioned", {}), ("flow", dict(grad=True)), ("half", half):
        with precond.precondition_sdpa(**options):
            inside = step("sdpa")
        for x, y in zip(inside, results[name]):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    with precond.precondition_sdpa(**half):  # a registered model inside: once, and not twice
        assert torch.equal(step("half")[0], results["half"][0])


@pytest.mark.parametrize("seed", range(3))
def test_detr_trains_with_the_gradient_of_the_baseline(tf, seed):
    """Its first decoder layer attends over zeros: 1/eps there made the gradient's norm 5e9."""
    pytest.importorskip("scipy", reason=EXTRA)
    norms = {}
    for implementation in ("plain", "preconditioned"):
        model, inputs, *_ = make(tf, "detr", implementation, seed)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
        norms[implementation] = []
        for _ in range(4):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            norms[implementation].append(float(norm))
            optimizer.step()
    for plain, preconditioned in zip(*norms.values()):
        assert 0.1 * plain < preconditioned < 10 * plain


@pytest.mark.parametrize("kind", ["fnet", "bloom"])
def test_models_that_take_any_name_and_ignore_it_are_errors(tf, kind):
    model, inputs, *_ = make(tf, kind)
    name = type(model).__name__
    with pytest.raises(RuntimeError, match=f"no attention call of {name} was preconditioned"):
        precond.check(model, **inputs)
    with precond.precondition_sdpa(), pytest.raises(RuntimeError, match="no attention call"):
        precond.check(model, **inputs)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bloom", "blip", "nllb_moe"])
def test_code_without_sdpa_gets_the_masks_of_its_own_attention(tf, kind):
    """An SDPA mask (none, or bool) made Bloom and BLIP attend to the future and to padding."""
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    inputs = dict(input_ids=ids(2, 10), attention_mask=mask)
    if kind == "nllb_moe":
        inputs["decoder_input_ids"] = ids(2, 7)
    own = make(tf, kind, None)[0].eval()(**inputs).logits
    plain = make(tf, kind, "plain")[0].eval()(**inputs).logits
    torch.testing.assert_close(plain, own, atol=1e-5, rtol=1e-5)
    assert own.std() > 0.1


@pytest.mark.parametrize("kind, argument", [("gpt_oss", "GptOssAttention passes s_aux"),
                                            ("inkling2", "Inkling2.*Attention passes sinks"),
                                            ("gemma2", "Gemma2Attention passes softcap")])
def test_attention_that_sdpa_cannot_compute_is_an_error(tf, kind, argument):
    model, inputs, *_ = make(tf, kind)
    with pytest.raises(ValueError, match=argument):
        model(**inputs)


def test_only_arguments_that_are_understood_are_taken(tf):
    model, inputs, *_ = make(tf, "llama")
    expected = model(**inputs).logits
    harmless = dict(num_items_in_batch=torch.tensor(20), output_router_logits=False, sinks=None)
    torch.testing.assert_close(model(**inputs, **harmless, use_cache=False).logits, expected)
    message = "LlamaAttention passes block_indices to its attention.*'preconditioned' cannot serve"
    with pytest.raises(ValueError, match=message):
        model(**inputs, block_indices=torch.zeros(1))


@pytest.mark.parametrize("kind", ["gemma4", "minimax_m3"])
def test_models_that_test_for_the_name_sdpa_are_refused(tf, kind):
    """Gemma4 drops queries, and MiniMax-M3 its sparse mask, under any other name."""
    model, inputs, _, calls = make(tf, kind, "plain")
    with pytest.raises(ValueError, match="the models of .*Config test for the name 'sdpa'"):
        model(**inputs)
    model, *_ = make(tf, kind, "sdpa")
    del inputs["labels"]
    expected = model.eval()(**inputs, logits_to_keep=3).logits
    with precond.precondition_sdpa():
        assert precond.check(model, **inputs) == calls
    with precond.precondition_sdpa(power=0.0):
        assert torch.equal(model(**inputs, logits_to_keep=3).logits, expected)


@pytest.mark.slow
def test_a_compiled_model_with_our_masks(tf, recwarn):
    """In one graph, without a warning: the reading of the model's code stays out of it."""
    model, inputs, *_ = make(tf, "llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    recwarn.clear()
    logits = compiled(input_ids=inputs["input_ids"]).logits
    assert not [w for w in recwarn if "Dynamo" in str(w.message)]
    torch.testing.assert_close(logits, model(input_ids=inputs["input_ids"]).logits)


def test_without_preconditioning_check_raises(tf):
    for implementation in ("sdpa", "eager", "plain"):
        model, inputs, *_ = make(tf, "gpt2", implementation)
        with pytest.raises(RuntimeError, match="no attention call of GPT2LMHeadModel"):
            precond.check(model, **inputs)


@pytest.mark.parametrize("options", [dict(power="learned"), dict(scale="foo"),
                                     dict(power=torch.ones(2))])
def test_options_that_are_no_numbers_are_refused_at_once(tf, options):
    with pytest.raises(ValueError, match="must be a finite number"):
        precond.register_transformers("never", **options)


def test_register_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = "^register_transformers needs transformers: pip install 'transformers>=5'$"
    with pytest.raises(ImportError, match=message):
        precond.register_transformers()
