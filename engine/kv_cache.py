"""The keys and values of tokens that a language model has seen, for sampling."""
import torch


class KVCache:
    """Allocated once: for each layer (2, B, n_head, block_size, head_dim). `padding` (B,) says how
    many of the first tokens of each sequence are none of its own, so that prompts of different
    length can end together.
    """

    def __init__(self, config, batch: int, device=None, dtype=torch.float32,
                 padding: torch.Tensor | None = None):
        head_dim = config.n_embd // config.n_head
        shape = (2, batch, config.n_head, config.block_size, head_dim)
        self.kv = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = 0
        self.padding = padding

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store keys and values (B, n_head, T, head_dim) of new tokens; (2, ...) of all so far."""
        end = self.length + k.size(-2)
        self.kv[layer][0, :, :, self.length:end].copy_(k)
        self.kv[layer][1, :, :, self.length:end].copy_(v)
        return self.kv[layer].narrow(-2, 0, end)
