"""
A plain Llama (RMSNorm, RoPE, SwiGLU, no bias), which other programs read: python export.py --to hf DIR.
7.2M parameters, 16% of them embeddings (also the head). Meant for one GPU.
"""

dataset = "tinystories"
tokenizer = "bpe4096"

n_layer = 6
n_head = 6
n_embd = 288
block_size = 256
mlp = "swiglu"
norm = "rmsnorm"
norm_eps = 1e-5
position = "rope"
rope_theta = 10000.0
bias = False
tied = True

batch_size = 128
gradient_accumulation_steps = 1  # 128 rows x 256 tokens = 32,768 tokens a step
max_iters = 20_000  # 655M tokens, about one and a half passes over TinyStories
eval_interval = 1000
save_interval = 1000
eval_tokens = 1_000_000
learning_rate = 1e-3
min_lr = learning_rate / 10
warmup_iters = 500
weight_decay = 0.1
