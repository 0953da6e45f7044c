"""The smallest architecture, a table of bigrams: 0.07M parameters. experiments/README.md explains it."""

architecture = "bigram"
dataset = "tinystories"
stories = 100_000  # as config/tiny.py
fallback = "toystories"  # the built-in corpus, if the Hub cannot be reached
tokenizer = "byte"

block_size = 256
batch_size = 16  # 16 rows x 256 tokens = 4,096 tokens a step
max_iters = 200
eval_interval = 100
eval_tokens = 131_072  # enough for a curve
learning_rate = 0.3  # a table has no layers that a large step could upset
schedule = "linear"
warmup_iters = 0
weight_decay = 0.0
