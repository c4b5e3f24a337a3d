"""Trains a small model with the installed package: no download, seconds.

python .ci/try_install.py native|reference: fails unless that is what the optimizer runs on a CPU.
"""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification

from progtuning_kernels import MaskedAdamW, ProgressiveSchedule, backend_report, patch_model

STEPS = 9

torch.manual_seed(0)
config = BertConfig(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
)
model = BertForSequenceClassification(config).train()
handle = patch_model(model, ProgressiveSchedule(stages=3, total_steps=STEPS))
optimizer = MaskedAdamW(handle.param_groups(lr=1e-3, weight_decay=0.01), max_grad_norm=1.0)
ids, labels = torch.randint(3, 128, (8, 16)), torch.tensor([0, 1] * 4)
losses, trained = [], []
for _ in range(STEPS):
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    trained.append(sum(p.requires_grad for p in model.parameters()))
    handle.advance()
rows = [r for r in backend_report().rows if r.op == "masked_update" and r.device == "cpu"]
runs = next(row.implementation for row in rows if row.ok)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, tensors that train {trained}, optimizer: {runs}")
if losses[-1] >= losses[0] or trained != sorted(trained, reverse=True) or runs not in sys.argv[1:]:
    sys.exit("this is not what was to be installed")
