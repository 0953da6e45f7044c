"""
Finetune the weights of a run, a checkpoint, or hf:FOLDER_OR_ID on another corpus.

    python train.py config/finetune.py --init_from=out/tiny
    python train.py config/finetune.py --init_from=hf:gpt2 --batch_size=4
"""

dataset = "toystories"
init_from = "out/tiny"  # also determines the tokenizer and the shape of the model

block_size = 256
dropout = 0.1

batch_size = 12
max_iters = 300
eval_interval = 100
save_interval = 100
eval_tokens = 65_536
learning_rate = 3e-4  # about a tenth of the original learning rate, to limit forgetting
schedule = "linear"
warmup_iters = 30
