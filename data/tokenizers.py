"""Tokenizers: text <-> token ids. Characters, bytes, and GPT-2's byte pairs.

    tokenizer = load_tokenizer({"name": "char", "chars": " abc"})
    tokenizer.decode(tokenizer.encode("a cab"))
"""
import re

from engine.options import DataError

REPLACEMENT = "\ufffd".encode()


class Tokenizer:
    """Text <-> token ids in [0, vocab_size).

    `encode` takes text as a corpus has it, `encode_prompt` as a person types it. `decode` takes any
    ids: those outside the vocabulary (the padding of a model's embedding) become U+FFFD, and so do
    bytes that are not UTF-8. `eot` is the end-of-text token, None where there is none.
    `load_tokenizer(tokenizer.state())` is the same tokenizer.
    """
    name: str
    eot: int | None = None

    def __init__(self, table: list[bytes]):
        self.table = table  # the bytes of each token
        self.vocab_size = len(table)

    def state(self) -> dict:
        return {"name": self.name}

    def opening(self) -> str:
        """The prompt where none is given: one that can be encoded."""
        return "\n"

    def encode_prompt(self, text: str) -> list[int]:
        """The same as `encode`, but "<|endoftext|>" is the end-of-text token where there is one."""
        return self.encode(text)

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.table[i] if 0 <= i < self.vocab_size else REPLACEMENT for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class CharTokenizer(Tokenizer):
    """One token for each character of `chars`."""
    name = "char"

    def __init__(self, chars: str):
        super().__init__([char.encode(errors="surrogatepass") for char in chars])
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}

    def state(self) -> dict:
        return {"name": self.name, "chars": self.chars}

    def opening(self) -> str:
        return "\n" if "\n" in self.ids else self.chars[0]  # a text can lack line ends

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            raise DataError(f"the character {error.args[0]!r} is not among the {self.vocab_size} "
                            "of the training text: leave it out, or train with --tokenizer=bytes "
                            "or --tokenizer=gpt2, which take every character") from None


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8."""
    name = "bytes"

    def __init__(self):
        super().__init__([bytes([i]) for i in range(256)])

    def encode(self, text: str) -> list[int]:
        # In a str, U+DC80 ... U+DCFF are the undecodable bytes of a command line: these become
        # themselves again. Other surrogates stand for nothing.
        text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
        return list(text.encode("utf-8", errors="surrogateescape"))


class GPT2Tokenizer(Tokenizer):
    """GPT-2's 50257 byte pairs, through tiktoken; "<|endoftext|>" in a corpus is plain text."""
    name = "gpt2"

    def __init__(self):
        import tiktoken
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network; a damaged download
            download = ("TIKTOKEN_CACHE_DIR=FOLDER python -c "
                        "'import tiktoken; tiktoken.get_encoding(\"gpt2\")'")
            raise DataError(f"the gpt2 vocabulary is not at hand ({type(error).__name__} while "
                            f"downloading it): run `{download}` where there is a network, copy "
                            "FOLDER here, and set TIKTOKEN_CACHE_DIR to it") from error
        ids = range(self.encoding.n_vocab)
        super().__init__([self.encoding.decode_single_token_bytes(i) for i in ids])
        self.eot = self.encoding.eot_token

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_prompt(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")


def load_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer of a `state()`, or of a whole meta.json.

    Raises DataError where the state is of no tokenizer or gpt2's vocabulary is missing.
    """
    match state:
        case {"tokenizer": inner}:
            return load_tokenizer(inner)
        case {"name": "char", "chars": str(chars)}:
            return CharTokenizer(chars)
        case {"name": "bytes"}:
            return ByteTokenizer()
        case {"name": "gpt2"}:
            return GPT2Tokenizer()
        case {"name": name} if name != "char":
            raise DataError(f"unknown tokenizer {name!r}: choose char, bytes or gpt2")
    raise DataError(f"a damaged description of a tokenizer: {str(state)[:80]}")
