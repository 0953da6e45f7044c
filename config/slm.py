"""
The Small Language Model of the seeds: GPT-2 style (LayerNorm, learned positions, GELU, biases, dropout) with
GPT-2's own tokenizer. 51.1M parameters, 51% of them embeddings (also the head). Meant for one GPU.
"""

dataset = "tinystories"
tokenizer = "gpt2"

n_layer = 8
n_head = 8
n_embd = 512
block_size = 256
norm = "layernorm"
position = "learned"
mlp = "gelu"
bias = True
tied = True
dropout = 0.1

batch_size = 32
gradient_accumulation_steps = 4  # 4 x 32 rows x 256 tokens = 32,768 tokens a step
max_iters = 20_000  # 655M tokens
eval_interval = 1000
save_interval = 1000
eval_tokens = 1_000_000
learning_rate = 6e-4
min_lr = learning_rate / 10
warmup_iters = 1000
weight_decay = 0.1
