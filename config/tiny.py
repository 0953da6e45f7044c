"""A first model: 1.9M parameters, a few minutes on two CPU cores, and it tells a story at the end."""

dataset = "tinystories"
stories = 100_000  # the first ones, by streaming: a minute of waiting rather than an hour
fallback = "toystories"  # where the Hub cannot be reached
tokenizer = "bpe4096"

n_layer = 4
n_head = 2
n_embd = 128
block_size = 256
qk_norm = True
norm_weight = False
embed_norm = True
tied = False
init = "zero"
pointer = True

batch_size = 6  # 6 rows x 256 tokens = 1,536 tokens a step
max_iters = 1500
eval_interval = 300
save_interval = 500
eval_tokens = 65_536
story_windows = True
cross_stories = False
pair_tokens = 2_000_000
context_schedule = "0:0.25, 0.35:0.5, 0.65:1"
optimizer = "muon"
learning_rate = 0.02
muon_lr = 0.02
schedule = "linear"
warmup_iters = 10
weight_decay = 0.0
beta2 = 0.99
