"""The chat templates of released models (templates/SOURCES.md), each with a small tokenizer that has its marks."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from tiny import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.config import load
from rlhf.config.rewards import ClassifierSection
from rlhf.config.sections import ModelSection
from rlhf.config.stages import SftConfig
from rlhf.data import rendering
from rlhf.data.chat_format import ChatFormat
from rlhf.data.rendering import Rendering
from rlhf.data.tokenised import PromptRow
from rlhf.errors import RlhfError
from rlhf.evaluation.policy_samples import respond
from rlhf.models import open_base
from rlhf.preflight import origins
from rlhf.preflight.needs import Needs
from rlhf.preflight.prepare import Plan
from rlhf.records import Message
from rlhf.rollouts.engine import Rollout, Sampling
from rlhf.runs import artifacts, identity
from rlhf.runs.artifacts import Manifest
from rlhf.stages.registry import STAGES
from rlhf.stages.starting import Ready, Start

TEMPLATES = Path(__file__).parent / "templates"
CPU = torch.device("cpu")
CHATML = ("<|im_start|>", "<|im_end|>")
# name -> (special tokens, other added tokens, begin, end of text, what the template ends a turn with)
MARKS = {
    "qwen2.5": (CHATML, (), None, "<|endoftext|>", "<|im_end|>"),
    "qwen3": (CHATML, ("<think>", "</think>"), None, "<|endoftext|>", "<|im_end|>"),
    "smollm3": (CHATML, ("<think>", "</think>"), None, "<|end_of_text|>", "<|im_end|>"),
    "llama3.1": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        (),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "llama3.2": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        (),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "gemma2": (("<start_of_turn>", "<end_of_turn>"), (), "<bos>", "<eos>", "<end_of_turn>"),
    "gemma3": (("<start_of_turn>", "<end_of_turn>"), (), "<bos>", "<eos>", "<end_of_turn>"),
    "mistral": (("[INST]", "[/INST]"), (), "<s>", "</s>", "</s>"),
    "phi3": (("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), (), "<s>", "<|endoftext|>", "<|end|>"),
    "phi4": ((*CHATML, "<|im_sep|>"), (), None, "<|endoftext|>", "<|im_end|>"),
    "gpt-oss": (
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        (),
        None,
        "<|endoftext|>",
        "<|return|>",
    ),
}
NAMES = sorted(MARKS)
USER = (Message("user", "hi there"),)
TALK = (*USER, Message("assistant", "yes"), Message("user", "and now ?"), Message("assistant", "no"))


def tokenizer(name):
    """Bytes, and the marks of the template; those that are not special are so in the released tokenizers."""
    special, added, begin, end, _ = MARKS[name]
    tokens = ["<|pad|>", *dict.fromkeys([*([begin] if begin else []), end, *special])]
    vocabulary = {token: i for i, token in enumerate([*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        bos_token=begin,
        eos_token=end,
        additional_special_tokens=list(special),
    )
    fast.add_tokens(list(added))
    fast.chat_template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    return fast


def rendered(own, messages, **settings):
    """Ids of the conversation as transformers alone writes it."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return own.apply_chat_template(turns, tokenize=True, return_dict=False, **settings)


@pytest.fixture
def day(monkeypatch):
    """Sets the day that it is, for templates and for what draws a date."""

    def set_day(text):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.fromisoformat(f"{text}T10:00:00")

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        monkeypatch.setattr(rendering, "datetime", Clock)

    return set_day


def test_every_template_has_a_source():
    listed = (TEMPLATES / "SOURCES.md").read_text("utf-8")
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(MARKS)
    assert all(f"| {name}.jinja |" in listed for name in MARKS)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_response_and_end_are_what_the_template_renders(name, day):
    day("2026-03-04")
    own = tokenizer(name)
    chat, end = ChatFormat(own), MARKS[name][4]
    assert chat.end_token == end and set(MARKS[name][0]) & set(chat.marks)
    whole = [*chat.prompt_ids(USER), *chat.response_ids(USER, "fine, thanks"), chat.end_id]
    assert whole == rendered(own, (*USER, Message("assistant", "fine, thanks")))[: len(whole)]
    assert chat.prompt_ids(USER) == rendered(own, USER, add_generation_prompt=True)
    ids, trained = chat.demonstration(TALK, last_only=True)
    assert ids == rendered(own, TALK)[: len(ids)] and ids[-1] == chat.end_id
    assert sum(trained) == len(chat.response_ids(TALK[:-1], "no")) + 1
    kind = (Message("system", "be kind"), *USER)
    if name == "gemma2":
        with pytest.raises(RlhfError, match="MOD013.*System role not supported"):
            chat.prompt_ids(kind)
    else:
        assert chat.prompt_ids(kind) == rendered(own, kind, add_generation_prompt=True)
        assert "be kind" in own.decode(chat.prompt_ids(kind))


@pytest.mark.parametrize("name", NAMES)
def test_all_turns_are_trained_unless_the_template_writes_earlier_ones_differently(name):
    chat = ChatFormat(tokenizer(name))
    if name in ("qwen3", "gpt-oss"):
        with pytest.raises(RlhfError, match="MOD012"):
            chat.demonstration(TALK, last_only=False)
    else:
        assert sum(chat.demonstration(TALK, last_only=False)[1]) == sum(
            len(chat.response_ids(TALK[:place], text)) + 1 for place, text in ((1, "yes"), (3, "no"))
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_date_is_kept_where_the_template_prints_one(name, day):
    """Two stages on two days: the same tokens, and on the day itself those of transformers alone."""
    day("2026-03-04")
    own = tokenizer(name)
    first, plain = ChatFormat(own), rendered(own, USER, add_generation_prompt=True)
    assert first.prompt_ids(USER) == plain
    day("2027-05-06")
    later = ChatFormat(tokenizer(name), rendering=Rendering(date=first.date))
    assert later.prompt_ids(USER) == plain and later.same_tokens(first)
    prints = name in ("llama3.2", "gpt-oss")
    assert first.date == ("2026-03-04" if prints else None)
    assert (rendered(own, USER, add_generation_prompt=True) != plain) == prints
    assert ChatFormat(own).same_tokens(first) == (not prints)


def test_a_date_whose_format_is_not_written_out_is_refused():
    own = tokenizer("qwen2.5")
    own.chat_template = "{%- set how = '%d' %}{{ strftime_now(how) }}" + own.chat_template
    with pytest.raises(RlhfError, match="MOD016.*strftime_now"):
        ChatFormat(own)


def test_a_chain_keeps_the_date_of_its_first_day(tmp_path, day, caplog):
    """Drawn for a first stage, in its record, read by later ones; never part of a run's identity."""
    caplog.set_level("INFO", "rlhf")
    path = build(tmp_path / "m")
    own = AutoTokenizer.from_pretrained(path)
    own.chat_template = "{{ strftime_now('%d %B %Y') }} " + own.chat_template
    own.save_pretrained(path)
    section = ModelSection(path=str(path))
    day("2026-03-04")
    drawn = open_base.with_date(section, None)
    assert drawn.template_date == "2026-03-04" and "every stage of this chain reads 2026-03-04" in caplog.text
    base = open_base.open_base(drawn, CPU)
    manifest = Manifest("policy", "sft", 0, {}, {}, 1.0, base=open_base.identity_of(base, drawn))
    day("2027-05-06")
    assert open_base.with_date(section, "2026-03-04") == drawn, "an earlier start of the same run has kept it"
    artifacts.write(tmp_path, manifest)
    later = open_base.reopen_base(artifacts.read(tmp_path), CPU).chat
    assert later.prompt_ids(USER) == base.chat.prompt_ids(USER)
    assert "04 March 2026 " in later.render_prompt(USER) and "none is recorded" not in caplog.text
    assert open_base.open_base(section, CPU).chat.date == "2027-05-06" and "none is recorded" in caplog.text
    assert origins.model_of(manifest).template_date == "2026-03-04"
    config = {"data": {"path": "d.jsonl"}, "run_dir": str(tmp_path / "r"), "epochs": 1}
    both = [SftConfig.model_validate({**config, "model": one.model_dump()}) for one in (section, drawn)]
    assert identity.of(both[0], {}).values == identity.of(both[1], {}).values
    (tmp_path / "r").mkdir()
    artifacts.write_config(tmp_path / "r", load.dump(both[1]))
    plan = Plan({}, {}, identity.of(both[0], {}), ())
    unfinished = Ready(STAGES["sft"], both[0], Needs(), plan, ["unfinished run"])
    days = [unfinished._with_date(Start(resume=resume)).model.template_date for resume in (True, False)]
    assert days == ["2026-03-04", "2027-05-06"], "a resumed run goes on with its own day"
    going_on = replace(unfinished, plan=replace(plan, parents={"adapter": manifest}))
    assert going_on._with_date(Start()).model.template_date == "2026-03-04", "and so does one from a run's adapter"
    plain = ModelSection(path=str(build(tmp_path / "plain")), template_date="2026-03-04")
    assert open_base.with_date(plain, None) == plain and open_base.open_base(plain, CPU).chat.date is None
    assert "model.template_date makes no difference" in caplog.text


THINKERS = {
    # name -> what the model writes in front of its answer, and what the template writes where there is no thinking
    "qwen3": ("<think>\nhm, so\n</think>\n\n", "<think>\n\n</think>\n\n"),
    "smollm3": ("<think>\nhm, so\n</think>\n\n", ""),
    "gpt-oss": (
        "<|channel|>analysis<|message|>hm, so<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
}


class Says:
    """An engine that writes the same ids to every prompt."""

    def __init__(self, ids, finished=True):
        self.ids, self.finished = ids, finished

    def generate(self, prompts, sampling, rows):
        return Rollout([self.ids for _ in prompts], [self.finished for _ in prompts])


@pytest.mark.parametrize("name", sorted(THINKERS))
@pytest.mark.parametrize("thinking", ["strip", "keep", "off"])
def test_rewards_read_the_answer_without_thinking_unless_it_is_kept(name, thinking):
    """What is rescored is what was sampled; text and scored ids are the answer, or all of it."""
    own = tokenizer(name)
    chat = ChatFormat(own, rendering=Rendering(thinking=thinking))
    before, lead = THINKERS[name]
    prompt = PromptRow(USER, chat.prompt_ids(USER))
    ids = [*own.encode(f"{before}fine", add_special_tokens=False), chat.end_id]
    (sample,) = respond(Says(ids), chat, [prompt], Sampling(99, 1.0, 0))
    assert sample.response_ids == ids and sample.thinking == "hm, so"
    kept = "<think>\nhm, so\n</think>\n\nfine"
    assert sample.response == (kept if thinking == "keep" else "fine")
    lead = "" if thinking == "off" and name == "qwen3" else lead  # the prompt has it
    read = f"{before}fine" if thinking == "keep" else f"{lead}fine"
    assert own.decode(sample.scored_ids) == read + chat.end_token
    again = [*chat.response_ids(USER, sample.response), chat.end_id]
    assert again == sample.scored_ids, "the same text as data is the same tokens"
    (cut,) = respond(Says(ids[:8], finished=False), chat, [prompt], Sampling(8, 1.0, 0))
    assert "hm" not in cut.response or thinking == "keep"
    assert cut.response_ids == ids[:8] and cut.scored_ids and not cut.finished
    later = (*USER, Message("assistant", kept), Message("user", "and ?"))
    bare = (*USER, Message("assistant", "fine"), Message("user", "and ?"))
    if thinking != "keep":
        assert chat.prompt_ids(later) == chat.prompt_ids(bare), "the next turn reads the answer alone"


@pytest.mark.parametrize("name", sorted(THINKERS))
def test_the_thinking_of_data_is_trained_where_it_is_kept_and_its_marks_are_no_text_elsewhere(name, caplog):
    own, talk = tokenizer(name), (*USER, Message("assistant", "<think>\nhm, so\n</think>\n\nfine"))
    chat = ChatFormat(own, rendering=Rendering(thinking="keep"))
    ids, trained = chat.demonstration(talk, last_only=True)
    shown = own.decode([i for i, keep in zip(ids, trained, strict=True) if keep])
    assert shown == f"{THINKERS[name][0]}fine{chat.end_token}"
    assert not caplog.records
    stripped = ChatFormat(own)
    shorter, _ = stripped.demonstration(talk, last_only=True)
    assert shorter == stripped.demonstration((*USER, Message("assistant", "fine")), last_only=True)[0]
    assert "Answers in the data hold thinking: it is left out" in caplog.text
    if name == "qwen3":
        with pytest.raises(RlhfError, match="DAT060.*<think>"):
            ChatFormat(own).prompt_ids((Message("user", "a <think> b"),))


@pytest.mark.parametrize("name", NAMES)
def test_thinking_settings_change_nothing_where_a_template_does_not_think(name, day):
    day("2026-03-04")
    own = tokenizer(name)
    formats = [ChatFormat(own, rendering=Rendering(thinking=how)) for how in ("strip", "keep", "off")]
    alike = [one.prompt_ids(USER) == formats[0].prompt_ids(USER) for one in formats]
    assert alike == [True, True, name not in ("qwen3", "smollm3")]
    wanted = rendered(own, USER, add_generation_prompt=True, **({} if alike[2] else {"enable_thinking": False}))
    assert formats[2].prompt_ids(USER) == wanted
    assert (formats[0].thinking_marks is None) == (name not in THINKERS)
    if name == "gpt-oss":
        low = ChatFormat(own, rendering=Rendering(kwargs={"reasoning_effort": "low"}))
        assert low.prompt_ids(USER) == rendered(own, USER, add_generation_prompt=True, reasoning_effort="low")


def test_thinking_is_inherited_and_what_makes_no_difference_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "rlhf")
    section = ModelSection(path=str(build(tmp_path / "m")), thinking="off", template_kwargs={"effort": "low"})
    base = open_base.open_base(section, CPU)
    assert "marks no thinking: model.thinking makes no difference" in caplog.text
    assert "does not read effort of model.template_kwargs" in caplog.text
    artifacts.write(tmp_path, Manifest("policy", "sft", 0, {}, {}, 1.0, base=open_base.identity_of(base, section)))
    later = origins.model_of(artifacts.read(tmp_path))
    assert (later.thinking, later.template_kwargs) == ("off", {"effort": "low"})


@pytest.mark.parametrize("wrong", ["today", "2026-02-30", "26-02-03"])
def test_a_date_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="template_date"):
        ModelSection(template_date=wrong)


def test_a_variable_that_is_not_the_templates_is_refused():
    for section in (ModelSection, ClassifierSection):
        with pytest.raises(ValueError, match="tokenize: rlhf sets these itself"):
            section(path="m", template_kwargs={"tokenize": True})


FAST = ("qwen3",)
CHAIN = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", CHAIN)
def test_a_chain_runs_on_every_template_at_two_layers(name, tmp_path, monkeypatch, here):
    """Dry run, rows as the model sees them, SFT, one PPO step against a function; the date is the first day's."""
    monkeypatch.chdir(tmp_path)
    own, config = tokenizer(name), tmp_path / "sft.yaml"
    torch.manual_seed(3)
    shape = LlamaConfig(
        vocab_size=len(own),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=2048,
        eos_token_id=own.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained("m")
    own.save_pretrained("m")
    with Path("d.jsonl").open("w", encoding="utf-8") as file:
        for number in range(12):
            file.write(json.dumps({"prompt": f"question {number}", "completion": f"answer {number}"}) + "\n")
    Path("mine.py").write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    short = {"max_new_tokens": 4, "concurrency": 4}
    sft = {
        "run_dir": "runs/sft",
        "model": {"path": "m"},
        "data": {"path": "d.jsonl"},
        "max_length": 2000,
        "steps": 1,
        "batch": {"batch_size": 2, "micro_batch_size": 2},
        "sampling": short,
        "end_token_samples": 2,
        "min_end_token_rate": 0.0,
        "require_improvement": False,
        "holdout_fraction": 0.2,
        "loss_on": "last_turn",
        "lora": {"r": 2, "alpha": 4.0},
        "optim": {"learning_rate": 1e-4},
    }
    ppo = {
        "run_dir": "runs/ppo",
        "policy": "runs/sft",
        "prompts": {"path": "d.jsonl", "max_tokens": 1900},
        "steps": 1,
        "rewards": [{"function": "mine:score"}],
        "sampling": short,
        "value": {"pretrain_steps": 0},
        "batch": {"batch_size": 2, "minibatch_size": 2, "micro_batch_size": 2},
        "evaluation": {"num_prompts": 2},
    }
    config.write_text(yaml.safe_dump(sft))
    Path("ppo.yaml").write_text(yaml.safe_dump(ppo))
    code, text = here("sft", "-c", "sft.yaml", "--dry-run")
    assert code == 0 and "0 dropped" in text, text
    code, text = here("check", "sft.yaml", "--show", "1")
    assert code == 0 and MARKS[name][4] in text, text
    code, text = here("sft", "-c", "sft.yaml")
    assert code == 0, text
    made = artifacts.read("runs/sft").base
    assert (made.template_date is not None) == (name in ("llama3.2", "gpt-oss"))
    assert made.end_tokens == ([] if MARKS[name][3] == MARKS[name][4] else [MARKS[name][3]])
    code, text = here("ppo", "-c", "ppo.yaml")
    assert code == 0, text
    assert artifacts.read("runs/ppo").base == made
