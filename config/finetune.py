"""
Go on from weights that are there, on another corpus: a run's folder, a checkpoint, or hf:FOLDER_OR_ID.

    python train.py config/finetune.py --init_from=out/tiny
    python train.py config/finetune.py --init_from=hf:gpt2 --batch_size=4
"""

dataset = "toystories"
init_from = "out/tiny"  # brings its tokenizer, and every setting of the model that weights depend on

block_size = 256
dropout = 0.1

batch_size = 12
max_iters = 300
eval_interval = 100
save_interval = 100
eval_tokens = 65_536
learning_rate = 3e-4  # a tenth or so of what it began with: it is to learn, not to forget
schedule = "linear"
warmup_iters = 30
