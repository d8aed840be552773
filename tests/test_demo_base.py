"""The shipped base: small, whole, and able to copy facts and to tell wrong ones."""

from __future__ import annotations

import itertools

import torch

from rlhf.data.chat_format import ChatFormat
from rlhf.demo import catalogue
from rlhf.demo.replies import GOOD, write
from rlhf.demo.world import tickets
from rlhf.models.base import load_base
from rlhf.records import Message


def test_the_weights_are_within_four_mebibytes_and_the_pad_is_not_the_end():
    directory = catalogue.resolve_model("demo:base")
    assert (directory / "model.safetensors").stat().st_size <= 4 << 20
    chat = load_base("demo:base").chat
    assert chat.end_token == "<eos>" and chat.pad_token == "<pad>"


def test_prompt_and_response_tokenised_apart_are_the_joint_tokens():
    chat = load_base("demo:base").chat
    for row in catalogue.rows("demo:demonstrations?size=300"):
        prompt = (Message("user", row["prompt"]),)
        parts = [*chat.prompt_ids(prompt), *chat.response_ids(prompt, row["completion"]), chat.end_id]
        joint = f"<user>{row['prompt']}<bot>{row['completion']}<eos>"
        assert parts == chat.tokenizer(joint, add_special_tokens=False)["input_ids"]
        assert chat.decode(parts[len(chat.prompt_ids(prompt)) :]) == row["completion"]
    assert isinstance(chat, ChatFormat)


def test_the_base_continues_a_good_reply_with_the_facts_of_an_unseen_ticket():
    base = load_base("demo:base")
    right = 0
    chosen = list(itertools.islice(tickets("test", 1, "base-test"), 40))
    for ticket, rng in chosen:
        reply = write(ticket, GOOD, rng)
        for fact in (ticket.item, ticket.action, f"#{ticket.code}", ticket.name):
            start = f"<user>{ticket.text}<bot>{reply[: reply.index(fact) - 1]}"
            ids = base.tokenizer(start, add_special_tokens=False)["input_ids"]
            want = base.tokenizer(f" {fact}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = base.model(input_ids=torch.tensor([ids + want])).logits[0, len(ids) - 1 : -1]
            right += logits.argmax(-1).tolist() == want
    assert right / (4 * len(chosen)) > 0.9
