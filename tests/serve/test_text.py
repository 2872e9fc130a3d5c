"""Text from tokens, as they come."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dora_cache.serving.server.text import TextStream


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer whose tokens are bytes, so that characters come in pieces."""
    vocabulary = {one: i for i, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    split = Tokenizer(models.BPE(vocabulary, []))
    split.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=split)


def parts(tokens, step):
    return [tokens[i : i + step] for i in range(0, len(tokens), step)]


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_pieces_of_text_are_the_text(bytewise, step):
    """Whatever tokens come together, the pieces are whole characters and add up to the text."""
    text = "naïve 猫が好き 🐈‍⬛ end"
    tokens = bytewise(text)["input_ids"]
    stream = TextStream(bytewise)
    pieces = [stream.feed(part) for part in parts(tokens, step)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.end() == text


def test_what_is_cut_off_is_the_decoders(bytewise):
    """Tokens that end within a character give what the tokenizer makes of them."""
    tokens = bytewise("a 猫 b")["input_ids"][:4]
    stream = TextStream(bytewise)
    text = "".join(stream.feed([token]) for token in tokens)
    assert text == "a "
    assert text + stream.end() == bytewise.decode(tokens)


@pytest.mark.parametrize("step", [1, 2, 3, 50])
def test_a_stop_sequence_is_never_shown(bytewise, step):
    """No piece has a part of a stop sequence, and what only looked like one is shown after all."""
    tokens = bytewise("one STO two STOSTOP three")["input_ids"]
    stream = TextStream(bytewise, ["STOP", "nothing"])
    pieces = [stream.feed(part) for part in parts(tokens, step)]
    assert "".join(pieces) + stream.end() == "one STO two STO"
    assert stream.stopped


def test_the_beginning_of_a_stop_sequence_is_held(bytewise):
    """What may become a stop sequence waits for the next token, or for the end."""
    stream = TextStream(bytewise, ["STOP"])
    assert stream.feed(bytewise("a ST")["input_ids"]) == "a "
    assert stream.end() == "ST"
    assert not stream.stopped
