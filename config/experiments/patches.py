"""Bytes in patches: 3.17M parameters. experiments/README.md has its results."""

architecture = "patches"
dataset = "tinystories"
stories = 100_000  # as config/tiny.py
fallback = "toystories"  # the built-in corpus, if the Hub cannot be reached
tokenizer = "byte"

batch_size = 6  # 6 rows x 512 tokens = 3,072 tokens a step
max_iters = 1500
eval_interval = 100
eval_tokens = 131_072  # enough for a curve
optimizer = "muon"
learning_rate = 0.02  # AdamW's, for embeddings and head
muon_lr = 0.02  # Muon's, for the matrices of the layers
schedule = "linear"
warmup_iters = 10
weight_decay = 0.0
beta2 = 0.99
