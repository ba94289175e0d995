"""The Transformer, with preconditioned attention.

GPT-2's architecture (Radford et al. 2019): norms before each part, learned positions, tanh GELU.
The preconditioner is in precond.py, the mechanisms are in attention.py.
`Block` serves causal models and encoders.

Shapes: B sequences, T tokens, C = n_embd channels, head_dim = C / n_head.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import MECHANISMS, rotate, rotations
from engine.kv_cache import KVCache
from engine.loss import IGNORED, LARGE_VOCABULARY, head_loss
from engine.options import (
    FIXED,
    FIXED_IN_TRAINING,
    at_least,
    divides,
    in_range,
    odd_or_zero,
    one_of,
)
from engine.parallel import whole
from engine.precond_config import PrecondConfig
from precond import LEARNED_FROM, LEARNED_SCALE_FROM, precondition


def even_heads(name, value, config):
    if value and config.n_embd // config.n_head % 2:
        return f"{name} turns pairs of channels: n_embd / n_head must be even"


@dataclass
class ModelConfig(PrecondConfig):
    """What fixes a model but its vocabulary."""
    block_size: Annotated[int, "context length in tokens", FIXED, at_least(1)] = 64
    n_layer: Annotated[int, "number of blocks", FIXED, at_least(1)] = 4
    n_head: Annotated[int, "attention heads per block", FIXED, at_least(1),
                      divides("n_embd")] = 4
    n_embd: Annotated[int, "width of the model", FIXED, at_least(1)] = 128
    n_inner: Annotated[int, "width of the feed-forward layer; 0: 4 n_embd", FIXED, at_least(0)] = 0
    dropout: Annotated[float, "dropout probability", in_range(0, 1)] = 0.0
    init: Annotated[Literal["gpt2", "zero"],
                    "gpt2: linear layers N(0, 0.02^2), a classifier's N(0, 1 / inputs); zero: "
                    "N(0, 1 / inputs), projections into the residual stream 0", FIXED] = "gpt2"
    embedding_std: Annotated[float, "standard deviation of the embeddings at first; 0: 0.02 in a "
                                    "language model, 1 in a classifier", FIXED, at_least(0)] = 0.0
    bias: Annotated[bool, "biases in linear layers and layer norms", FIXED] = False
    rotary: Annotated[bool, "rotary positions in place of learned ones", FIXED, even_heads] = False
    qk_norm: Annotated[bool, "scale each head's queries and keys to mean square 1", FIXED] = False
    attention: Annotated[str, "attention mechanism; nystrom is for encoders", FIXED,
                         one_of(MECHANISMS)] = "softmax"
    landmarks: Annotated[int, "landmarks of nystrom attention", FIXED, at_least(1)] = 64
    conv_kernel_size: Annotated[int, "tokens under nystrom's convolution skip, an odd number; "
                                     "0: no skip", FIXED, odd_or_zero] = 35
    precond_skip: Annotated[Literal["before", "after"],
                            "precondition the attention product before or after nystrom's "
                            "convolution skip is added to it", FIXED_IN_TRAINING] = "before"
    loss: Annotated[Literal["auto", "plain", "chunked"],
                    "cross entropy of a language model; chunked: without the logits of all tokens "
                    "in memory; auto: chunked for large vocabularies on a CPU"] = "auto"
    checkpoint_activations: Annotated[bool, "compute each block again in the backward pass instead "
                                            "of keeping its activations"] = False


class Attention(nn.Module):
    """Project to q, k, v; attend; precondition; project."""

    def __init__(self, config: ModelConfig, layer: int, causal: bool):
        super().__init__()
        self.layer, self.causal = layer, causal
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qk_norm = config.qk_norm
        mechanism = MECHANISMS[config.attention]
        options = {name: getattr(config, name) for name in mechanism.options}
        self.mechanism = partial(mechanism.function, **options)
        self.skip = None
        self.skip_first = config.precond_skip == "after"
        if mechanism.skip and (size := config.conv_kernel_size):
            # Over time, a filter for each head.
            self.skip = nn.Conv2d(self.n_head, self.n_head, (size, 1), padding=(size // 2, 0),
                                  groups=self.n_head, bias=False)
        # Power 0 and scale 1 are plain attention, so that with and without C are one code path.
        self.grad, self.eps = config.precond_grad, config.precond_eps
        self.power = config.precond_power if config.precond else 0.0
        self.scale = config.precond_scale if config.precond else 1.0
        if self.power == "learned":
            self.power = nn.Parameter(torch.full((self.n_head,), LEARNED_FROM))
        if self.scale == "learned":
            self.scale = nn.Parameter(torch.full((self.n_head,), LEARNED_SCALE_FROM))
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.qkv.parts = 3 * self.n_head  # matrices of their own to Muon: (head_dim, C) each
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, mask=None, cache: KVCache | None = None, turns=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, n_head, T, head_dim)
        q, k, v = qkv
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # of all tokens so far

        # A single new token may see all that is in the cache: no causal mask.
        a = self.mechanism(q, k, v, mask, is_causal=self.causal and T > 1,
                           dropout_p=self.dropout if self.training else 0.0)
        if self.skip is not None:
            # Padding must not leak into its neighbours through the convolution.
            skip = self.skip(v if mask is None else v * mask[:, None, :, None])
            if self.skip_first:
                a = a + skip

        # A token's row is scaled by that row alone: causal masks and caches are untouched.
        a = precondition(a, grad=self.grad, eps=self.eps, power=self.power, scale=self.scale)
        if self.skip is not None and not self.skip_first:
            a = a + skip
        a = a.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return F.dropout(self.proj(a), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.dropout
        inner = config.n_inner or 4 * config.n_embd
        self.fc = nn.Linear(config.n_embd, inner, bias=config.bias)
        self.proj = nn.Linear(inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = F.gelu(self.fc(x), approximate="tanh")  # GPT-2's GELU: (B, T, 4 C)
        return F.dropout(self.proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, causal: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer, causal)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None, turns=None):
        x = x + self.attn(self.ln_1(x), mask, cache, turns)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """What GPT and Classifier share: embeddings, blocks, final norm, initialisation."""

    def __init__(self, config: ModelConfig, vocab_size: int, causal: bool):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = None if config.rotary else nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i, causal) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def init_weights(self, std: float | None = None):
        """Weights N(0, std^2); without std, embeddings N(0, 1) and linear N(0, 1 / inputs).

        config.embedding_std goes before either.
        """
        zero = self.config.init == "zero"
        embedding_std = self.config.embedding_std or std or 1.0
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=embedding_std)
            if isinstance(module, nn.Linear):
                # As GPT-2: 2 n_layer of these projections add up in the residual stream. Zero:
                # each block begins as the identity, and the gradient decides what it adds.
                shrink = math.sqrt(2 * self.config.n_layer) if name.endswith("proj") else 1.0
                # Without std outputs are as large as inputs: a narrow model learns sooner so.
                own = module.in_features**-0.5 if zero or not std else std
                nn.init.normal_(module.weight, std=own / shrink)
                if zero and name.endswith("proj"):
                    nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, idx, mask=None, cache: KVCache | None = None):
        """Tokens (B, T) -> (B, T, C), before the final norm."""
        T = idx.size(1)
        start = cache.length if cache is not None else 0
        limit = self.config.block_size
        if start + T > limit:
            raise ValueError(f"{start + T} tokens do not fit into block_size={limit}")
        place = torch.arange(start, start + T, device=idx.device)  # (T,)
        if cache is not None and cache.padding is not None:
            # Each sequence counts its positions from its own first token.
            slot = torch.arange(start + T, device=idx.device)
            mask = slot >= cache.padding[:, None]  # (B, start + T)
            place = (place - cache.padding[:, None]).clamp(min=0)  # (B, T)
        x = self.wte(idx)  # (B, T, C)
        turns = None
        if self.wpe is None:
            turns = rotations(place, self.config.n_embd // self.config.n_head)
        else:
            x = x + self.wpe(place)
        x = F.dropout(x, self.config.dropout, self.training)
        again = self.config.checkpoint_activations and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            if again:
                x = checkpoint(block, x, mask, None, turns, use_reentrant=False)
            else:
                x = block(x, mask, cache, turns)
        return x

    def powers(self) -> list[float]:
        """The learned power p of C = s diag(||A_i||^-p) by layer, the mean over its heads."""
        return [whole(block.attn.power).mean().item() for block in self.blocks]

    def scales(self) -> list[float]:
        """The learned scale s, likewise."""
        return [whole(block.attn.scale).mean().item() for block in self.blocks]

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """FLOPs of one training step, without what is not a matrix product."""
        c = self.config
        columns = MECHANISMS[c.attention].columns(c)  # of the attention matrix: T for softmax
        weights = self.n_parameters() - (0 if self.wpe is None else self.wpe.weight.numel())
        # A multiplication and an addition for each weight, three times: forward, and backward
        # for the inputs and for the weights. Q K^T and P V likewise.
        return 6 * weights + 12 * c.n_layer * c.n_embd * columns


class GPT(Transformer):
    """A causal language model over `vocab_size` tokens; the head is the embedding."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__(config, vocab_size, causal=True)
        self.head = None  # the embedding in another form, from engine/packed.py
        self.init_weights(std=0.02)  # GPT-2's

    def forward(self, idx, targets=None, cache: KVCache | None = None):
        """Tokens (B, T) -> logits (B, T, vocab_size) and, with targets (B, T), the loss.

        The loss is the mean cross entropy in nats; a target of -1 does not count. The chunked loss
        leaves no logits: None. With a cache, idx follows the tokens in it (several at once only
        into an empty one), and the logits are the last token's, (B, 1, V).
        """
        if cache is not None and cache.length and idx.size(1) > 1:
            raise ValueError(f"{idx.size(1)} tokens at once after {cache.length} cached ones: "
                             "feed them one by one")
        x = self.encode(idx, cache=cache)
        if cache is not None:
            cache.length += idx.size(1)
            x = x[:, -1:]  # sampling needs the last token's alone
        x = self.ln_f(x)
        if targets is not None and self.loss == "chunked":
            return None, head_loss(x, self.wte.weight, targets)
        # The head is the embedding itself: GPT-2 ties them.
        logits = F.linear(x, self.wte.weight) if self.head is None else self.head(x)
        if targets is None:
            return logits, None
        flat = logits.view(-1, logits.size(-1))  # (B T, V)
        return logits, F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED)

    @property
    def loss(self) -> str:
        """"plain" or "chunked": what config.loss says, or what is faster or smaller."""
        large = self.wte.num_embeddings >= LARGE_VOCABULARY
        best = "chunked" if large and self.wte.weight.device.type == "cpu" else "plain"
        return best if self.config.loss == "auto" else self.config.loss


class Classifier(Transformer):
    """An encoder for sequences of class 0 ... n_classes - 1: a mean over real tokens, two layers.

    towers=2 classifies pairs: both are encoded with the same weights, as a and b.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, n_classes: int, towers: int = 1):
        super().__init__(config, vocab_size, causal=False)
        width = config.n_embd * (4 if towers == 2 else 1)
        inner = config.n_inner or 4 * config.n_embd
        self.head = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, n_classes))
        self.init_weights()

    def forward(self, x, mask, y=None):
        """Tokens and mask (B, T), or (B, 2, T) for pairs; labels y (B) -> logits and mean loss."""
        T = x.size(-1)
        h = self.encode(x.reshape(-1, T), mask.reshape(-1, T))
        h = self.ln_f(h)  # (B or 2 B, T, C): the towers of a pair are samples here
        weight = mask.reshape(-1, T, 1)
        h = (h * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)  # (B or 2 B, C)
        if x.dim() == 3:
            a, b = h.view(-1, 2, h.size(-1)).unbind(dim=1)
            h = torch.cat([a, b, a * b, a - b], dim=-1)  # (B, 4 C)
        logits = self.head(h)
        return logits, None if y is None else F.cross_entropy(logits, y)
