"""Detokenized text while tokens arrive: whole characters, and nothing of a stop text."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from mta.serving.api.schemas import AnswerText, CompletionRequest, ResponseFormatter
from mta.serving.api.streaming import Detokenizer
from mta.serving.engine import Token, Version, named


def byte_fallback_tokenizer(strip=False):
    """Like Gemma's and Llama's: characters that are not in the vocabulary are spelled in tokens of one byte."""
    known = ["<unk>", "\u2581", "a", "b", "\u2581a", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(
        models.BPE({word: n for n, word in enumerate(known)}, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return made


@given(st.text(alphabet="ab\u00e9\u20ac\U0001fae8 ", max_size=20), st.booleans())
def test_characters_spelled_in_bytes_are_those_of_the_whole_text(text, strip):
    made = byte_fallback_tokenizer(strip)
    shown, ids = Detokenizer(made), made.encode(text).ids
    assert "".join([*map(shown.add, ids), shown.end()]) == made.decode(ids)


@given(st.text(alphabet="ab ", min_size=1, max_size=20), st.integers(1, 20), st.booleans())
def test_an_answer_in_the_middle_of_a_text_keeps_its_first_space(text, split, strip):
    made = byte_fallback_tokenizer(strip)
    ids = made.encode(text).ids
    prompt, answer = ids[:split], ids[split:]
    shown = Detokenizer(made, before=prompt[-1:])
    assert made.decode(prompt) + "".join([*map(shown.add, answer), shown.end()]) == made.decode(ids)


def logprobs_formatter(made):
    request = CompletionRequest(model="task", prompt="x", logprobs=3)
    return ResponseFormatter(request, "task", PreTrainedTokenizerFast(tokenizer_object=made))


@pytest.mark.parametrize("strip", [False, True])
def test_tokens_with_log_probabilities_keep_their_spaces(strip):
    made = byte_fallback_tokenizer(strip)
    formatter = logprobs_formatter(made)
    tokens = tuple(Token(id, -1.0) for id in made.encode("b ab").ids)
    shown = formatter.choice([AnswerText("b ab", tokens, "stop")])["logprobs"]
    assert shown["tokens"] == ["b", " a", "b"]


def test_a_token_with_log_probabilities_is_decoded_once(monkeypatch):
    formatter, decoded = logprobs_formatter(byte_fallback_tokenizer(False)), []
    decode = formatter.tokenizer.decode
    monkeypatch.setattr(formatter.tokenizer, "decode", lambda ids: decoded.append(ids) or decode(ids))
    tokens = tuple(Token(3 + n % 5, -1.0, tuple((id, -2.0) for id in range(3, 13))) for n in range(50))
    shown = formatter.choice([AnswerText("", tokens, "stop")])["logprobs"]
    assert len(shown["tokens"]) == 50
    assert len(decoded) == 10


def pieces_of(text, stops=()):
    shown, made = Detokenizer(tokenizer(), stops), []
    for token in tokenizer()(text)["input_ids"]:
        made.append(shown.add(token))
        if shown.stopped:
            return made
    return [*made, shown.end()]


@given(st.text(max_size=30))
def test_pieces_are_whole_characters_and_add_up_to_the_text(text):
    pieces = pieces_of(text)
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces).replace(text, "")


@given(st.text(alphabet="abé€ ", max_size=20), st.lists(st.text(alphabet="abé€ ", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_first_stop_text(text, stops):
    """The stop text completed first counts, as if characters came one by one."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert "".join(pieces_of(text, stops)) == (text[: min(ends)[1]] if ends else text)


def test_invalid_bytes_do_not_block_a_stream():
    shown = Detokenizer(tokenizer())
    (byte,) = tokenizer()("\u00e9")["input_ids"][:1]
    assert any(shown.add(byte) for _ in range(5))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("person:ann", Version("ann")),
        ("person:ann@v3", Version("ann", 3)),
        ("person:ann#merged", Version("ann", stacked=False)),
        ("person:ann@v3#merged", Version("ann", 3, False)),
        ("person:ann@v3@v1", Version("ann@v3", 1)),
        ("person:ann%40v3", Version("ann@v3")),
        ("person:ann%23merged", Version("ann#merged")),
        ("person:a@v0", Version("a@v0")),
        ("person:../../etc", Version("../../etc")),
        ("person:", None),
        ("ann", None),
    ],
)
def test_model_names_are_parsed(model, expected):
    assert named(model, "base") == expected


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 999))
def test_every_version_of_every_id_can_be_named(id, version):
    quoted = quote(id, safe="")
    assert named(f"person:{quoted}@v{version}", "base") == Version(id, version)
    assert named(f"person:{quoted}", "base") == Version(id)


def test_of_tokens_with_the_same_text_the_likeliest_has_its_log_probability():
    made = byte_fallback_tokenizer()
    formatter = logprobs_formatter(made)
    half, other, whole = map(made.token_to_id, ("<0xE2>", "<0xE3>", "a"))
    token = Token(half, -0.5, ((half, -0.5), (other, -1.0), (whole, -3.0)))
    found = formatter.choice([AnswerText("?", (token,), "length")])["logprobs"]
    assert found["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -0.5, "a": -3.0}]
