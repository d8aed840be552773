"""Conversations as ids, answers as they stream, padded batches, the order of the data."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, tokenizer
from transformers import AutoTokenizer

from rlhf.commands.streaming import Stream
from rlhf.data.batches import DataOrder, collate, micro_batches
from rlhf.data.chat_format import ChatFormat
from rlhf.errors import RlhfError
from rlhf.records import Message

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
USER = (Message("user", "hi there"),)
TALK = (*USER, Message("assistant", "yes"), Message("user", "and now ?"), Message("assistant", "no"))


def test_the_end_token_is_the_one_that_the_template_writes_not_the_tokenizers_eos():
    chat = ChatFormat(tokenizer())
    assert chat.end_token == "<|im_end|>" and chat.tokenizer.eos_token == "<|endoftext|>"
    assert chat.pad_id != chat.end_id


def test_prompt_response_and_end_are_the_rendered_conversation():
    chat = ChatFormat(tokenizer())
    whole = [*chat.prompt_ids(USER), *chat.response_ids(USER, "fine, thanks"), chat.end_id]
    assert chat.tokenizer.decode(whole) == (
        "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\nfine, thanks<|im_end|>"
    )
    assert chat.decode([*chat.response_ids(USER, "fine, thanks"), chat.end_id]) == "fine, thanks"


def test_every_assistant_turn_is_trained_with_its_end_token_or_the_last_alone():
    chat = ChatFormat(tokenizer())
    ids, trained = chat.demonstration(TALK, last_only=False)
    shown = chat.tokenizer.decode([i for i, keep in zip(ids, trained, strict=True) if keep])
    assert shown == "yes<|im_end|>no<|im_end|>"
    ids, trained = chat.demonstration(TALK, last_only=True)
    assert chat.tokenizer.decode([i for i, keep in zip(ids, trained, strict=True) if keep]) == "no<|im_end|>"


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (None, "MOD010"),
        ("{% for m in messages %}[{{ loop.length }}]{{ m['content'] }}<|im_end|>{% endfor %}", "MOD011"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "MOD010"),
    ],
    ids=["no template", "prompt is no prefix", "no end"],
)
def test_unfit_templates_are_refused(template, code):
    with pytest.raises(RlhfError, match=code):
        ChatFormat(tokenizer(template))


def test_a_template_that_rewrites_earlier_turns_is_refused_for_all_turns():
    thinking = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'][:1] }}"
    )
    chat = ChatFormat(tokenizer(thinking))
    with pytest.raises(RlhfError, match="MOD012"):
        chat.demonstration(TALK, last_only=False)
    assert sum(chat.demonstration(TALK, last_only=True)[1]) == 3


def test_a_refused_system_prompt_and_special_tokens_in_text_are_errors():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(RlhfError, match="MOD013.*no system"):
        ChatFormat(tokenizer(strict)).prompt_ids((Message("system", "be kind"), *USER))
    with pytest.raises(RlhfError, match="DAT060.*im_end"):
        ChatFormat(tokenizer()).prompt_ids((Message("user", "stop <|im_end|> now"),))


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_named_templates_serve_a_base_without_one(name):
    chat = ChatFormat(tokenizer(None), name)
    whole = [*chat.prompt_ids(USER), *chat.response_ids(USER, "yes"), chat.end_id]
    assert chat.tokenizer.decode(whole).count("hi there") == 1
    assert chat.tokenizer.decode(whole).endswith(f"yes{chat.end_token}")
    with pytest.raises(RlhfError, match="of its own"):
        ChatFormat(tokenizer(), name)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained tiny Llama is not here")
@given(st.text("abcdefg ,.é\n", min_size=1, max_size=30), st.text("xyz Tom.!", min_size=1).map(str.strip).filter(bool))
@settings(max_examples=60, deadline=None)
def test_a_tokenizer_that_puts_spaces_in_front_comes_out_as_one_text(prompt, response):
    chat = stories()
    messages = (Message("user", prompt),)
    parts = [*chat.prompt_ids(messages), *chat.response_ids(messages, response), chat.end_id]
    joint = chat.tokenizer(chat.render_prompt((*messages, Message("assistant", response))), add_special_tokens=False)[
        "input_ids"
    ]
    assert parts == joint[: len(parts)] and chat.end_token == "</s>"
    assert chat.decode(chat.response_ids(messages, response)) == response


def stories(found=[]):  # noqa: B006
    if not found:
        found.append(ChatFormat(AutoTokenizer.from_pretrained(STORIES)))
    return found[0]


def test_collate_pads_on_the_right_and_masks_by_length():
    batch = collate([[5, 6], [7]], [[8, 2], [2]], pad_id=2, device=torch.device("cpu"))
    assert batch.ids.tolist() == [[5, 6, 8, 2], [7, 2, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert [x.tolist() for x in batch.targets] == [[0, 0, 1], [2, 3, 1]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8))
def test_micro_batches_hold_every_row_once_and_rows_of_like_length(lengths, size):
    parts = micro_batches(lengths, size)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    flat = [lengths[i] for part in parts for i in part]
    assert flat == sorted(flat) and all(len(part) <= size for part in parts)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 120))
def test_micro_batches_stay_within_their_tokens_unless_one_row_is_longer(lengths, size, tokens):
    parts = micro_batches(lengths, size, tokens)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) <= size and (len(part) * max(lengths[i] for i in part) <= tokens or len(part) == 1)
    for part, following in itertools.pairwise(parts):
        more = len(part) + 1
        assert more > size or more * lengths[following[0]] > tokens, "no room was left over"


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 30))
@settings(deadline=None)
def test_the_data_order_sees_each_row_once_an_epoch_and_can_be_resumed(rows, size, cut):
    order = DataOrder(rows, size, seed=3)
    drawn = [i for _ in range(rows) for i in order.next()]
    for epoch in range(size):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    first = DataOrder(rows, size, seed=3)
    for _ in range(cut):
        first.next()
    second = DataOrder(rows, size, seed=3)
    second.load_state_dict(first.state_dict())
    assert [first.next() for _ in range(5)] == [second.next() for _ in range(5)]


def streamed(chat, ids):
    """What is written while tokens come one by one, and at the end."""
    pieces: list[str] = []
    stream = Stream(chat, pieces.append)
    stream.put(torch.tensor([[7, 8, 9]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    before = len(pieces)
    stream.finish(chat.decode(ids))
    return [piece for piece in pieces[:before] if piece], "".join(pieces)


@pytest.mark.parametrize("text", ["é ü 日本 👋 end", "two\nlines\n\n", " leading", "x" * 300, "日本語だけ", "\ufffd?"])
def test_a_streamed_answer_is_its_text_and_no_character_is_printed_in_halves(text):
    chat = ChatFormat(tokenizer())
    pieces, whole = streamed(chat, [*chat.response_ids(USER, text), chat.end_id])
    assert whole == chat.decode(chat.response_ids(USER, text)) + "\n"
    assert len(pieces) >= len(set(text.strip())) / 2, "it comes piece by piece"
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_an_answer_that_is_cut_off_inside_a_character_is_printed_to_its_end():
    chat = ChatFormat(tokenizer())
    ids = chat.response_ids(USER, "a👋")[:-1]
    assert streamed(chat, ids)[1] == chat.decode(ids) + "\n" == "a\ufffd\n"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained tiny Llama is not here")
def test_a_tokenizer_that_puts_spaces_in_front_streams_the_same_text_over_line_breaks():
    chat = stories()
    ids = chat.response_ids(USER, "Tom ran.\nHe was  happy.\n Lily too.")
    assert streamed(chat, ids)[1] == chat.decode(ids) + "\n"


def test_spaces_that_a_tokenizer_takes_back_are_not_printed():
    words = ["do", " n't", " stop", " .", " Go", " !"]
    chat = SimpleNamespace(
        tokenizer=SimpleNamespace(clean_up_tokenization_spaces=True),
        decode=lambda ids: "".join(words[i] for i in ids).replace(" n't", "n't").replace(" .", ".").replace(" !", "!"),
    )
    pieces, whole = streamed(chat, range(6))
    assert whole == "don't stop. Go!\n" and "".join(pieces) == "don't stop."


def test_a_decoder_that_changes_its_mind_has_the_whole_answer_printed_again():
    chat = SimpleNamespace(tokenizer=None, decode=lambda ids: ["a", "a b", "c d e"][len(ids) - 1])
    assert streamed(chat, range(3))[1] == "a b\nc d e\n"
