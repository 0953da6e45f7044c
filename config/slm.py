"""
A Small Language Model in the style of GPT-2 (LayerNorm, learned positions, GELU, biases, dropout) with its
tokenizer. 51.1M parameters, 51% of them embeddings (also the head). Meant for one GPU.
"""

dataset = "tinystories"
tokenizer = "gpt2"  # 50,257 ids: half of the parameters are embeddings

n_layer = 8
n_head = 8
n_embd = 512
block_size = 256
norm = "layernorm"
position = "learned"
mlp = "gelu"
bias = True  # GPT-2 has biases everywhere
tied = True
dropout = 0.1  # as in GPT-2; not tuned

batch_size = 32
gradient_accumulation_steps = 4  # 4 x 32 rows x 256 tokens = 32,768 tokens a step
max_iters = 20_000  # 655M tokens
eval_interval = 1000
save_interval = 1000
eval_tokens = 1_000_000  # enough for three digits; the whole file takes several times as long
learning_rate = 6e-4  # as nanoGPT for GPT-2; not tuned
min_lr = learning_rate / 10  # as in nanoGPT
warmup_iters = 1000
weight_decay = 0.1
