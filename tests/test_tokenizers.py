"""data/tokenizers.py: every text comes back, and what is no tokenizer is said."""
import json
import os

import numpy as np
import pytest

from data.text import load_tokenizer, prepare
from engine.options import DataError
from prepared_text import MIXED


@pytest.mark.parametrize("name", ["char", "bytes", "gpt2"])
def test_tokenizers_give_back_every_text_and_survive_json(name, request):
    if name == "gpt2":
        request.getfixturevalue("gpt2")
    tokenizer = load_tokenizer({"name": name, "chars": "".join(sorted(set(MIXED)))})
    ids = tokenizer.encode(MIXED)
    again = load_tokenizer(json.loads(json.dumps(tokenizer.state())))
    assert again.name == name and again.encode(MIXED) == ids and max(ids) < again.vocab_size
    assert again.decode(np.array(ids)) == MIXED and again.decode_bytes(ids) == MIXED.encode()
    within = load_tokenizer({"tokenizer": tokenizer.state(), "vocab_size": 1})
    assert within.encode("Eva") == tokenizer.encode("Eva")
    for outside in (tokenizer.vocab_size, 50303, -1):
        assert tokenizer.decode([ids[0], outside, ids[0]]) == f"{MIXED[0]}\ufffd{MIXED[0]}"
    assert {"char": len(set(MIXED)), "bytes": 256, "gpt2": 50257}[name] == tokenizer.vocab_size


def test_half_a_character_is_replaced_and_bytes_of_the_command_line_come_back():
    tokenizer = load_tokenizer({"name": "bytes"})
    assert tokenizer.decode([0xe6, 0x97, 65]) == "\ufffdA"
    for encode in tokenizer.encode, tokenizer.encode_prompt:
        assert encode(os.fsdecode(b"\xff!")) == [0xff, ord("!")]
        assert encode("\ud800!\udfff") == encode("\ufffd!\ufffd")


def test_undecodable_bytes_are_replaced_for_gpt2_and_named_for_characters(gpt2):
    for encode in gpt2.encode, gpt2.encode_prompt:
        assert encode(os.fsdecode(b"\xff!")) == encode("\ufffd!")
    with pytest.raises(DataError, match=r"character '\\udcff' is not among the 2") as error:
        load_tokenizer({"name": "char", "chars": "ab"}).encode_prompt(os.fsdecode(b"a\xff"))
    assert str(error.value).isascii()


def test_a_prompt_can_hold_the_end_of_text_token(gpt2):
    prompt = "<|endoftext|>Once <|endoftext|><|endofprompt|>"
    ids = gpt2.encode_prompt(prompt)
    assert ids[0] == gpt2.eot == 50256 and ids.count(50256) == 2
    assert [i for i in ids if i != 50256] == gpt2.encode("Once ") + gpt2.encode("<|endofprompt|>")
    assert gpt2.decode(ids) == prompt
    assert 50256 not in gpt2.encode(prompt)  # a corpus that speaks of the token does not end there
    characters = load_tokenizer({"name": "char", "chars": "".join(set(prompt))})
    for plain in load_tokenizer({"name": "bytes"}), characters:
        assert plain.eot is None and plain.encode_prompt(prompt) == plain.encode(prompt)


def test_unknown_character_and_unknown_tokenizer_are_named():
    with pytest.raises(DataError, match=r"character 'é' is not among the 2 .* --tokenizer=bytes"):
        load_tokenizer({"name": "char", "chars": "ab"}).encode("abé")
    with pytest.raises(DataError, match="unknown tokenizer 'words': choose char, bytes or gpt2"):
        load_tokenizer({"name": "words"})
    with pytest.raises(DataError, match="unknown tokenizer 'words'"):
        prepare("shakespeare", tokenizer="words")


def test_missing_vocabulary_says_how_to_get_it(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match="ConnectionError.*TIKTOKEN_CACHE_DIR") as error:
        load_tokenizer({"name": "gpt2"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", [5, None, [], "char", {}, {"name": "char"}, {"tokenizer": 5},
                                   {"name": "char", "chars": 5}, {"name": ["char"]}])
def test_the_state_of_no_tokenizer_is_one_line(state):
    with pytest.raises(DataError, match="tokenizer") as error:
        load_tokenizer(state)
    assert "\n" not in str(error.value)


def test_half_a_surrogate_pair_among_the_characters_breaks_nothing():
    assert load_tokenizer({"name": "char", "chars": "a\ud800"}).decode([0, 1]).startswith("a\ufffd")
