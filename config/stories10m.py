"""10.0M parameters, 13% of them embeddings (also the head). Meant for one GPU."""

dataset = "tinystories"
tokenizer = "bpe4096"

n_layer = 7
n_head = 8
n_embd = 320
block_size = 512  # 97% of the stories fit
mlp = "swiglu"
qk_norm = True  # keeps attention stable at these learning rates
tied = True  # one matrix for embedding and head

batch_size = 64
gradient_accumulation_steps = 1  # 64 rows x 512 tokens = 32,768 tokens a step
max_iters = 20_000  # 655M tokens, about one and a half passes over TinyStories
eval_interval = 1000
save_interval = 1000
eval_tokens = 1_000_000  # enough for three digits; the whole file takes several times as long
learning_rate = 1e-3  # lower for wider models; not tuned
min_lr = learning_rate / 10  # as in nanoGPT
warmup_iters = 500
weight_decay = 0.1
