"""The Transformer: GPT-2's architecture (pre-norm, learned positions, tanh GELU) with preconditioned attention.

Radford et al. 2019; the preconditioner is in precond.py, the mechanisms are in attention.py. `Block` serves causal models and encoders.
Shapes: B sequences, T tokens, C = n_embd channels, head_dim = C / n_head.
"""
import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import attention
from engine import fast
from precond import LEARNED_FROM, precondition


@dataclass
class PrecondConfig:
    """How attention is preconditioned, in every model."""
    precond: Annotated[bool, "precondition each head's output: row i times ||A_i||^-precond_power", "fixed in training"] = False
    precond_grad: Annotated[bool, "let the gradient flow through the norms (the paper: no)", "fixed in training"] = False
    precond_eps: Annotated[float, "added to the norms", "fixed in training"] = 1e-8
    precond_power: Annotated[float | Literal["learned"], "1: the paper's; 0: plain attention; 0.5: half-way; learned: one a head, from "
                                                         "0.5", "fixed in training"] = 1.0

    def __post_init__(self):
        if not self.precond_eps >= 0:
            raise ValueError(f"precond_eps={self.precond_eps} must not be negative")
        if self.precond_power != "learned" and not math.isfinite(self.precond_power):
            raise ValueError(f"precond_power={self.precond_power} must be a finite number")

    def describe_precond(self) -> str:
        """"precond=True" or "precond=False", then those of its options that are set, though it may be off."""
        chosen = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)
                  if f.name.startswith("precond_") and getattr(self, f.name) != f.default]
        if self.precond or not chosen:
            return ", ".join([f"precond={self.precond}", *chosen])
        return f"precond=False ({', '.join(chosen)} {'has' if len(chosen) == 1 else 'have'} no effect on training)"


@dataclass
class ModelConfig(PrecondConfig):
    """What fixes a model but its vocabulary. "fixed": cannot change when a run is resumed."""
    block_size: Annotated[int, "context length in tokens", "fixed"] = 64
    n_layer: Annotated[int, "number of blocks", "fixed"] = 4
    n_head: Annotated[int, "attention heads per block", "fixed"] = 4
    n_embd: Annotated[int, "width of the model", "fixed"] = 128
    n_inner: Annotated[int, "width of the feed-forward layer; 0: 4 n_embd", "fixed"] = 0
    dropout: Annotated[float, "dropout probability"] = 0.0
    bias: Annotated[bool, "biases in linear layers and layer norms", "fixed"] = False
    attention: Annotated[Literal["softmax", "nystrom", "linear"], "attention mechanism; nystrom is for encoders", "fixed"] = "softmax"
    landmarks: Annotated[int, "landmarks of nystrom attention", "fixed"] = 64
    conv_kernel_size: Annotated[int, "tokens under nystrom's convolution skip, an odd number; 0: no skip", "fixed"] = 35
    precond_skip: Annotated[Literal["before", "after"], "precondition the attention product before or after nystrom's convolution skip "
                                                        "is added to it", "fixed in training"] = "before"
    loss: Annotated[Literal["auto", "plain", "chunked"], "cross entropy of a language model; chunked: without the logits of all tokens in "
                                                         "memory; auto: chunked for large vocabularies on a CPU"] = "auto"
    checkpoint_activations: Annotated[bool, "compute each block again in the backward pass instead of keeping its activations"] = False

    def __post_init__(self):
        PrecondConfig.__post_init__(self)
        for name in ("block_size", "n_layer", "n_head", "n_embd", "landmarks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}: choose a divisor of {self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.n_inner < 0:
            raise ValueError(f"n_inner={self.n_inner} must not be negative")
        if self.conv_kernel_size < 0 or self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size={self.conv_kernel_size} must be odd, or 0 for no convolution skip")


class KVCache:
    """Keys and values of the tokens seen so far, allocated once: for each layer (2, B, n_head, block_size, head_dim).

    `padding` (B,): how many of the first tokens of each sequence are none of its own, so that prompts of different length end together.
    """

    def __init__(self, config: ModelConfig, batch: int, device=None, dtype=torch.float32, padding: torch.Tensor | None = None):
        shape = (2, batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length, self.padding = 0, padding

    def append(self, layer: int, kv: torch.Tensor) -> torch.Tensor:
        """Store keys and values (2, B, n_head, T, head_dim) behind those of the tokens seen; return all of the layer."""
        T = kv.size(-2)
        self.kv[layer].narrow(-2, self.length, T).copy_(kv)
        return self.kv[layer].narrow(-2, 0, self.length + T)


class Attention(nn.Module):
    """Project to q, k, v; attend; precondition; project."""

    def __init__(self, config: ModelConfig, layer: int, causal: bool):
        super().__init__()
        self.layer, self.causal, self.n_head, self.dropout = layer, causal, config.n_head, config.dropout
        self.mechanism, self.skip, self.skip_first = attention.MECHANISMS[config.attention], None, config.precond_skip == "after"
        if config.attention == "nystrom":
            self.mechanism = partial(attention.nystrom, landmarks=config.landmarks)
            if size := config.conv_kernel_size:  # over time, for each head
                self.skip = nn.Conv2d(self.n_head, self.n_head, (size, 1), padding=(size // 2, 0), groups=self.n_head, bias=False)
        self.C = dict(grad=config.precond_grad, eps=config.precond_eps)
        self.power = config.precond_power if config.precond else 0.0
        if self.power == "learned":
            self.power = nn.Parameter(torch.full((self.n_head,), LEARNED_FROM))
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, mask=None, cache: KVCache | None = None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, n_head, T, head_dim)
        q, k, v = qkv if cache is None else (qkv[0], *cache.append(self.layer, qkv[1:]))
        a = self.mechanism(q, k, v, mask, is_causal=self.causal and T > 1, dropout_p=self.dropout if self.training else 0.0)
        if self.skip is not None:
            skip = self.skip(v if mask is None else v * mask[:, None, :, None])
            a = a + skip if self.skip_first else a
        a = precondition(a, power=self.power, **self.C)  # (B, n_head, T, head_dim); power 0 is A itself
        if self.skip is not None and not self.skip_first:
            a = a + skip
        a = a.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.proj(a), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.dropout
        inner = config.n_inner or 4 * config.n_embd
        self.fc = nn.Linear(config.n_embd, inner, bias=config.bias)
        self.proj = nn.Linear(inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        return F.dropout(self.proj(F.gelu(self.fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, causal: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer, causal)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """What the language model and the classifier share: embeddings, blocks, final norm, initialisation."""

    def __init__(self, config: ModelConfig, vocab_size: int, causal: bool):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer, causal) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def init_weights(self, std: float | None = None):
        """Weights N(0, std^2); by default embeddings N(0, 1) and linear layers N(0, 1 / inputs), at which a narrow model starts to learn
        sooner. Biases 0, projections into the residual stream smaller by sqrt(2 n_layer)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std or 1.0)
            if isinstance(module, nn.Linear):
                shrink = math.sqrt(2 * self.config.n_layer) if name.endswith("proj") else 1.0
                nn.init.normal_(module.weight, std=(std or module.in_features**-0.5) / shrink)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, idx, mask=None, cache: KVCache | None = None):
        """Tokens (B, T) -> (B, T, C), before the final norm. Raises ValueError for more tokens than block_size."""
        T, start = idx.size(1), cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size={self.config.block_size}")
        if cache is None or cache.padding is None:
            position = self.wpe.weight[start:start + T]
        else:
            slot = torch.arange(start + T, device=idx.device)
            mask = slot >= cache.padding[:, None]  # (B, start + T)
            position = self.wpe((slot[start:] - cache.padding[:, None]).clamp(min=0))
        x = self.wte(idx) + position
        x = F.dropout(x, self.config.dropout, self.training)
        again = self.config.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, mask, use_reentrant=False) if again else block(x, mask, cache)
        return x

    def powers(self) -> list[float]:
        """The learned power p of C = diag(||A_i||^-p) by layer, the mean over its heads."""
        return [block.attn.power.mean().item() for block in self.blocks]

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Of one training step: 6 per weight of a matrix product (2 forward, 4 backward), and 12 C a layer for each column of the
        attention matrix: T of them for softmax, 2 x landmarks for nystrom, head_dim for linear."""
        c = self.config
        columns = {"softmax": c.block_size, "nystrom": 2 * c.landmarks, "linear": c.n_embd // c.n_head}[c.attention]
        return 6 * (self.n_parameters() - self.wpe.weight.numel()) + 12 * c.n_layer * c.n_embd * columns


class GPT(Transformer):
    """A causal language model over `vocab_size` tokens; the head is the embedding."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__(config, vocab_size, causal=True)
        self.head = None  # the embedding in another form, from fast.pack
        self.init_weights(std=0.02)  # GPT-2's

    @classmethod
    def from_checkpoint(cls, saved: dict) -> "GPT":
        """The model of a train.py checkpoint, in evaluation mode, on the CPU."""
        values = {f.name: saved["config"][f.name] for f in fields(ModelConfig) if f.name in saved["config"]}
        model = cls(ModelConfig(**values), saved["task"]["vocab_size"])
        model.load_state_dict(saved["model"])
        return model.eval()

    def forward(self, idx, targets=None, cache: KVCache | None = None):
        """Tokens (B, T) -> logits (B, T, vocab_size) and, with targets (B, T), the mean cross entropy in nats (else None).

        A target of -1 does not count. With targets and the chunked loss there are no logits: None.
        With a cache, idx follows the tokens in it (several at once only into an empty one) and the logits are the last token's, (B, 1, V).
        """
        if cache is not None and cache.length and idx.size(1) > 1:
            raise ValueError(f"{idx.size(1)} tokens at once after {cache.length} cached ones: feed them one by one")
        x = self.encode(idx, cache=cache)
        if cache is not None:
            cache.length += idx.size(1)
            x = x[:, -1:]
        x = self.ln_f(x)
        if targets is not None and self.loss == "chunked":
            return None, fast.head_loss(x, self.wte.weight, targets)
        logits = F.linear(x, self.wte.weight) if self.head is None else self.head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=fast.IGNORED)

    @property
    def loss(self) -> str:
        """"plain" or "chunked": what config.loss says, or what is faster or smaller."""
        if self.config.loss != "auto":
            return self.config.loss
        vocab_size, _ = self.wte.weight.shape
        return "chunked" if self.wte.weight.device.type == "cpu" and vocab_size >= fast.LARGE_VOCABULARY else "plain"


class Classifier(Transformer):
    """An encoder for sequences of class 0 ... n_classes - 1: mean over real tokens, then a two-layer head.

    towers=2 classifies pairs: both are encoded with the same weights, as a and b, and the head sees [a, b, a * b, a - b].
    """

    def __init__(self, config: ModelConfig, vocab_size: int, n_classes: int, towers: int = 1):
        super().__init__(config, vocab_size, causal=False)
        width, inner = config.n_embd * (4 if towers == 2 else 1), config.n_inner or 4 * config.n_embd
        self.head = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, n_classes))
        self.init_weights()

    def forward(self, x, mask, y=None):
        """Tokens and mask (B, T), or (B, 2, T) for pairs -> logits (B, n_classes) and, with labels y (B), the mean cross entropy."""
        T = x.size(-1)
        h = self.ln_f(self.encode(x.reshape(-1, T), mask.reshape(-1, T)))  # (B or 2 B, T, C)
        weight = mask.reshape(-1, T, 1)
        h = (h * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        if x.dim() == 3:
            a, b = h.view(-1, 2, h.size(-1)).unbind(dim=1)
            h = torch.cat([a, b, a * b, a - b], dim=-1)
        logits = self.head(h)
        return logits, None if y is None else F.cross_entropy(logits, y)
