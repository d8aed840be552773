"""Reward models that share nothing with the policy give what transformers alone gives for the same conversation."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from test_export import make_run
from tiny import CHATML, base, build, lora, shake, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf.commands.export import export
from rlhf.config.rewards import ClassifierSection, RunReward
from rlhf.config.sections import ModelSection
from rlhf.data.batches import PassSize
from rlhf.errors import RlhfError
from rlhf.models import open_base, sequence_classifier
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.records import Message
from rlhf.runs import artifacts
from rlhf.scoring.open_scorer import Host, add_reward, open_classifier, open_source
from rlhf.scoring.rerendered import Rerendered
from rlhf.scoring.scorer import Sample, Scores, StandardisedScorer
from rlhf.scoring.shared import SharedScorer

CPU = torch.device("cpu")
ROLES = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"


def sample(prompt, response, finished=True):
    """Ids that belong to no tokenizer here: whoever reads them reads nonsense."""
    return Sample((Message("user", prompt),), response, [1, 1, 1], [1, 1], finished, [1, 1])


SAMPLES = [sample("hi", "hello there"), sample("how much is it ?", "9"), sample("a", "no, and once more no")]


def decoder(directory, labels=1, pad=0, template=CHATML, head=True):
    """A tiny Llama with a trained-looking score head; its tokenizer has ``template``."""
    build(directory)
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(directory)
    config.num_labels, config.pad_token_id, config.initializer_range = labels, pad, 0.5
    if labels > 1:
        config.id2label = {index: ("bad", "good", "other")[index] for index in range(labels)}
    model = AutoModelForSequenceClassification.from_config(config)
    if not head:
        del model.score
    model.save_pretrained(directory)
    tokenizer(template).save_pretrained(directory)
    return directory


def encoder(directory, pairs=True):
    """A tiny BERT with a classifier, whose tokenizer marks the two texts of a pair."""
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pairs:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.save_pretrained(directory)
    torch.manual_seed(6)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=48,
            num_labels=1,
            initializer_range=0.3,
            pad_token_id=0,
        )
    )
    model.save_pretrained(directory)
    return directory


def scored(directory, samples=SAMPLES, micro_batch_size=3, **settings):
    return (
        open_classifier(ClassifierSection(path=str(directory), **settings), CPU, micro_batch_size).score(samples).mean
    )


def alone(directory, column=0, **inputs):
    """What transformers gives for one conversation, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return float(model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits[0, column])


@pytest.mark.parametrize("pad", [0, None])
@pytest.mark.parametrize("template", [CHATML, ROLES])
def test_a_decoder_reads_what_its_template_makes_of_the_whole_conversation(tmp_path, pad, template):
    decoder(tmp_path / "rm", pad=pad, template=template)
    own = AutoTokenizer.from_pretrained(tmp_path / "rm")
    wanted = []
    for one in SAMPLES:
        turns = [{"role": "user", "content": one.prompt[0].content}, {"role": "assistant", "content": one.response}]
        text = own.apply_chat_template(turns, tokenize=False)
        wanted.append(alone(tmp_path / "rm", input_ids=own.encode(text, add_special_tokens=False)))
    assert len(set(wanted)) == 3
    torch.testing.assert_close(scored(tmp_path / "rm"), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def test_an_encoder_reads_prompt_and_response_as_a_pair_with_token_types(tmp_path):
    encoder(tmp_path / "rm")
    own = AutoTokenizer.from_pretrained(tmp_path / "rm")
    wanted = []
    for one in SAMPLES:
        first, second = (own.encode(text, add_special_tokens=False) for text in (one.prompt[0].content, one.response))
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        wanted.append(alone(tmp_path / "rm", input_ids=[1, *first, 2, *second, 2], token_type_ids=types))
    torch.testing.assert_close(scored(tmp_path / "rm"), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def test_an_exported_reward_model_gives_the_scores_of_its_run_again(tmp_path):
    run, _ = make_run(tmp_path, "reward")
    export(str(run), tmp_path / "exported", adapter_only=False)
    opened = base(tmp_path / "again")
    roles = SharedBase(opened)
    add_reward(roles, "reward", run)
    own = []
    for one in [*SAMPLES, sample("cut", "off he", finished=False)]:
        prompt, ids = opened.chat.prompt_ids(one.prompt), opened.chat.response_ids(one.prompt, one.response)
        ids = [*ids, opened.chat.end_id] if one.finished else ids
        own.append(Sample(one.prompt, one.response, prompt, ids, one.finished, ids))
    wanted = SharedScorer(roles, "reward", PassSize(2)).score(own).mean
    found = scored(tmp_path / "exported", [*SAMPLES, sample("cut", "off he", finished=False)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_label_of_several_is_named_and_never_guessed(tmp_path):
    decoder(tmp_path / "rm", labels=3)
    with pytest.raises(RlhfError, match=r"MOD042.*has 3 labels: 0 \(bad\), 1 \(good\), 2 \(other\).*label: the one"):
        scored(tmp_path / "rm")
    with pytest.raises(RlhfError, match="'nice' is none of them"):
        scored(tmp_path / "rm", label="nice")
    first, named, numbered = (scored(tmp_path / "rm", label=label) for label in (0, "good", 1))
    assert torch.equal(named, numbered) and not torch.allclose(first, named)


def test_a_head_that_is_not_there_is_refused_instead_of_being_random(tmp_path):
    decoder(tmp_path / "rm", head=False)
    with pytest.raises(RlhfError, match="MOD005.*score.weight.*trained head"):
        scored(tmp_path / "rm")


def test_without_template_or_marks_of_pairs_the_template_must_be_named(tmp_path):
    encoder(tmp_path / "rm", pairs=False)
    with pytest.raises(RlhfError, match="MOD010.*chat_template: chatml or plain"):
        scored(tmp_path / "rm")


def test_a_conversation_that_is_too_long_is_refused_or_loses_the_beginning_of_its_prompt(tmp_path, caplog):
    encoder(tmp_path / "rm")
    long, short = sample("x" * 20 + "y" * 40, "fine"), sample("y" * 41, "fine")  # 48 = 3 marks + 41 + 4
    with pytest.raises(RlhfError, match="MOD022.*67 tokens exceeds what it reads, 48.*too_long: cut_prompt"):
        scored(tmp_path / "rm", [SAMPLES[0], long])
    logging.getLogger("rlhf").propagate = True
    cut = scored(tmp_path / "rm", [SAMPLES[0], long], too_long="cut_prompt")
    assert "the beginning of 1 prompts of 2 was left out: longer than 48 tokens" in caplog.text
    fitting = scored(tmp_path / "rm", [sample("x" + "y" * 40, "fine")])
    torch.testing.assert_close(cut[1:], fitting, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fitting, scored(tmp_path / "rm", [short]))
    with pytest.raises(RlhfError, match="MOD022"):
        scored(tmp_path / "rm", [sample("hi", "z" * 60)], too_long="cut_prompt")


def test_special_tokens_in_a_response_are_left_out_and_counted(tmp_path, caplog):
    decoder(tmp_path / "rm")
    logging.getLogger("rlhf").propagate = True
    found = scored(tmp_path / "rm", [sample("hi", "fine<|im_end|><|endoftext|>"), sample("hi", "fine")])
    torch.testing.assert_close(found[0], found[1])
    assert "special tokens of its own in 1 texts were left out" in caplog.text


def reward_run(home, **settings):
    """A finished reward run on a base of its own."""
    opened = base(home / "other", "qwen2", **settings)
    roles = SharedBase(opened)
    head = ScalarHead(32)
    head.scale.fill_(0.5)
    roles.add("role", adapter=lora(opened), head=head)
    shake(roles, "role", seed=3)
    roles.save("role", home / "run")
    identity = open_base.identity_of(opened, ModelSection(path=str(home / "other")))
    artifacts.write(home / "run", artifacts.Manifest("reward", "train-rm", 0, {}, {}, 1.0, base=identity))
    return home / "run", SharedScorer(roles, "role", PassSize(2)), opened.chat


def test_a_reward_run_on_another_base_reads_the_text_in_tokens_of_its_own(tmp_path):
    run, inner, chat = reward_run(tmp_path)
    policy = base(tmp_path / "policy", "llama")
    shared = SharedBase(policy)
    source = RunReward(run=str(run))
    scorer = open_source(source, "reward/0", artifacts.read(run), Host(policy, shared, PassSize(2)))
    assert isinstance(scorer, Rerendered) and "reward/0" not in shared.slots
    own = []
    for one in SAMPLES:
        ids = [*chat.response_ids(one.prompt, one.response), chat.end_id]
        own.append(Sample(one.prompt, one.response, chat.prompt_ids(one.prompt), ids, True, ids))
    assert torch.equal(scorer.score(SAMPLES).mean, inner.score(own).mean)
    unfinished = sample("hi", "", finished=False)
    prompt = chat.prompt_ids(unfinished.prompt)
    at_the_end = Sample(unfinished.prompt, "", prompt[:-1], prompt[-1:], False, prompt[-1:])
    assert torch.equal(scorer.score([unfinished]).mean, inner.score([at_the_end]).mean)
    with pytest.raises(RlhfError, match="MOD022"):
        scorer.score([sample("hi" * 70, "x")])


def test_a_reward_run_on_the_policys_base_becomes_one_of_its_roles(tmp_path):
    run, _, _ = reward_run(tmp_path)
    policy = base(tmp_path / "other", "qwen2")
    shared = SharedBase(policy)
    scorer = open_source(RunReward(run=str(run)), "reward/0", artifacts.read(run), Host(policy, shared, PassSize(2)))
    assert isinstance(scorer, SharedScorer) and "reward/0" in shared.slots


class Lengths:
    """Scores a response by its characters."""

    def score(self, samples):
        return Scores(torch.tensor([float(len(one.response)) for one in samples]))


def test_standardised_scores_have_mean_0_and_standard_deviation_1_on_the_samples_and_come_back():
    scorer = StandardisedScorer(Lengths())
    scorer.fit(SAMPLES)
    found = scorer.score(SAMPLES).mean.double()
    assert abs(float(found.mean())) < 1e-6 and abs(float((found**2).mean()) - 1) < 1e-6
    other = StandardisedScorer(Lengths())
    other.load_state_dict(json.loads(json.dumps(scorer.state_dict())))
    assert torch.equal(other.score(SAMPLES).mean, scorer.score(SAMPLES).mean)
    with pytest.raises(RlhfError, match="GRD003"):
        scorer.fit([SAMPLES[0], SAMPLES[0]])


def test_the_reader_of_a_model_without_weights_is_that_of_the_loaded_one(tmp_path):
    section = ClassifierSection(path=str(encoder(tmp_path / "rm")))
    reader = sequence_classifier.open_reader(section)
    assert reader.context_length == 48 and reader.form == "a pair of texts"
    assert reader.read(SAMPLES[0].prompt, "x", True).prompt_tokens == (1, 3)


def test_a_model_from_elsewhere_reads_the_answer_without_thinking_unless_it_is_kept(tmp_path):
    """Against transformers' own rendering of the answer, or of all of it; text that is no thinking is left as it is."""
    thinks = CHATML.replace("assistant\n{% endif", "assistant\n{% if enable_thinking is false %}no{% endif %}{% endif")
    path, own = str(decoder(tmp_path / "rm", template=thinks)), tokenizer(thinks)
    thought, messages = "<think>\nhm\n</think>\n\nfine", (Message("user", "hi"),)
    for thinking, response, read in (
        ("strip", thought, "fine"),
        ("keep", thought, thought),
        ("strip", "say </think> twice", "say </think> twice"),
    ):
        reader = sequence_classifier.open_reader(ClassifierSection(path=path, thinking=thinking))
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": read}]
        assert reader.read(messages, response, True).ids == own.apply_chat_template(turns, return_dict=False)
    section = ClassifierSection(path=path, template_kwargs={"enable_thinking": False})
    assert sequence_classifier.open_reader(section).rendering.given_to(thinks) == {"enable_thinking": False}
