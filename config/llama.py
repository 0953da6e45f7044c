"""
A plain Llama (RMSNorm, RoPE, SwiGLU, no bias), which other programs can load: python export.py --to hf DIR.
7.2M parameters, 16% of them embeddings (also the head). Meant for one GPU.
"""

dataset = "tinystories"
tokenizer = "bpe4096"  # a small vocabulary leaves the parameters to the blocks

n_layer = 6
n_head = 6
n_embd = 288
block_size = 256  # 84% of the stories fit
mlp = "swiglu"  # from here to `tied`: the Llama architecture, as run.c requires
norm = "rmsnorm"
norm_eps = 1e-5
position = "rope"
rope_theta = 10000.0
bias = False
tied = True  # one matrix for embedding and head

batch_size = 128
gradient_accumulation_steps = 1  # 128 rows x 256 tokens = 32,768 tokens a step
max_iters = 20_000  # 655M tokens, about one and a half passes over TinyStories
eval_interval = 1000
save_interval = 1000
eval_tokens = 1_000_000  # enough for three digits; the whole file takes several times as long
learning_rate = 1e-3  # usual for this width; not tuned
min_lr = learning_rate / 10  # as in nanoGPT
warmup_iters = 500
weight_decay = 0.1
