"""
A first model: 1.9M parameters, a few minutes on two CPU cores; it tells stories at the end.

A number behind a line is what the line gains, in bits per byte on real stories after 120 to 150 updates
(RESULTS.md, ablation); lower is better. "Not measured" means that nobody has tried it without.
"""

dataset = "tinystories"
stories = 100_000  # only the first ones, streamed: a minute of download instead of an hour
fallback = "toystories"  # the built-in corpus, if the Hub cannot be reached
tokenizer = "bpe4096"  # trained on the corpus; not measured against other sizes

n_layer = 4
n_head = 2  # -0.013 against 4 heads
n_embd = 128
block_size = 256
qk_norm = True  # -0.003; keeps Muon's large learning rates stable
norm_weight = False  # not measured
embed_norm = True  # not measured
tied = False  # a head of its own, which bigram initialization needs; not measured
init = "zero"  # blocks start as the identity, so that bigram initialization holds; not measured
pointer = True  # copies names and objects from the context: -0.134

batch_size = 6  # 6 rows x 256 tokens = 1,536 tokens a step: -0.024 against 12 rows at equal tokens
max_iters = 1500
eval_interval = 100
sample_interval = 100  # one sentence at every evaluation
save_interval = 500
eval_tokens = 32_768  # enough for a curve; the end of the run scores up to a million
story_windows = True  # windows begin at a story's beginning; not measured
cross_stories = False  # document masking: -0.012
pair_tokens = 2_000_000  # bigram initialization of embedding and head from this many tokens: -0.094
context_schedule = "0:0.25, 0.35:0.5, 0.65:1"  # windows of 64, then 128, then 256 tokens: -0.030
optimizer = "muon"  # -0.017 against AdamW at its best learning rate, 0.004
learning_rate = 0.02  # of AdamW, which updates embedding and head
muon_lr = 0.02  # of Muon, which updates the matrices of the blocks
schedule = "linear"  # -0.013 against cosine
warmup_iters = 10
weight_decay = 0.0  # not measured
beta2 = 0.99  # not measured
