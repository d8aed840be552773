"""Train the embedded world's base from nothing: tokenizer, then a small Llama on the world's documents.

    python scripts/train_demo_base.py --out DIR [--seed 0]

Writes a Hugging Face directory with fp16 weights and asserts, on tickets of the test split, that the base copies facts
and finds wrong ones. The shipped files in rlhf/demo/base come from these two rounds, run one after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.demo import corpus
from rlhf.demo.replies import FACTS, GOOD, WRONG, change_fact, write
from rlhf.demo.world import tickets

# Rounds of training, each with its own warm-up and decay: steps, share of the peak learning rates, and the mixture of
# documents for each share of the steps. First copying and comparing form; the last, gentle round is for the actions.
ROUNDS = ((6000, 1.0, ((0.4, corpus.EARLY), (0.6, corpus.LATE))), (900, 0.25, ((1.0, corpus.LAST),)))
SPECIALS = ["<pad>", "<eos>", "<user>", "<bot>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<bot>{{ message['content'] }}<eos>"
    "{% else %}{{ raise_exception('this model knows user and assistant turns only') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
LIMIT_BYTES = 4 << 20


def train_tokenizer(seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, large enough that each fact is one token."""
    rng = random.Random(f"tokenizer/{seed}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    parts = (part for _ in range(4000) for part in re.split(r"<\w+>", corpus.draw_document(rng)) if part)
    tokenizer.train_from_iterator(parts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<bot>"],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def build(vocab_size: int, hidden: int, layers: int, heads: int, mlp: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=mlp,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.02,
        )
    )


def batches(  # type: ignore[no-untyped-def]
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int, steps: int, mixtures
):
    """``steps`` batches of documents of like length: ids [B, L] and labels [B, L]."""
    made = 0
    for share, shares in mixtures:
        until = made + round(share * steps)
        while made < until:
            texts = [corpus.draw_document(rng, shares) for _ in range(size * 16)]
            rows = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
            chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
            rng.shuffle(chunks)
            for chunk in chunks[: until - made]:
                width = max(map(len, chunk))
                ids = torch.tensor([row + [0] * (width - len(row)) for row in chunk])
                labels = torch.tensor([row + [-100] * (width - len(row)) for row in chunk])
                made += 1
                yield ids, labels


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embeddings and norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inner, lr=8e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=4e-3, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def train(  # type: ignore[no-untyped-def]
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, mixtures, steps: int, rate: float, size: int, seed: str
) -> None:
    """One round, with a probe every 250 steps."""
    rng, started = random.Random(f"corpus/{seed}"), time.process_time()
    running = optimizers(model)
    peaks = [group["lr"] for optimizer in running for group in optimizer.param_groups]
    for step, (ids, labels) in enumerate(batches(tokenizer, rng, size, steps, mixtures)):
        factor = rate * min(1.0, (step + 1) / 60) * min(1.0, (steps - step) / (0.4 * steps))
        groups = [group for optimizer in running for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        loss = weighted_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in running:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            copied, found = probe(model, tokenizer, 50)
            print(
                f"step {step + 1}: loss {loss.item():.3f}, {time.process_time() - started:.0f} CPU s, "
                f"copies {copied}, finds wrong {found}",
                flush=True,
            )


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of all tokens; those behind a document's <eos> weigh more, because only they can be known."""
    logits = model(input_ids=ids, attention_mask=(labels != -100).long()).logits[:, :-1]
    behind = ((ids == 1).cumsum(1) > 0)[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    weights = torch.where(behind, 4.0, 1.0).flatten() * (labels[:, 1:].flatten() != -100)
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def probe(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[dict, dict]:
    """On tickets of the test split: the share whose fact comes next in a reply, and whose wrong fact is found out."""
    model.eval()
    copied, found = {}, {}
    for fact in FACTS:
        hits = told = 0
        for (ticket, rng), _ in zip(tickets("test", 0, f"base/{fact}"), range(size), strict=False):
            reply = write(ticket, GOOD, rng)
            right = {"item": ticket.item, "action": ticket.action, "order": f"#{ticket.code}", "name": ticket.name}
            start = f"<user>{ticket.text}<bot>{reply[: reply.index(right[fact]) - 1]}"
            want = tokenizer(f" {right[fact]}", add_special_tokens=False)["input_ids"]
            ids = tokenizer(start, add_special_tokens=False)["input_ids"]
            guess = model(input_ids=torch.tensor([ids + want])).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
            hits += guess == want
            for state in ("right", WRONG):
                reply = write(ticket, change_fact(GOOD, fact, state), rng)
                text = f"<user>{ticket.text}<bot>{reply}<eos>"
                logits = model(input_ids=torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[
                    0, -1
                ]
                none, one = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in corpus.COUNTS[:2])
                told += (logits[none[0]] > logits[one[0]]).item() == (state == "right")
        copied[fact], found[fact] = round(hits / size, 2), round(told / (2 * size), 2)
    found["tally"] = _tally_accuracy(model, tokenizer, size)
    model.train()
    return copied, found


def _tally_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, size: int) -> float:
    """Share of the marks in tallies, first or seen, that the base finds likelier."""
    marks = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in ("first", "seen")]
    rng, right, total = random.Random("tally"), 0, 0
    for _ in range(size):
        ids = torch.tensor([tokenizer(corpus.draw_tally(rng), add_special_tokens=False)["input_ids"]])
        likelier = model(input_ids=ids).logits[0, :-1, marks].argmax(-1)
        for index, mark in enumerate(marks):
            here = ids[0, 1:] == mark
            right += int((likelier[here] == index).sum())
            total += int(here.sum())
    return round(right / total, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps, for a trial")
    parser.add_argument("--start", type=Path, help="what an earlier first round wrote: goes on with the second")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument(
        "--shape", type=int, nargs=4, default=[160, 4, 5, 432], metavar=("HIDDEN", "LAYERS", "HEADS", "MLP")
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(args.seed, args.vocab)
        model = build(len(tokenizer), *args.shape)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    for number, (steps, rate, mixtures) in enumerate(ROUNDS):
        if number or not args.start:
            print(f"round {number}", flush=True)
            noise = f"{args.seed}/{number}" if number else f"{args.seed}"
            train(model, tokenizer, mixtures, round(args.scale * steps), rate, args.batch, noise)
    copied, found = probe(model, tokenizer, 200)
    print(json.dumps({"copied": copied, "found": found}), flush=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = (args.out / "model.safetensors").stat().st_size
    assert size <= LIMIT_BYTES, f"{size} bytes, more than 4 MiB"
    assert min(copied.values()) >= 0.9, f"the base does not copy: {copied}"
    assert min(found.values()) >= 0.75, f"the base does not find wrong facts: {found}"
    assert math.isfinite(sum(found.values()))


if __name__ == "__main__":
    main()
