"""The baseline of patches.py, a plain GPT over bytes with the same n-grams: 2.74M parameters."""

architecture = "patches"
boundary = "byte"  # each byte is a patch, without local layers
dataset = "tinystories"
stories = 100_000  # as config/tiny.py
fallback = "toystories"  # the built-in corpus, if the Hub cannot be reached
tokenizer = "byte"

n_layer = 4
n_head = 2
n_embd = 128
block_size = 256

batch_size = 12  # 12 rows x 256 tokens = 3,072 tokens a step
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
