"""Conversations as token ids: one way of tokenising in SFT, reward modelling, PPO and scoring."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

from rlhf.config import thinking as thoughts
from rlhf.data import rendering as renderings
from rlhf.data.rendering import Rendering
from rlhf.errors import Problem, RlhfError
from rlhf.records import Message, Messages

log = logging.getLogger("rlhf")
SENTINEL = "zebra quartz"
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token or '' }}{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}"
        "{{ eos_token }}{% else %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}


class ChatFormat:
    """How a tokenizer's chat template writes conversations; ``date``: what it prints for today, None if nothing.

    A training sequence is ids(prompt) + ids(response) + end token. The end token is the one that the template really
    writes after an assistant turn, found by rendering a sentinel; whatever follows it belongs to no response. Sampling
    also ends at any other token of ``end_ids``; such an end is read as the template's.

    Args:
        template: a named default for a tokenizer that has no template of its own.
        context_length: how many tokens the model was made for; None: no limit is known.
        rendering: what the model section says besides.

    Raises:
        RlhfError: MOD010 without a template, MOD010, MOD011 or MOD014 with one that does not show where a response
            begins and ends, MOD015 with one that writes the token at the beginning twice, MOD016 with one whose date
            cannot be kept.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        context_length: int | None = None,
        rendering: Rendering = Rendering(),
    ) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        own = tokenizer.chat_template
        if template is None and not own:
            fix = f"model.chat_template: one of {', '.join(TEMPLATES)}"
            raise RlhfError(Problem("MOD010", "tokenizer", "has no chat template.", fix))
        if template is not None and own:
            what = f"has a chat template of its own, so {template} would not be what it was trained with."
            raise RlhfError(Problem("MOD010", "model.chat_template", what, "model.chat_template: null"))
        if template == "chatml":
            self._require_chatml()
        self.template_name, self.template = template, TEMPLATES[template] if template else None
        self._text = self.template or str(tokenizer.get_chat_template())
        self.date = (rendering.date or renderings.today()) if renderings.prints_date(self._text) else None
        if self.date:
            self._text = renderings.on_day(self._text, self.date)
        self.thinking, self.thinking_marks = rendering.thinking, thoughts.marks_of(self._text)
        self._said_stripped = False
        self._kwargs = dict(rendering.kwargs)
        self._given = rendering.given_to(self._text)
        self._encode_cached = lru_cache(maxsize=4096)(self._encode)
        probe = (Message("user", "hello there"), Message("assistant", SENTINEL))
        self._head_matches(probe)
        rendered = self._render(probe, False)
        self.tail = rendered[rendered.rindex(SENTINEL) + len(SENTINEL) :]
        tail_ids = self._encode(self.tail.lstrip(" "))
        if not tail_ids:
            what, fix = "writes nothing after an assistant turn: a model that learns it never stops.", "another one"
            if tokenizer.eos_token is None:
                fix = "a template with an end token of its own: this tokenizer has no eos_token"
            raise RlhfError(Problem("MOD010", "chat template", what, fix))
        self.end_id = tail_ids[0]
        self.end_token = str(tokenizer.convert_ids_to_tokens(self.end_id))
        if self.end_id not in {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}:
            what = f"writes {self.tail!r} after an assistant turn, which text may contain: no response could hold it."
            raise RlhfError(Problem("MOD014", "chat template", what, "a template that ends turns with a special token"))
        ends = [str(token) for token in rendering.ends or () if token != self.end_token]
        self.end_tokens = (self.end_token, *ends)
        self.end_ids = (self.end_id, *(int(tokenizer.convert_tokens_to_ids(token)) for token in ends))
        self._control = self._control_tokens(rendered)
        self._refuse_two_beginnings(probe[:1])
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        self.pad_token = tokenizer.convert_ids_to_tokens(self.pad_id)
        head, body = self._render(probe[:1], True), self._body(probe[:1], SENTINEL)
        separate = [*self._encode(head), *self._encode(body)]
        self._joint = separate != self._encode(head + body) and self._encode(head + body)[
            : len(self._encode(head))
        ] == self._encode(head)

    @property
    def has_thinking_switch(self) -> bool:
        return thoughts.SWITCH in self._text

    @property
    def unread_kwargs(self) -> list[str]:
        """Variables that the template is given and does not name."""
        return [name for name in self._given if name not in self._text]

    @property
    def marks(self) -> list[str]:
        """The control tokens of a rendered conversation, the end token too, without the one at its beginning."""
        turns = (Message("user", "hello there"), Message("assistant", SENTINEL), Message("user", "hello there"))
        rendered, begin = self._render(turns, True), self.tokenizer.bos_token
        return [token for token in self._control if token in rendered and (token != begin or token == self.end_token)]

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of the rendered conversation with the opening of the answer."""
        self._refuse_special(messages)
        return list(self._encode_cached(self._render(self._read(messages), True)))

    def response_ids(self, messages: Messages, text: str) -> list[int]:
        """Ids of a response to ``messages``, without the end token."""
        self._refuse_special((Message("assistant", text),))
        messages, text = self._read(messages), self._read((Message("assistant", text),))[0].content
        body = self._body(messages, text)
        if not self._joint:
            return list(self._encode(body))
        head = self._render(messages, True)
        prompt, whole = list(self._encode_cached(head)), list(self._encode(head + body))
        if whole[: len(prompt)] != prompt:
            what = "joins the last token of a prompt with the first of its response."
            raise RlhfError(
                Problem("MOD011", "tokenizer", what, "a template that ends the prompt with a special token")
            )
        return whole[len(prompt) :]

    def demonstration(self, messages: Messages, last_only: bool) -> tuple[list[int], list[bool]]:
        """Ids of a conversation that ends with an assistant turn, and which of them carry loss.

        Every assistant turn and its end token is trained, or only the last one.

        Raises:
            RlhfError: MOD012 if the template writes an earlier turn differently once the conversation goes on.
        """
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        last = turns[-1]
        ids = [
            *self.prompt_ids(messages[:last]),
            *self.response_ids(messages[:last], messages[last].content),
            self.end_id,
        ]
        trained = [False] * len(ids)
        for index in [last] if last_only else turns:
            start = len(self.prompt_ids(messages[:index]))
            answer = [*self.response_ids(messages[:index], messages[index].content), self.end_id]
            if ids[start : start + len(answer)] != answer:
                what = "writes an earlier turn differently once the conversation goes on."
                raise RlhfError(Problem("MOD012", "chat template", what, "loss_on: last_turn, or single-turn data"))
            trained[start : start + len(answer)] = [True] * len(answer)
        return ids, trained

    def decode(self, ids: list[int]) -> str:
        """Text of a response, without its end token and without the space that a template puts in front; with its
        thinking where that is kept."""
        thought, answer = self.thought_and_answer(ids)
        return thoughts.join(thought, answer) if self.thinking == "keep" else answer

    def thought_and_answer(self, ids: list[int]) -> tuple[str, str]:
        """The same in two parts; no thinking where the template knows none."""
        kept = ids[:-1] if ids and ids[-1] == self.end_id else ids
        if self.thinking_marks is None:
            return "", str(self.tokenizer.decode(kept, skip_special_tokens=True)).removeprefix(" ")
        parts = thoughts.split(str(self.tokenizer.decode(kept)), self.thinking_marks)
        for token in self.tokenizer.all_special_tokens:
            parts = (parts[0].replace(token, ""), parts[1].replace(token, ""))
        return parts[0], parts[1].removeprefix(" ")

    def same_tokens(self, other: ChatFormat) -> bool:
        """Whether the other one writes every conversation in the same ids, as far as vocabulary and template tell."""
        alike = (self._text, self._given) == (other._text, other._given)
        return alike and self.tokenizer.get_vocab() == other.tokenizer.get_vocab()

    def is_rendered_as(self, thinking: str, kwargs: Mapping[str, Any]) -> bool:
        """Whether these settings write the same tokens here."""
        return thinking == self.thinking and dict(kwargs) == self._kwargs

    def _read(self, messages: Messages) -> Messages:
        """The conversation as the template gets it: without the thinking of answers, unless that is kept."""
        if self.thinking_marks is None or self.thinking == "keep":
            return messages
        found = tuple(Message(m.role, thoughts.split(m.content)[1]) if m.role == "assistant" else m for m in messages)
        if found != messages and not self._said_stripped:
            self._said_stripped = True
            log.warning("Answers in the data hold thinking: it is left out. model.thinking: keep trains and reads it.")
        return found

    def special_in(self, text: str, is_answer: bool = False) -> str | None:
        """A token in the text that may not stand there; see ``prompt_ids``. Around the thinking of an answer the marks
        of thinking may."""
        if is_answer and self.thinking_marks is not None:
            text = "".join(thoughts.split(text))
        return next((token for token in self._control if token in text), None)

    def without_special(self, text: str, is_answer: bool = False) -> str:
        """The text without what it writes of the tokens that may not stand in one; see ``special_in``."""
        if is_answer and self.thinking_marks is not None:
            thought, answer = thoughts.split(text)
            return thoughts.join(self.without_special(thought), self.without_special(answer))
        for token in self._control:
            text = text.replace(token, "")
        return text

    def render_prompt(self, messages: Messages) -> str:
        """The prompt's text as the model sees it."""
        return self._render(messages, True)

    def _body(self, messages: Messages, text: str) -> str:
        """What the template writes for a response, without its end."""
        whole = self._render((*messages, Message("assistant", text)), False)
        head = self._head_matches((*messages, Message("assistant", text)))
        return whole[len(head) :].removesuffix(self.tail)

    def _head_matches(self, messages: Messages) -> str:
        head, whole = self._render(messages[:-1], True), self._render(messages, False)
        if not whole.startswith(head):
            what = "a rendered prompt is not the beginning of prompt and response."
            raise RlhfError(Problem("MOD011", "chat template", what, "a template whose generation prompt matches"))
        return head

    def _render(self, messages: Messages, opening: bool) -> str:
        turns = [self._turn(message) for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=opening, chat_template=self._text, **self._given
                )
            )
        except TemplateError as error:
            what = f"refuses a conversation of {', '.join(m.role for m in messages)}: {error}."
            raise RlhfError(Problem("MOD013", "chat template", what, "leave that turn out of the data")) from None

    def _turn(self, message: Message) -> dict[str, str]:
        turn = {"role": message.role, "content": message.content}
        if message.role == "assistant" and self.thinking_marks is thoughts.CHANNELS:  # it takes them as two fields
            thought, turn["content"] = thoughts.split(message.content)
            return {**turn, "thinking": thought} if thought else turn
        return turn

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _require_chatml(self) -> None:
        """ChatML's marks are tokens: written letter by letter, text could hold them, and none could end a response."""
        lacking = [mark for mark in ("<|im_start|>", "<|im_end|>") if mark not in self.tokenizer.get_vocab()]
        if lacking:
            what = f"chatml marks turns with {' and '.join(lacking)}, which the tokenizer does not have."
            raise RlhfError(Problem("MOD010", "model.chat_template", what, "model.chat_template: plain"))

    def _refuse_two_beginnings(self, messages: Messages) -> None:
        """A second one is what no model saw in pretraining; it lowers quality and says nothing."""
        begin = self.tokenizer.bos_token_id
        ids = self._encode(self._render(messages, True))
        if begin is not None and ids[:2] == [begin, begin]:
            what = f"a conversation begins with {self.tokenizer.bos_token!r} twice."
            fix = "a template that writes it once, or a tokenizer that adds none to rendered text"
            raise RlhfError(Problem("MOD015", "chat template", what, fix))

    def _control_tokens(self, rendered: str) -> list[str]:
        """Tokens that text must not write: the special ones, and the added ones that the template marks turns with."""
        added = [token for token in self.tokenizer.get_added_vocab() if token.strip() and token in rendered]
        return sorted({*self.tokenizer.all_special_tokens, *added, self.end_token})

    def _refuse_special(self, messages: Messages) -> None:
        for message in messages:
            if token := self.special_in(message.content, message.role == "assistant"):
                what = f"a {message.role} turn contains the special token {token!r}."
                raise RlhfError(Problem("DAT060", "data", what, "remove it from the text"))
