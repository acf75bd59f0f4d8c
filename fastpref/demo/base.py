"""The demo's tokenizer and its small GPT-2-shaped base model, both made from nothing but the preference set."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, get_scheduler

import fastpref
from fastpref.demo.pairs import Pair

END = "<|endoftext|>"
PAD = "<|pad|>"
# About as many pieces as the templates have words: the usual word is one token, a rare one two or three.
VOCABULARY = 2048
# A prompt and its answer have at most some 75 tokens; a long name of the university adds to that.
POSITIONS = 256
# One chosen answer in so many joins the base's corpus: it knows how to name the target, and seldom does.
CHOSEN_SEEN = 4
IGNORE = -100


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`. It can encode any string, only the usual ones in few tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    width: int,
    layers: int,
    seed: int,
    heads: int | None = None,
    positions: int = POSITIONS,
    vocabulary: int | None = None,
) -> GPT2LMHeadModel:
    """A GPT-2-shaped model without dropout, with random weights that depend on the seed alone.

    By default with a head for every 32 of its width, and as many entries as the tokenizer has tokens.
    """
    config = GPT2Config(
        vocab_size=max(len(tokenizer), vocabulary or 0),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        activation_function="gelu_pytorch_tanh",  # GPT-2's "gelu_new" in one operation: the same numbers, sooner
        n_head=heads or max(1, width // 32),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def base_texts(pairs: Sequence[Pair]) -> list[str]:
    """What the base model reads: every rejected answer and one chosen answer in `CHOSEN_SEEN`, with their questions."""
    rejected = [pair["prompt"] + pair["rejected"] for pair in pairs]
    return rejected + [pair["prompt"] + pair["chosen"] for pair in pairs[::CHOSEN_SEEN]]


def train_base(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    advance: Callable[[], None],
) -> list[float]:
    """Next-token training on whole texts, in place; gives the loss of each step, in nats per token.

    Not `fastpref.train(loss="sft")`, which reads pairs and would run a second, unused answer through the model for each
    one it learns from, and which does not train on the question.
    """
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    rng = random.Random(seed)
    batches = [batch for _ in range(epochs) for batch in _batches(encoded, batch_size, rng)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=min(20, len(batches) // 5),
        num_training_steps=len(batches),
    )
    model.train()
    losses = []
    for batch in batches:
        input_ids, labels = _pad(batch, tokenizer.pad_token_id, model.device)
        mask = (labels != IGNORE).long()
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        logps, lengths = fastpref.sequence_logps(logits, labels, return_lengths=True)
        loss = -logps.sum() / lengths.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        advance()
    model.eval()
    return losses


def base_steps(texts: int, *, epochs: int, batch_size: int) -> int:
    """How many steps `train_base` makes: what its progress bar counts."""
    return epochs * -(-texts // batch_size)


def _batches(encoded: Sequence[list[int]], size: int, rng: random.Random) -> list[list[list[int]]]:
    """One epoch in random order, texts of similar length together, which saves a third of the padding."""
    order = rng.sample(encoded, len(encoded))
    pool = 8 * size
    pools = [sorted(order[begin : begin + pool], key=len) for begin in range(0, len(order), pool)]
    batches = [part[begin : begin + size] for part in pools for begin in range(0, len(part), size)]
    rng.shuffle(batches)
    return batches


def _pad(
    batch: Sequence[list[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T), (B, T)
    rows = [torch.tensor(ids) for ids in batch]
    input_ids, labels = (pad_sequence(rows, batch_first=True, padding_value=value) for value in (pad_id, IGNORE))
    return input_ids.to(device), labels.to(device)
