"""Write text with a trained model.

    python sample.py                                              # from the best checkpoint in out/
    python sample.py --start="ROMEO:" --num_samples=5 --temperature=0.7
    python sample.py --start=FILE:prompt.txt --stop="\\n\\n" --out_dir=out-mine
"""
import codecs
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

import checkpoint
import config as options
from config import UserError
from data import text
from device import Compute
from model import GPT, KVCache


@dataclass
class Config:
    out_dir: Annotated[str, "folder of the run"] = "out"
    ckpt: Annotated[Literal["best", "latest"], "best by validation loss, where there is one, or the latest"] = "best"
    start: Annotated[str, "prompt, or FILE:path/to/prompt.txt"] = "\n"
    num_samples: Annotated[int, "samples, drawn in one batch; the first is shown as it is written"] = 3
    max_new_tokens: Annotated[int, "length of a sample in tokens"] = 500
    temperature: Annotated[float, "1: the model's distribution; below: more cautious; 0: always the likeliest token"] = 0.8
    top_k: Annotated[int, "choose among the k likeliest tokens; 0: all"] = 200
    top_p: Annotated[float, "choose among the likeliest tokens that hold this probability; 1: all"] = 1.0
    stop: Annotated[str, "end a sample before this text; \\n is a line end"] = ""
    seed: Annotated[int, "of the random choices"] = 1337
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], "of the forward pass"] = "auto"

    def __post_init__(self):
        if self.num_samples < 1 or self.max_new_tokens < 0:
            raise ValueError(f"num_samples={self.num_samples} must be at least 1 and max_new_tokens={self.max_new_tokens} not negative")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature} and top_k={self.top_k} must not be negative, top_p={self.top_p} in (0, 1]")


@torch.no_grad()
def generate(model: GPT, prompt: torch.Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             generator: torch.Generator | None = None) -> Iterator[torch.Tensor]:
    """Yield the next token of each sequence, (B,), max_new_tokens times, after `prompt` (B, T).

    The model sees at most block_size tokens. Keys and values are cached; when the window is full, its last half is kept and the cache
    computed anew, once for the next block_size / 2 tokens. temperature=0 is greedy; `generator` lives on the model's device.
    """
    block, T = model.config.block_size, prompt.size(1)
    tokens = torch.cat([prompt, prompt.new_empty(prompt.size(0), max_new_tokens)], dim=1)
    dtype = torch.get_autocast_dtype(prompt.device.type) if torch.is_autocast_enabled(prompt.device.type) else torch.float32
    cache = KVCache(model.config, prompt.size(0), prompt.device, dtype)
    new = prompt[:, -block:]
    for end in range(T, T + max_new_tokens):
        if cache.length == block:
            cache.length = 0
            new = tokens[:, end - max(1, block // 2):end]
        logits = model(new, cache=cache)[0][:, -1].float()
        new = choose(logits, temperature, top_k, top_p, generator)[:, None]
        tokens[:, end:end + 1] = new
        yield new[:, 0]


def choose(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Draw a token from each row of logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        excess = ordered.cumsum(dim=-1) - ordered >= top_p  # the tokens before this one suffice
        logits = logits.masked_fill(torch.zeros_like(excess).scatter(-1, index, excess), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


class Writer:
    """Turns the tokens of one sample into text as they come; characters of several tokens wait for their last one."""

    def __init__(self, tokenizer, stop: str):
        self.tokenizer, self.stop, self.text, self.shown, self.done = tokenizer, stop, "", 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Take a token; return the text that can be shown now: all but what may turn out to begin the stop text."""
        if self.done:
            return ""
        self.text += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        if self.stop and (at := self.text.find(self.stop)) >= 0:
            self.text, self.done = self.text[:at], True
            return self.show(len(self.text))
        held = next((n for n in range(len(self.stop) - 1, 0, -1) if self.text.endswith(self.stop[:n])), 0)
        return self.show(len(self.text) - held)

    def end(self) -> str:
        """The text that was still held back."""
        if not self.done:
            self.text += self.decoder.decode(b"", final=True)
            self.done = True
        return self.show(len(self.text))

    def show(self, until: int) -> str:
        part, self.shown = self.text[self.shown:until], max(self.shown, until)
        return part


def read_prompt(start: str) -> str:
    """The prompt itself, or the contents of the file that FILE:path names. Raises UserError."""
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        try:
            start = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"--start=FILE:{path}: no such file") from None
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--start=FILE:{path}: cannot be read as UTF-8 text ({e})") from None
    if not start:
        raise UserError("the prompt is empty: give at least one character with --start")
    return start


def main():
    config, _ = options.parse(Config, sys.argv[1:], __doc__)
    folder = Path(config.out_dir)
    best = config.ckpt == "best" and (folder / "best.pt").exists()
    saved = checkpoint.read(folder / ("best.pt" if best else "ckpt.pt"))
    if "tokenizer" not in saved.get("task", {}):
        raise UserError(f"{folder} holds no language model of train.py")
    tokenizer = text.load_tokenizer(saved["task"]["tokenizer"])
    prompt = read_prompt(config.start)
    ids = tokenizer.encode(prompt)
    with Compute(config.device, config.dtype, saved["config"]["n_embd"]) as compute:
        model = GPT.from_checkpoint(saved).to(compute.device)
        generator = torch.Generator(compute.device).manual_seed(config.seed)
        batch = torch.tensor([ids] * config.num_samples, device=compute.device)
        writers = [Writer(tokenizer, config.stop.replace("\\n", "\n")) for _ in range(config.num_samples)]
        print(prompt, end="", flush=True)
        with compute.autocast():
            for new in generate(model, batch, config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                                top_p=config.top_p, generator=generator):
                for i, (writer, token) in enumerate(zip(writers, new.tolist())):
                    part = writer.add(token)
                    if i == 0:
                        print(part, end="", flush=True)
                if all(writer.done for writer in writers):
                    break
        print(writers[0].end())
        for writer in writers[1:]:
            writer.end()
            print("-" * 20 + f"\n{prompt}{writer.text}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `| head` has seen enough
    options.run(main, text.DataError)
