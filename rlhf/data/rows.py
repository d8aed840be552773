"""One row of data as a record: the accepted forms, and what is wrong with a row that has none of them."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf.data.records import ROLES, Comparison, Demonstration, Judgement, Message, Messages, Prompt

Row = Mapping[str, Any]
HUMAN, TURN = "\n\nHuman:", "\n\nAssistant:"
HEADLESS = "'chosen': the shared head does not begin with a human turn."
MAX_NAMES = 20
CALLS = ("tool_calls", "function_call")


class RowError(ValueError):
    """What is wrong with a row: the field and the reason."""


class MissingField(RowError):
    """A row without a field that it needs."""

    def __init__(self, field: str, row: Row) -> None:
        self.field = field
        super().__init__(f"'{field}': missing (this row has: {names(row)}).")


class EqualResponses(RowError):
    """Differently ranked responses that are the same text."""


class CutOff(RowError):
    """A sample that ended at a limit: what reads the end of a response knows nothing of it."""


def from_messages(row: Row, where: str) -> Demonstration:
    """From ``messages``."""
    return demonstration(messages(need(row, "messages"), "messages"), "messages", where)


def from_completion(row: Row, where: str, key: str = "completion") -> Demonstration:
    """From ``prompt`` and ``completion``, each text or messages."""
    head = prompt_of(need(row, "prompt"))
    check_turns(head, "prompt", ends_with="user")
    return demonstration((*head, *_answer(need(row, key), key)), key, where)


def demonstration(found: Messages, field: str, where: str) -> Demonstration:
    check_turns(found, field, ends_with="assistant")
    return Demonstration(found, where)


def from_prompt(row: Row, where: str) -> Prompt:
    """From ``prompt``."""
    return prompt(prompt_of(need(row, "prompt")), where)


def without_answer(found: Messages) -> Messages:
    """A final assistant turn is what is to be answered anew."""
    return found[:-1] if found and found[-1].role == "assistant" else found


def prompt(found: Messages, where: str) -> Prompt:
    check_turns(found, "prompt", ends_with="user")
    return Prompt(found, where)


def pair(row: Row, where: str) -> Comparison:
    """From ``chosen`` and ``rejected``, with ``prompt`` or a shared head."""
    head, best, worst = parts_of_pair(row)
    return preferred(row, head, best, worst, where)


def parts_of_pair(row: Row) -> tuple[Messages, str, str]:
    """The prompt of a pair, the chosen response and the rejected one."""
    chosen, rejected = need(row, "chosen"), need(row, "rejected")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise RowError("'rejected': must be of the same form as 'chosen'.")
    if "prompt" in row:
        head = prompt_of(row["prompt"])
        best, worst = _response(chosen, "chosen", head), _response(rejected, "rejected", head)
    else:
        head, best, worst = _shared_head(chosen, rejected)
    return head, best, worst


def preferred(row: Row, head: Messages, best: str, worst: str, where: str) -> Comparison:
    """One pair as a comparison, with the row's ``margin`` and ``probability`` or ``votes`` if it has them."""
    check_turns(head, "prompt", ends_with="user")
    if best == worst:
        raise EqualResponses("'chosen' equals 'rejected'.")
    margin = row.get("margin")
    if margin is not None and (
        isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= sys.float_info.max
    ):
        raise RowError(f"'margin': need a finite number, got {reprlib.repr(margin)}.")
    shift = None if margin is None else float(margin)
    judgement = Judgement(0, 1, probability_of(row), shift, annotator_of(row), attribute_of(row))
    return Comparison(head, (best, worst), (judgement,), where)


def probability_of(row: Row) -> float:
    """How probable it is that 'chosen' is preferred: ``probability``, or its share of ``votes`` [chosen, rejected]; 1
    where the row has neither."""
    share, votes = row.get("probability"), row.get("votes")
    if share is None and votes is None:
        return 1.0
    if share is not None and votes is not None:
        raise RowError("'votes': the row has a probability too; leave one of them out.")
    if share is not None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.5 <= share <= 1:
            raise RowError(f"'probability': need a number from 0.5 to 1, got {reprlib.repr(share)}.")
        return float(share)
    if not isinstance(votes, list) or len(votes) != 2 or not all(type(v) is int and v >= 0 for v in votes):
        raise RowError("'votes': need two whole numbers, for 'chosen' and for 'rejected'.")
    if votes[0] < votes[1] or not sum(votes):
        raise RowError(f"'votes': {votes[0]} for 'chosen' and {votes[1]} for 'rejected': the chosen one needs half.")
    return float(votes[0] / sum(votes))


def annotator_of(row: Row) -> str | None:
    """Who judged: a name or a number, as text; None where the row does not say."""
    found = row.get("annotator")
    if found is not None and (isinstance(found, bool) or not isinstance(found, str | int)):
        raise RowError(f"'annotator': need a name or a number, got {reprlib.repr(found)}.")
    return None if found is None else str(found)


def attribute_of(row: Row) -> str | None:
    """In what was judged: the name of an attribute; None for an overall judgement."""
    found = row.get("attribute")
    return None if found is None else text_of(found, "attribute")


def prompt_of(value: Any) -> Messages:
    """A text is one user message; a list is a conversation."""
    if isinstance(value, list):
        return messages(value, "prompt")
    return (Message("user", text_of(value, "prompt")),)


def messages(value: Any, field: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise RowError(f"'{field}': need a list of messages.")
    found = []
    for index, item in enumerate(value):
        place = f"{field}[{index}]"
        if not isinstance(item, Mapping):
            raise RowError(f"'{place}': need an object with role and content.")
        if item.get("role") not in ROLES:
            raise RowError(f"'{place}.role': need system, user or assistant, got {reprlib.repr(item.get('role'))}.")
        if calls := next((name for name in CALLS if item.get(name)), None):
            raise RowError(f"'{place}.{calls}': calls of tools are not read, and the turn means nothing without them.")
        found.append(Message(item["role"], text_of(item.get("content"), f"{place}.content")))
    return tuple(found)


def check_turns(found: Messages, field: str, ends_with: str) -> None:
    """System first if at all, then user and assistant in turn, ending as told."""
    turns = found[1:] if found and found[0].role == "system" else found
    for index, message in enumerate(turns):
        if message.role != ("user", "assistant")[index % 2]:
            place = index + len(found) - len(turns)
            raise RowError(f"'{field}[{place}].role': user and assistant must alternate, found '{message.role}'.")
    if not turns or turns[-1].role != ends_with:
        raise RowError(f"'{field}': must end with a turn of the {ends_with}.")


def _answer(value: Any, field: str) -> Messages:
    return messages(value, field) if isinstance(value, list) else (Message("assistant", text_of(value, field)),)


def _response(value: Any, field: str, head: Messages) -> str:
    """The response text; a message list may repeat the prompt in front of it."""
    if not isinstance(value, list):
        return text_of(value, field)
    found = messages(value, field)
    if found[: len(head)] == head:
        found = found[len(head) :]
    if len(found) != 1 or found[0].role != "assistant":
        raise RowError(f"'{field}': need one assistant turn after the prompt.")
    return found[0].content


def _shared_head(chosen: Any, rejected: Any) -> tuple[Messages, str, str]:
    if isinstance(chosen, list):
        best, worst = messages(chosen, "chosen"), messages(rejected, "rejected")
        if best[:-1] != worst[:-1] or best[-1].role != "assistant" or worst[-1].role != "assistant":
            raise RowError(
                "'rejected': 'chosen' and 'rejected' must be one conversation up to the last assistant turn."
            )
        return best[:-1], best[-1].content, worst[-1].content
    first, second = text_of(chosen, "chosen"), text_of(rejected, "rejected")
    cut = first.rfind(TURN)
    if cut < 0 or second.rfind(TURN) != cut or first[:cut] != second[:cut]:
        raise RowError(f"'prompt': missing, and 'chosen' and 'rejected' share no head that ends with {TURN!r}.")
    answers = [
        text_of(text[cut + len(TURN) :].strip(), name) for text, name in ((first, "chosen"), (second, "rejected"))
    ]
    for answer, name in zip(answers, ("chosen", "rejected"), strict=True):
        if HUMAN in answer:
            raise RowError(f"'{name}': goes on with a human turn after its last answer.")
    return transcript(first[:cut]), answers[0], answers[1]


def transcript(text: str, field: str = "prompt", fault: str = HEADLESS) -> Messages:
    """A conversation written as "\\n\\nHuman: ...\\n\\nAssistant: ..."; ``fault`` says what a text is that is not."""
    if not text.startswith(HUMAN):
        raise RowError(fault)
    found: list[Message] = []
    for part in text.split(HUMAN)[1:]:
        user, *answers = part.split(TURN)
        found.append(Message("user", user.strip()))
        found += [Message("assistant", answer.strip()) for answer in answers]
    for index, message in enumerate(found):
        text_of(message.content, f"{field}[{index}].content")
    return tuple(found)


def need(row: Row, field: str) -> Any:
    if field not in row:
        raise MissingField(field, row)
    return row[field]


def names(fields: Iterable[str]) -> str:
    """Field names for a message: the first twenty, cut where long, escaped where a terminal could not show them."""
    shown = [name[:40] if name.isprintable() else ascii(name[:40]) for name in fields]
    more = [f"and {len(shown) - MAX_NAMES} more"] if len(shown) > MAX_NAMES else []
    return ", ".join(shown[:MAX_NAMES] + more)


def text_of(value: Any, field: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise RowError(f"'{field}': need text, got {kind}.")
    if not value.strip():
        raise RowError(f"'{field}': empty.")
    if "\0" in value:
        raise RowError(f"'{field}': contains a NUL character.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"'{field}': contains half of a surrogate pair.") from None
    return value
