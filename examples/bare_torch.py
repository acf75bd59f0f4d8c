"""DPOP in bare torch: `python examples/bare_torch.py`, or with `--model PATH` of a Hugging Face causal LM on disk."""

import argparse

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fastpref

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a folder with a causal LM; without it a tiny one is made")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

torch.manual_seed(0)
if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model)
else:
    shape = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
model.eval()  # no dropout: policy and reference are then the same at the first step

# Four pairs: a prompt of 6 tokens, then a response of 10. Rows are all chosen, then all rejected.
prompts = torch.randint(300, (4, 6))
input_ids = torch.cat([prompts.repeat(2, 1), torch.randint(300, (8, 10))], dim=1)
labels = input_ids.clone()
labels[:, :6] = -100  # the prompt, and padding where there is any, is not scored
batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}

with torch.no_grad():
    reference = fastpref.model_logps(model, batch).chunk(2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if options.model is None else 1e-6)
for step in range(1, options.steps + 1):
    policy = fastpref.model_logps(model, batch).chunk(2)  # logits never exist
    out = fastpref.preference_loss(*policy, *reference, loss="dpop", beta=0.1, lam=5.0)  # or loss="dpo" without lam
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    print(f"step {step} loss {out.loss:.4f} reward of the chosen {out.chosen_rewards.mean():+.4f}")
