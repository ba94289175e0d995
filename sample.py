"""Write text with a trained model.

    python sample.py                                        # from the best checkpoint in out/
    python sample.py --start="ROMEO:" --num_samples=5 --temperature=0.7
    python sample.py --start=FILE:prompt.txt --stop="\\n\\n" --out_dir=out-mine
    python sample.py --start=LINES:prompts.txt              # a prompt a line
    python sample.py --init_from=gpt2-xl --start="What is"  # OpenAI's GPT-2
"""
import engine.startup  # noqa: F401  (first: it answers mistakes before PyTorch is loaded)

# isort: split
import codecs
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from data.tokenizers import Tokenizer, load_tokenizer
from engine import checkpoint, options, pretrained
from engine.device import DTYPES, Compute, ComputeConfig
from engine.kv_cache import KVCache
from engine.options import UserError, at_least, in_range, not_empty
from engine.packed import for_sampling
from model import GPT

# Samples drawn at once: at most so many, whose keys and values take at most so many bytes.
MOST = 256
CACHE = 2**31
SEPARATOR = "-" * 20
COLDEST = 1e-5  # a lower temperature is 0: the likeliest token has all the probability
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


@dataclass
class Config(ComputeConfig):
    init_from: Annotated[str, "resume: the run in out_dir; or gpt2, gpt2-medium, gpt2-large, "
                              "gpt2-xl, or a Hugging Face GPT-2 folder", not_empty] = "resume"
    out_dir: Annotated[str, "folder of the run", not_empty] = "out"
    ckpt: Annotated[Literal["best", "latest"],
                    "best: the lowest validation loss, where it is kept; or the latest"] = "best"
    start: Annotated[str, "prompt, FILE:path/to/prompt.txt, or LINES:path/to/prompts.txt, a "
                          "prompt a line. In a prompt, \\n is a line end, \\t a tab, \\\\ a "
                          "backslash; <|endoftext|> is a token of GPT-2's"] = "\n"
    num_samples: Annotated[int, "samples for each prompt, drawn in batches; a batch's first one is "
                                "shown as it is written", at_least(1)] = 3
    max_new_tokens: Annotated[int, "length of a sample in tokens", at_least(0)] = 500
    temperature: Annotated[float, "1: the model's distribution; below: more cautious; 0: always "
                                  "the likeliest token", at_least(0)] = 0.8
    top_k: Annotated[int, "choose among the k likeliest tokens; 0: all", at_least(0)] = 200
    top_p: Annotated[float, "choose among the likeliest tokens that hold this probability; 1: all",
                     in_range(0, 1, closed="high")] = 1.0
    stop: Annotated[str, "end a sample before this text, written like a prompt; empty: go on to "
                         "max_new_tokens"] = "<|endoftext|>"
    seed: Annotated[int, "seed for the random choices", options.seed] = 1337


@torch.inference_mode()  # cheaper operator calls than no_grad: most of a small model's time
def generate(model: GPT, prompt: torch.Tensor, max_new_tokens: int, *,
             padding: torch.Tensor | None = None, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, generator: torch.Generator | None = None
             ) -> Iterator[torch.Tensor]:
    """Yield the next token of each sequence, (B,), max_new_tokens times, after `prompt` (B, T).

    Prompts of different length end together: row i begins with padding[i] tokens of any value
    that count for nothing (see `stack`). The model sees at most block_size tokens. With padding
    the window is full for all when it is for the longest. temperature=0 is greedy; `generator`
    lives on the model's device.
    """
    block = model.config.block_size
    tokens = new = prompt[:, -block:]  # all that the model still sees, and what it has not yet seen
    cut = prompt.size(1) - tokens.size(1)
    # Keys and values in the dtype of the model's weights.
    cache = KVCache(model.config, len(prompt), prompt.device, model.wte.weight.dtype)
    for _ in range(max_new_tokens):
        if cache.length == block:
            # Positions are learned, so a window that moves by a token would be computed anew for
            # each. Keeping its last half, that happens once in block_size / 2 tokens.
            cache.length = 0
            new = tokens[:, -max(1, block // 2):]
            cut += tokens.size(1) - new.size(1)
            tokens = new
        if cache.length == 0 and padding is not None:
            cache.padding = (padding - cut).clamp(min=0)
        logits = model(new, cache=cache)[0][:, -1].float()  # (B, V)
        new = choose(logits, temperature, top_k, top_p, generator)[:, None]  # (B, 1)
        tokens = torch.cat([tokens, new], dim=1)  # (B, at most block + 1)
        yield new[:, 0]


def stack(prompts: list[list[int]], device=None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts -> tokens (B, T), filled up with 0 in front, and padding (B,), how many each has.

    The padding is None where all are of one length.
    """
    T = max(map(len, prompts))
    tokens = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)
    padding = torch.tensor([T - len(p) for p in prompts], device=device)
    return tokens, padding if padding.any() else None


def choose(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator | None) -> torch.Tensor:
    """Draw a token from each row of logits (B, V) -> (B,)."""
    if temperature < COLDEST:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    tokens = None
    if 0 < top_k < logits.size(-1):
        # Drawing among all of a large vocabulary takes a random number for each word.
        logits, tokens = logits.topk(top_k)  # (B, top_k)
    if top_p < 1:
        ordered, index = logits.softmax(dim=-1).sort(descending=True)
        excess = ordered.cumsum(dim=-1) - ordered >= top_p  # the tokens before this one suffice
        excess[:, 0] = False  # even where top_p is too small for float32
        excess = torch.zeros_like(excess).scatter(-1, index, excess)
        logits = logits.masked_fill(excess, -torch.inf)
    drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)  # (B, 1)
    if tokens is not None:
        drawn = tokens.gather(-1, drawn)
    return drawn[:, 0]


class TextStream:
    """Turns one sample's tokens into text as they come.

    A character of several tokens waits for its last one.
    """

    def __init__(self, tokenizer, stop: str):
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""
        self.shown = 0  # characters of the text
        self.done = False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Take a token; return the text that can be shown now.

        That is all but what may turn out to begin the stop text.
        """
        if self.done:
            return ""
        self.text += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        at = self.text.find(self.stop, self.shown) if self.stop else -1
        if at >= 0:
            self.text = self.text[:at]
            self.done = True
            return self.show(at)
        begins = (n for n in range(len(self.stop)) if self.text.endswith(self.stop[:n]))
        return self.show(len(self.text) - max(begins, default=0))

    def end(self) -> str:
        """The text that was still held back."""
        if not self.done:
            self.text += self.decoder.decode(b"", final=True)
            self.done = True
        return self.show(len(self.text))

    def show(self, end: int) -> str:
        part = self.text[self.shown:end]
        self.shown = end
        return part


def unescape(text: str) -> str:
    """What a shell's word can hardly hold is written as in Python: \\n, \\t, \\\\."""
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], text)


def read_prompts(start: str) -> list[str]:
    """The prompt itself, the content of FILE:path, or the lines of LINES:path. Raises UserError."""
    kind, _, path = start.partition(":")
    content = unescape(start)
    if kind in ("FILE", "LINES"):
        try:
            content = Path(path).read_bytes().decode("utf-8-sig")  # keeps \r, as training does
        except FileNotFoundError:
            raise UserError(f"--start={start}: no such file") from None
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--start={start}: cannot be read as UTF-8 text ({e})") from None
    prompts = content.replace("\r\n", "\n").split("\n") if kind == "LINES" else [content]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError("the prompt is empty: give at least one character with --start")
    return prompts


def write(model: GPT, tokenizer: Tokenizer, prompts: list[str], config: Config,
          generator: torch.Generator):
    """Print a sample for each prompt, all drawn at once, the first one as it is written."""
    block = model.config.block_size
    rows = [tokenizer.encode_prompt(prompt)[-block:] for prompt in prompts]
    batch, padding = stack(rows, generator.device)
    streams = [TextStream(tokenizer, unescape(config.stop)) for _ in prompts]
    print(prompts[0], end="", flush=True)
    for new in generate(model, batch, config.max_new_tokens, padding=padding,
                        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                        generator=generator):
        parts = [stream.add(token) for stream, token in zip(streams, new.tolist())]
        print(parts[0], end="", flush=True)
        if all(stream.done for stream in streams):
            break
    print(streams[0].end())
    for prompt, stream in zip(prompts[1:], streams[1:]):
        stream.end()
        print(f"{SEPARATOR}\n{prompt}{stream.text}")


def open_model(config: Config) -> tuple[GPT, Tokenizer]:
    """What `init_from` names, on the CPU. Raises UserError."""
    if config.init_from == "resume":
        folder = Path(config.out_dir)
        saved = checkpoint.read_language_model(folder, best=config.ckpt == "best")
        model = pretrained.from_checkpoint(saved, folder)
        state = saved["task"]["tokenizer"]
    else:
        model = pretrained.load(config.init_from)
        state = pretrained.read_tokenizer(config.init_from, len(model.wte.weight))
        if state is None:
            raise UserError(f"{config.init_from} has no tokenizer.json: save the model's "
                            "tokenizer in the folder too")
    tokenizer = load_tokenizer(state)
    pretrained.check_tokenizer(tokenizer, len(model.wte.weight))
    return model, tokenizer


def main():
    config, _ = options.parse(Config, sys.argv[1:], __doc__)
    prompts = read_prompts(config.start)
    model, tokenizer = open_model(config)
    if config.start == Config.start:
        prompts = [tokenizer.opening()]
    c = model.config
    with Compute(config.device, config.dtype, c.n_embd) as compute:
        model = for_sampling(model, compute.device, DTYPES[compute.dtype])
        generator = torch.Generator(compute.device).manual_seed(config.seed)
        at_once = max(1, min(MOST, CACHE // (8 * c.n_layer * c.block_size * c.n_embd)))
        total = len(prompts) * config.num_samples
        for first in range(0, total, at_once):
            if first:
                print(SEPARATOR)
            samples = range(first, min(first + at_once, total))
            batch = [prompts[i // config.num_samples] for i in samples]
            write(model, tokenizer, batch, config, generator)


if __name__ == "__main__":
    options.run(main)
