"""What goes wrong on the first day with a model and data of one's own: each is a message with its fix, or harmless."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import get_peft_model
from tiny import CHATML, tokenizer

from rlhf.config import load
from rlhf.config.sections import ModelSection, RuntimeSection
from rlhf.config.stages import SftConfig
from rlhf.data import tokenised
from rlhf.data.chat_format import ChatFormat
from rlhf.data.dropped import DroppedRows
from rlhf.data.fitting import Limit
from rlhf.data.tokenised import Dialogue
from rlhf.errors import RlhfError
from rlhf.evaluation import stopping
from rlhf.models import open_base
from rlhf.models.base import load_base
from rlhf.records import Demonstration, Message, Prompt
from rlhf.runs import runtime
from rlhf.scoring.scorer import Sample
from rlhf.stages.sft import run
from rlhf.start import look

USER = (Message("user", "hi"),)
TALK = (*USER, Message("assistant", "yes"), Message("user", "sure?"), Message("assistant", "no"))
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
THINKING = CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'][:1] }}"
)


@pytest.fixture
def said():
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("rlhf")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def with_bos(template):
    own = tokenizer(template)
    own.add_special_tokens({"bos_token": "<s>"})
    return own


def without(*marks):
    """A tokenizer that lacks ChatML's marks, or its end token as well."""
    own = tokenizer(None)
    for mark in marks:
        assert mark in own.get_vocab()
    kept = json.loads(own.backend_tokenizer.to_str())
    kept["added_tokens"] = [token for token in kept["added_tokens"] if token["content"] not in marks]
    kept["model"]["vocab"] = {word: index for word, index in kept["model"]["vocab"].items() if word not in marks}
    inner = type(own.backend_tokenizer).from_str(json.dumps(kept))
    return tiny.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|pad|>")


TRAPS = {
    "two beginnings": (
        lambda: ChatFormat(with_bos("{{ bos_token }}{{ bos_token }}" + CHATML)),
        ["MOD015", "a conversation begins with '<s>' twice", "a template that writes it once"],
    ),
    "no prefix": (
        lambda: ChatFormat(tokenizer("{% for m in messages %}{{ loop.length }}{{ m.content }}<|im_end|>{% endfor %}")),
        ["MOD011", "a rendered prompt is not the beginning of prompt and response", "generation prompt matches"],
    ),
    "no template": (
        lambda: ChatFormat(tokenizer(None)),
        ["MOD010", "has no chat template", "model.chat_template: one of chatml, plain"],
    ),
    "chatml without its tokens": (
        lambda: ChatFormat(without("<|im_start|>", "<|im_end|>"), "chatml"),
        ["MOD010", "chatml marks turns with <|im_start|> and <|im_end|>, which the tokenizer does not have",
         "model.chat_template: plain"],
    ),
    "an end that is no token": (
        lambda: ChatFormat(tokenizer("{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}")),
        ["MOD014", "which text may contain", "a template that ends turns with a special token"],
    ),
    "no end at all": (
        lambda: ChatFormat(tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")),
        ["MOD010", "writes nothing after an assistant turn: a model that learns it never stops"],
    ),
    "a system turn that is refused": (
        lambda: tokenised.prompt_rows(
            [Prompt(USER, "d.jsonl:1"), Prompt((Message("system", "be kind"), *USER), "d.jsonl:2")],
            ChatFormat(tokenizer(NO_SYSTEM)), Limit(99), DroppedRows("prompts", 0.0, True),
        ),
        ["MOD013", "d.jsonl:2 (chat template)", "refuses a conversation of system, user: no system turn",
         "leave that turn out of the data"],
    ),
    "earlier turns written anew": (
        lambda: tokenised.dialogues(
            [Demonstration(TALK, "d.jsonl:7")], ChatFormat(tokenizer(THINKING)), False, Limit(99),
            DroppedRows("data", 0.0, True),
        ),
        ["MOD012", "d.jsonl:7 (chat template)", "writes an earlier turn differently", "loss_on: last_turn"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("trap", "wanted"), TRAPS.values(), ids=TRAPS)
def test_a_template_or_tokenizer_that_would_go_wrong_in_silence_is_one_message(trap, wanted):
    with pytest.raises(RlhfError) as caught:
        trap()
    for words in wanted:
        assert words in str(caught.value)


def test_one_beginning_is_kept_and_counted_in_the_prompt_alone():
    chat = ChatFormat(with_bos("{{ bos_token }}" + CHATML))
    ids = [*chat.prompt_ids(USER), *chat.response_ids(USER, "yes"), chat.end_id]
    assert ids.count(chat.tokenizer.bos_token_id) == 1 and ids[0] == chat.tokenizer.bos_token_id
    assert "<s>" not in chat.marks and chat.end_token in chat.marks


def test_a_conversation_of_several_turns_trains_every_answer_with_its_end_or_the_last_alone():
    chat = ChatFormat(tokenizer())
    for last_only, wanted in ((False, "yes<|im_end|>no<|im_end|>"), (True, "no<|im_end|>")):
        ids, trained = chat.demonstration(TALK, last_only)
        assert chat.tokenizer.decode([i for i, keep in zip(ids, trained, strict=True) if keep]) == wanted


def test_a_tokenizer_larger_than_the_embeddings_is_refused_by_init_and_by_every_stage(tmp_path):
    directory = tiny.build(tmp_path / "m")
    own = tokenizer()
    own.add_tokens(["<one>"])
    own.save_pretrained(directory)
    for opens in (load_base, look.model):
        with pytest.raises(RlhfError, match="MOD003.*the tokenizer has 261 tokens, the embeddings 260 rows"):
            opens(str(directory))


@pytest.mark.parametrize("pad", [None, "<|im_end|>"], ids=["no pad", "pad is the end token"])
def test_padding_that_is_the_end_token_takes_no_loss_from_it(tmp_path, pad):
    """TRL's own batches: the end token of every row is a label, and no padding is."""
    directory = tiny.build(tmp_path / "m")
    tokenizer(pad=pad).save_pretrained(directory)
    base = load_base(str(directory))
    config = SftConfig.model_validate(
        {"data": {"path": "x"}, "epochs": 1.0, "max_length": 64, "batch": {"batch_size": 2, "micro_batch_size": 2}}
    )
    records = [Demonstration((*USER, Message("assistant", text)), "x:1") for text in ("a", "a long answer")]
    rows, _ = tokenised.dialogues(records, base.chat, False, Limit(64), DroppedRows("data", 0.0, True))
    model = get_peft_model(base.model, tiny.lora(base))
    trainer = run._trainer(config, model, base, rows, SimpleNamespace(path=tmp_path), 2)
    batch = next(iter(trainer.get_train_dataloader()))
    assert base.chat.pad_id == base.chat.end_id == 2
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        row = next(row for row in rows if row.ids == ids[: len(row.ids)])
        wanted = [i if keep else -100 for i, keep in zip(row.ids, row.trained, strict=True)]
        assert labels == wanted + [-100] * (len(ids) - len(row.ids)) and wanted[-1] == base.chat.end_id
    assert (batch["labels"] == base.chat.end_id).sum() == 2


def sample(ids, finished=False):
    return Sample(USER, "", [5], ids, finished, ids)


def trained_looking(base):
    with torch.no_grad():
        weight = base.model.get_input_embeddings().weight
        weight *= torch.linspace(0.5, 1.5, len(weight))[:, None]
    return base


def test_the_figures_behind_a_model_that_never_stops_tell_its_causes_apart(tmp_path, said):
    base = tiny.base(tmp_path / "m")
    own, end = base.tokenizer.eos_token_id, base.chat.end_id
    found = stopping.figures(base, [], [sample([9])], stopping.Answers([3], 0), 4)
    assert found["end_row_untrained"] and found["end_token"] == "<|im_end|>" and found["num_base_end"] == 0
    stopping.warn_of_untrained_end(base, [])
    assert len(said) == 1 and "the end token '<|im_end|>'" in said[0] and "lora.train_tokens: ['<|im_end|>']" in said[0]
    stopping.warn_of_untrained_end(base, ["<|im_end|>"])
    trained_looking(base)
    stopping.warn_of_untrained_end(base, [])
    assert len(said) == 1
    samples = [sample([9, own, 9]), sample([9]), sample([own])]
    found = stopping.figures(base, [], samples, stopping.Answers(list(range(1, 21)), 7), 12)
    assert (found["num_base_end"], found["num_samples"], found["base_end_token"]) == (2, 3, "<|endoftext|>")
    assert not found["end_row_untrained"]
    assert found["answers"] == {"num": 20, "num_longer": 8, "num_without_end": 7, "tokens_95_percent": 19}
    dialogue = Dialogue([5, 8, 9, end, 6, 7, end, 8], [False, True, True, True, False, True, True, False])
    cut = Dialogue([5, 8, 9], [False, True, True])
    assert stopping.answers_of([dialogue, cut], end) == stopping.Answers([3, 2, 2], 1)


def test_sft_ends_with_exit_7_for_a_model_that_never_stops_names_the_causes_and_keeps_the_run(
    tmp_path, monkeypatch, here
):
    monkeypatch.chdir(tmp_path)
    tiny.build(tmp_path / "m")
    rows = [{"prompt": f"p{number}", "completion": "a long answer " * (1 + number % 2 * 5)} for number in range(12)]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("sft.yaml").write_text(
        "model: {path: m}\ndata: {path: d.jsonl}\nsteps: 1\nmax_length: 60\ntoo_long: truncate\n"
        "batch: {batch_size: 4, micro_batch_size: 4}\nsampling: {max_new_tokens: 4}\nholdout_fraction: 0.3\n"
    )
    code, text = here("sft", "-c", "sft.yaml")
    assert code == 7 and Path("runs/sft/manifest.json").exists()
    assert (
        "error[GRD002] runs/sft: eval/end_token_rate: only 0.0% of the sampled responses end with '<|im_end|>'" in text
    )
    assert "within sampling.max_new_tokens (4)" in text and "embeddings is untrained, and stays frozen" in text
    assert "answers in the training data lost '<|im_end|>' to max_length" in text and "are longer than that" in text
    assert "too_long: drop, or a larger max_length; lora.train_tokens: ['<|im_end|>']; min_end_token_rate: 0" in text
    assert text.count("is like those of tokens never seen in pretraining") == 1


def test_a_gpu_that_only_emulates_bfloat16_is_refused_before_a_weight_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(RlhfError, match="RES006.*Tesla T4 has no bfloat16.*model.dtype: float32"):
        open_base.open_base(ModelSection(path=str(tmp_path), dtype="bfloat16"), torch.device("cuda"))
    runtime.require_dtype("float32", torch.device("cuda"))
    runtime.require_dtype("bfloat16", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    runtime.require_dtype("bfloat16", torch.device("cuda"))


def test_on_a_mac_auto_is_the_cpu_and_says_so_and_mps_is_no_device(tmp_path, monkeypatch, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there in (False, True):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert runtime.choose_device(RuntimeSection()) == torch.device("cpu")
    assert said == ["This Mac's GPU (MPS) is not supported and not used: the run is on the CPU."]
    assert runtime.choose_device(RuntimeSection(device="cpu")) == torch.device("cpu") and len(said) == 1
    (tmp_path / "sft.yaml").write_text("data: {path: x}\nepochs: 1\nruntime: {device: mps}\n")
    with pytest.raises(RlhfError, match="CFG003.*runtime.device: must be 'auto', 'cpu' or 'cuda', got 'mps'"):
        load.load(SftConfig, tmp_path / "sft.yaml")


def test_cublas_is_asked_for_one_order_of_summation_and_another_wish_of_the_user_is_named(monkeypatch, caplog):
    monkeypatch.delenv(runtime.WORKSPACE, raising=False)
    for given, held, said in ((None, ":4096:8", False), (":16:8", ":16:8", False), (":0:0", ":0:0", True)):
        if given:
            monkeypatch.setenv(runtime.WORKSPACE, given)
        caplog.clear()
        runtime.set_up(RuntimeSection(device="cpu"), 0)
        assert os.environ[runtime.WORKSPACE] == held
        assert ("may sum in another order" in caplog.text) == said and "bit for bit" not in caplog.text
