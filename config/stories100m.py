"""98.3M parameters, 6% of them embeddings (also the head). Meant for one GPU."""

dataset = "tinystories"
tokenizer = "bpe8192"

n_layer = 13
n_head = 12
n_embd = 768
block_size = 512  # 97% of the stories fit
mlp = "swiglu"
qk_norm = True  # keeps attention stable at these learning rates
tied = True  # one matrix for embedding and head

batch_size = 32
gradient_accumulation_steps = 8  # 8 x 32 rows x 512 tokens = 131,072 tokens a step
max_iters = 20_000  # 2.6B tokens, about six passes over TinyStories
eval_interval = 1000
save_interval = 1000
eval_tokens = 1_000_000  # enough for three digits; the whole file takes several times as long
learning_rate = 4e-4  # lower for wider models; not tuned
min_lr = learning_rate / 10  # as in nanoGPT
warmup_iters = 500
weight_decay = 0.1
