"""The configs of real bases: each is sound, and each chain runs on a base of the same architecture, small and random.

Vocabulary sizes and special tokens are those of the real bases; so are the roles and marks of the templates. Width,
depth and data are small. Nothing but paths, steps and sizes is overridden.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlhf.config import load
from rlhf.data.chat_format import ChatFormat
from rlhf.models.base import load_tokenizer
from rlhf.records import Message
from rlhf.stages.registry import STAGES

ROOT = Path(__file__).parents[1]
BASES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "llama-3.1-8b")
QWEN = (
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\nBe of help.<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "sft": ["max_length=200", "batch.batch_size=4", "batch.micro_batch_size=2", "sampling.max_new_tokens=12",
            "end_token_samples=4", "save_every=null", "require_improvement=false"],
    "train-rm": ["max_length=200", "batch.batch_size=4", "batch.micro_batch_size=1", "sampling.max_new_tokens=12",
                 "standardise_samples=8", "save_every=null"],
    "eval-rm": ["max_length=200", "num_resamples=100"],
    "ppo": ["prompts.max_tokens=160", "batch.batch_size=4", "batch.minibatch_size=2", "batch.micro_batch_size=2",
            "sampling.max_new_tokens=12", "value.pretrain_steps=1", "evaluation.num_prompts=2", "steps=2",
            "save_every=null"],
}  # fmt: skip


def qwen(directory):
    """151,665 tokens, 151,936 rows, tied; the base ends documents with another token than its template."""
    marks = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    own = tokenizer(151_643, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 151_665, **marks)
    own.chat_template = QWEN
    config = Qwen2Config(vocab_size=151_936, tie_word_embeddings=True, **small())
    return write(directory, Qwen2ForCausalLM, config, own, own.convert_tokens_to_ids("<|im_end|>"))


def llama(directory):
    """128,256 tokens and rows, untied, grouped queries; no template and no pad token."""
    marks = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    own = tokenizer(128_000, list(marks.values()), 128_256, **marks)
    config = LlamaConfig(vocab_size=128_256, tie_word_embeddings=False, **small())
    return write(directory, LlamaForCausalLM, config, own, own.eos_token_id)


def small():
    return {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 512,
    }


def tokenizer(plain, specials, size, **marks):
    """Bytes, unused words up to ``plain``, and the special tokens at the real base's numbers."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<unused {number}>" for number in range(plain - len(words))]
    inner = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = [*specials, *(f"<|reserved {number}|>" for number in range(size - plain - len(specials)))]
    inner.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=specials[2:], **marks)


def write(directory, model_class, config, own, end):
    """Random but for one thing: a common part of all rows makes the end token a likely one, so that answers end."""
    torch.manual_seed(3)
    model = model_class(config)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight += 1
            weight[end] += 2.5
    model.to(torch.bfloat16).save_pretrained(directory)
    own.save_pretrained(directory)
    return directory


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def posts(number):
    """As trl-lib/tldr and trl-lib/tldr-preference: text, an answer beginning with a space."""
    post = f"SUBREDDIT: r/a\n\nTITLE: t{number}\n\nPOST: p\n\nTL;DR:"
    return {"prompt": post, "completion": " it is"}, {"prompt": post, "chosen": " it is", "rejected": f" no {number}"}


def conversations(number):
    """As trl-lib/hh-rlhf-helpful-base: messages, also of several turns; answers are lists of one."""
    prompt = [*(turns("hi", "yes?") if number % 2 else []), {"role": "user", "content": f"help {number}"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("here", f"no {number}"))
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row, row


def whole(number):
    """As trl-lib/ultrafeedback_binarized: whole conversations and their scores."""
    chosen, rejected = turns(f"help {number}", "here"), turns(f"help {number}", f"no {number}")
    row = {"chosen": chosen, "rejected": rejected, "score_chosen": 8.0, "score_rejected": 3.5}
    return row, row


FORMS = {"qwen2.5-0.5b": (qwen, posts), "qwen2.5-1.5b": (qwen, conversations), "llama-3.1-8b": (llama, whole)}


@pytest.mark.parametrize("name", BASES)
def test_the_configs_of_a_base_are_sound(name, monkeypatch, here):
    monkeypatch.chdir(ROOT)
    files = sorted(Path("configs", name).glob("*.yaml"))
    assert [path.stem for path in files] == ["eval-rm", "pipeline", "ppo", "sft", "train-rm"]
    code, text = here("check", *files)
    assert code == 0 and text.count("a sound ") == 5, text
    for line in Path("configs", name, "pipeline.yaml").read_text().splitlines()[2:]:
        stage = line.split("stage: ")[1].split(",")[0]
        assert f"config: configs/{name}/{stage}.yaml" in line
        config = load.load(STAGES[stage].config_class, Path("configs", name, f"{stage}.yaml"))
        assert config.run_dir == f"runs/{name}/{stage}"


def test_a_stage_does_not_start_without_the_rows_that_check_could_not_reach(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    code, text = here("sft", "-c", ROOT / "configs/qwen2.5-0.5b/sft.yaml", "model.path=demo:base")
    assert code == 3 and "error[DAT015] trl-lib/tldr: not in the cache, and HF_HUB_OFFLINE is set." in text
    assert "hf download trl-lib/tldr --repo-type dataset" in text
    assert not Path("runs").exists()


@pytest.mark.parametrize("make", [qwen, llama])
def test_the_small_bases_have_the_vocabulary_of_the_real_ones(tmp_path, make):
    own = load_tokenizer(str(make(tmp_path)))
    chat = ChatFormat(own, None if make is qwen else "plain")
    prompt = chat.prompt_ids((Message("user", "hi"),))
    if make is qwen:
        assert (len(own), chat.end_id, own.pad_token_id) == (151_665, 151_645, 151_643) and prompt[0] == 151_644
    else:
        assert (len(own), chat.end_id, own.pad_token_id) == (128_256, 128_001, None)
        assert prompt.count(128_000) == 1 == prompt.index(128_000) + 1


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in BASES[:2]), "llama-3.1-8b"])
def test_the_chain_of_a_base_runs_at_small_shapes(name, tmp_path, monkeypatch, here):
    make, row = FORMS[name]
    make(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    for file, column in (("shown.jsonl", 0), ("pairs.jsonl", 1)):
        Path(file).write_text("".join(json.dumps(row(number)[column]) + "\n" for number in range(12)))
    places = {
        "sft": ["model.path=m", "data.path=shown.jsonl", "data.split=null"],
        "train-rm": ["data.path=pairs.jsonl", "data.split=null"],
        "eval-rm": ["data.path=pairs.jsonl", "data.split=null"],
        "ppo": ["prompts.path=shown.jsonl", "prompts.split=null", "rewards.0.accept=failed"],
    }
    for stage, overrides in places.items():
        code, text = here(stage, "-c", ROOT / f"configs/{name}/{stage}.yaml", *overrides, *SIZES[stage])
        assert code == 0, text
    manifests = {stage: json.loads(Path(f"runs/{name}/{stage}/manifest.json").read_text()) for stage in places}
    assert manifests["ppo"]["base"]["dtype"] == "bfloat16"
    assert manifests["sft"]["details"]["rows"]["num_rows"] == 11 and manifests["eval-rm"]["metrics"]["eval/ece"] >= 0
