"""model.py: shapes, attention, initialization, loss, numerics; the same as Hugging Face's models."""

import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from model import (
    CHOICES,
    GPT,
    MLPS,
    Attention,
    AttnInputs,
    Block,
    BlockAttention,
    Core,
    Embedder,
    GPTConfig,
    Head,
    attn_inputs,
    chunked_cross_entropy,
    cpu_attention,
    cross_entropy,
    rope_table,
    rotate,
    sdpa,
)
from nanostlm import checkpoint, tokenizer
from nanostlm.generate import chain, generate
from nanostlm.kv_cache import KVCache

V = 40
TINY = dict(n_layer=2, n_head=4, n_embd=16, block_size=16, vocab_size=V)


def tiny(**settings) -> GPT:
    """A micro model in eval mode with weights large enough that every part affects the output."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, **settings})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "pointer.sentinel":
                p.fill_(1.0)
            elif p.ndim < 2:
                p += 0.2 * torch.randn_like(p)
            elif name.startswith(("embedder", "head")):
                p.normal_()
            else:  # without norms, values and rounding errors grow with depth
                p.normal_(std=p.shape[1] ** -0.5 * (0.5 if model.config.norm == "none" else 1.0))
    return model


def tokens(*shape: int, seed: int = 1, vocab: int = V) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def rel_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference, relative to the largest magnitude in `b`."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def greedy(model: GPT, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The prompt (B, T) and `count` greedy tokens after it, with a cache."""
    cache, ids = KVCache(model.config, len(prompt)), prompt
    for _ in range(count):
        new = ids if not cache.seen else ids[:, -1:]
        ids = torch.cat((ids, model(new, cache=cache)[0][:, -1:].argmax(-1)), dim=1)
    return ids


# ----------------------------------------------------------------------------------------------------------
# Shapes, and the three parts


@pytest.mark.parametrize("loss_chunk", [0, 7])
def test_model_output_shapes_and_dtypes(loss_chunk):
    model, idx = tiny(loss_chunk=loss_chunk), tokens(2, 9)
    logits, loss = model(idx)
    assert logits.shape == (2, 9, V) and logits.dtype == torch.float32 and loss is None
    logits, loss = model(idx, idx)
    assert loss.shape == () and loss.dtype == torch.float32
    assert logits is None if loss_chunk else logits.shape == (2, 9, V)


@pytest.mark.parametrize("n_kv_head", [8, 4, 1])
@pytest.mark.parametrize("position", ["rope", "learned", "shaw"])
def test_part_output_shapes(position, n_kv_head):
    settings = dict(position=position, n_kv_head=n_kv_head)
    c = GPTConfig(n_layer=2, n_head=8, n_embd=64, block_size=16, vocab_size=V, **settings)
    idx, x = tokens(2, 16), torch.randn(2, 16, 64)
    positions, attn = attn_inputs(c, idx)
    assert Embedder(c)(idx, positions).shape == (2, 16, 64)
    block = Block(c)
    for part in (block.attn, block, Core(c)):
        assert part(x, attn).shape == (2, 16, 64)
    for part in (block.mlp, block.norm1):
        assert part(x).shape == (2, 16, 64)
    head = Head(c)
    assert head(x).shape == (2, 16, V) and head.linear.weight.shape == (64, 64)
    assert head.loss(x, idx)[1].shape == ()


def test_every_part_can_be_replaced():
    class OneHot(nn.Module):
        def forward(self, idx, position):
            return F.one_hot(idx, 16).float()

    class Last(nn.Module):
        def forward(self, x, attn, cache):
            return x + 1

    class Constant(nn.Module):
        def forward(self, x):
            return x.sum(-1, keepdim=True).expand(*x.shape[:-1], V)

        def loss(self, x, targets):
            return None, x.mean()

    c, idx = GPTConfig(**TINY), tokens(2, 5, vocab=16)
    assert GPT(c, embedder=OneHot())(idx)[0].shape == (2, 5, V)
    assert GPT(c, core=Last())(idx)[0].shape == (2, 5, V)
    assert GPT(c, head=Constant())(idx, idx)[1].shape == ()
    assert torch.equal(GPT(c, OneHot(), Last(), Constant())(idx)[0], torch.full((2, 5, V), 17.0))


def test_given_embedder_keeps_its_weights_and_is_not_tied():
    c = GPTConfig(**TINY)
    given = Embedder(c)
    before = given.tokens.weight.clone()
    model = GPT(c, embedder=given)
    assert torch.equal(model.embedder.tokens.weight, before)
    assert model.head.linear.weight is not given.tokens.weight
    assert model.head.linear.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_dropout_in_training_only():
    model, idx = tiny(dropout=0.5), tokens(2, 9)
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert torch.equal(model(idx)[0], tiny()(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    "settings",
    [{}, dict(position="shaw"), dict(position="shaw", shaw_values=True), dict(n_embd=256)],  # head_dim 64
)
def test_dropout_of_attention_probabilities(settings):
    c = GPTConfig(**TINY | settings, dropout=0.5)
    attention, x = Block(c).attn, torch.randn(2, 9, c.n_embd)
    attn = attn_inputs(c, tokens(2, 9))[1]
    assert not torch.equal(attention(x, attn), attention(x, attn))
    attention.eval()
    assert torch.equal(attention(x, attn), attention(x, attn))


@pytest.mark.parametrize("active, zeroed", [("attn", "mlp"), ("mlp", "attn")])
def test_dropout_of_block_outputs_and_embeddings(active, zeroed):
    c, idx, x = GPTConfig(**TINY, dropout=0.5), tokens(2, 9), torch.randn(2, 9, 16)
    block, embedder = Block(c), Embedder(c)
    block.attn.dropout = 0.0
    nn.init.zeros_(getattr(block, zeroed).proj.weight)
    positions, attn = attn_inputs(c, idx)
    output = block(x, attn) - x
    assert 0.3 < (output == 0).float().mean() < 0.7, f"{active} is dropped half of the time"
    assert 0.3 < (embedder(idx, positions) == 0).float().mean() < 0.7


# ----------------------------------------------------------------------------------------------------------
# RoPE and attention against their formulas


def test_rope_is_a_complex_rotation():
    x, position = torch.randn(2, 3, 50, 8, dtype=torch.float64), torch.arange(50) * 7
    actual = rotate(x, *rope_table(position, 8, 10000.0))
    frequency = torch.tensor([10000.0 ** (-2 * k / 8) for k in range(4)], dtype=torch.float64)
    rotation = torch.polar(torch.ones(50, 4, dtype=torch.float64), position[:, None] * frequency)
    expected = torch.complex(x[..., :4], x[..., 4:]) * rotation
    assert (
        rel_error(actual, torch.cat((expected.real, expected.imag), dim=-1)) < 3e-5
    )  # float32 angles to 343
    assert rel_error(actual[:, :, :4], torch.cat((expected.real, expected.imag), dim=-1)[:, :, :4]) < 2e-6


def test_rope_scores_depend_only_on_distance():
    q, k = torch.randn(2, 8, dtype=torch.float64)
    q, k = (rotate(x.expand(1, 1, 60, 8), *rope_table(torch.arange(60), 8, 100.0))[0, 0] for x in (q, k))
    scores = q @ k.T
    for distance in (-11, 0, 1, 30):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5
    assert scores.diagonal(1)[0] != pytest.approx(scores.diagonal(2)[0].item(), abs=1e-3)


def test_attention_matches_formula():
    torch.manual_seed(0)
    c = GPTConfig(**TINY, n_kv_head=2, position="none", bias=True)
    attention, x = Attention(c).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    actual = attention(x, AttnInputs(None, None, True))
    qkv = F.linear(x, attention.qkv.weight, attention.qkv.bias)
    q, k, v = qkv[..., :16], qkv[..., 16:24], qkv[..., 24:]
    expected = torch.zeros(2, 7, 16, dtype=torch.float64)
    for h in range(4):
        head, group = slice(4 * h, 4 * h + 4), slice(4 * (h // 2), 4 * (h // 2) + 4)
        for i in range(7):
            score = (q[:, i, None, head] * k[:, : i + 1, group]).sum(-1) / 2
            expected[:, i, head] = (score.softmax(-1)[..., None] * v[:, : i + 1, group]).sum(1)
    assert rel_error(actual, attention.proj(expected)) < 1e-12


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("T", [2, 64, 65, 150])
def test_block_attention_matches_sdpa(T, biased):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    bias = torch.randn(2, 1, T, T, dtype=torch.float64).masked_fill(torch.rand(2, 1, T, T) < 0.3, -torch.inf)
    bias.diagonal(dim1=-2, dim2=-1).zero_()
    bias = bias.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf) if biased else None
    actual = BlockAttention.apply(q, k, v, bias)
    expected = F.scaled_dot_product_attention(q, k, v, bias, is_causal=not biased)
    assert rel_error(actual, expected) < 1e-12
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), grad) for y in (actual, expected)), strict=True):
        assert rel_error(a, b) < 1e-12
    bf16 = BlockAttention.apply(
        *(x.detach().bfloat16() for x in (q, k, v)), bias.bfloat16() if biased else None
    )
    assert bf16.dtype == torch.bfloat16 and rel_error(bf16.double(), expected) < 0.03


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("heads, n_kv_head, head_dim", [(2, 2, 64), (4, 2, 64), (4, 1, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_cpu_attention_matches_sdpa(masked, heads, n_kv_head, head_dim, dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 70, head_dim).to(dtype) for n in (heads, n_kv_head, n_kv_head))
    mask = torch.zeros(2, 1, 70, 70)
    mask[0, :, 30:, :30] = -torch.inf
    mask = mask.masked_fill(torch.ones(70, 70, dtype=torch.bool).triu(1), -torch.inf) if masked else None
    actual, expected = (kernel(q, k, v, mask, not masked, 0.0) for kernel in (cpu_attention, sdpa))
    assert actual.dtype == expected.dtype == dtype and rel_error(actual.float(), expected.float()) < tolerance


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, dict(n_kv_head=2), dict(window=9), dict(position="shaw"), dict(position="alibi")]
)
def test_attention_gradients_in_bf16_are_close_to_float32(settings, causal):
    """With either kernel, and more than one block of queries."""
    model, idx = tiny(block_size=80, causal=causal, **settings), tokens(2, 80)
    segments, grads = (torch.arange(80) >= 30).long().expand(2, 80), []
    for segments_or_none in (None, segments):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(idx, idx.roll(1, 1), segments=segments_or_none)[1]
            weights = [p for name, p in model.named_parameters() if "attn" in name]
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
        float32, bf16 = grads[-2:]
        assert rel_error(bf16, float32) < 0.05
        assert F.cosine_similarity(bf16, float32, dim=0) > 0.999


@pytest.mark.parametrize("settings", [{}, dict(window=4), dict(position="shaw"), dict(position="alibi")])
def test_bidirectional_attention(settings):
    model, idx = tiny(causal=False, **settings), tokens(1, 9)
    other = idx.clone()
    other[0, 4] = (idx[0, 4] + 1) % V
    changed = (model(idx)[0] != model(other)[0]).any(-1)[0].tolist()
    assert changed == [True] * 9 if not settings.get("window") else all(changed[1:8])
    with pytest.raises(ValueError, match="causal"):
        KVCache(model.config, 1)


# ----------------------------------------------------------------------------------------------------------
# The same weights in Hugging Face models


def to_llama(model: GPT) -> dict[str, torch.Tensor]:
    c, ours = model.config, model.state_dict()
    heads = [n * c.head_dim for n in (c.n_head, c.kv_heads, c.kv_heads)]
    theirs = {
        "model.embed_tokens.weight": ours["embedder.tokens.weight"][: c.vocab_size],
        "model.norm.weight": ours["head.norm.weight"],
        "lm_head.weight": ours["head.linear.weight"][: c.vocab_size],
    }
    for i in range(c.n_layer):
        our, their = f"core.blocks.{i}.", f"model.layers.{i}."
        theirs[their + "input_layernorm.weight"] = ours[our + "norm1.weight"]
        theirs[their + "post_attention_layernorm.weight"] = ours[our + "norm2.weight"]
        for name, part in zip("qkv", ours[our + "attn.qkv.weight"].split(heads), strict=True):
            theirs[f"{their}self_attn.{name}_proj.weight"] = part
        theirs[their + "self_attn.o_proj.weight"] = ours[our + "attn.proj.weight"]
        theirs[their + "mlp.gate_proj.weight"], theirs[their + "mlp.up_proj.weight"] = ours[
            our + "mlp.fc.weight"
        ].chunk(2)
        theirs[their + "mlp.down_proj.weight"] = ours[our + "mlp.proj.weight"]
        if c.qk_norm:
            for name in "qk":
                theirs[f"{their}self_attn.{name}_norm.weight"] = ours[f"{our}attn.{name}_norm.weight"]
    return theirs


def to_gpt2(model: GPT) -> dict[str, torch.Tensor]:
    c, ours = model.config, model.state_dict()
    theirs = {
        "transformer.wte.weight": ours["embedder.tokens.weight"][: c.vocab_size],
        "transformer.wpe.weight": ours["embedder.positions.weight"],
        "lm_head.weight": ours["head.linear.weight"][: c.vocab_size],
        "transformer.ln_f.weight": ours["head.norm.weight"],
        "transformer.ln_f.bias": ours["head.norm.bias"],
    }
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj"}
    names |= {"mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
    for i in range(c.n_layer):
        for our, their in names.items():
            weight = ours[f"core.blocks.{i}.{our}.weight"]
            theirs[f"transformer.h.{i}.{their}.weight"] = weight if weight.ndim == 1 else weight.T
            theirs[f"transformer.h.{i}.{their}.bias"] = ours[f"core.blocks.{i}.{our}.bias"]
    return theirs


def hugging_face(model: GPT) -> nn.Module:
    """The same model as a class of transformers."""
    transformers, c = pytest.importorskip("transformers"), model.config
    if c.position == "learned":
        kind, weights = transformers.GPT2LMHeadModel, to_gpt2(model)
        config = transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[c.mlp],
            layer_norm_epsilon=c.norm_eps,
            n_inner=c.hidden,
            tie_word_embeddings=c.tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    else:
        kind, weights = transformers.LlamaForCausalLM, to_llama(model)
        config = transformers.LlamaConfig
        if c.qk_norm:
            kind, config = transformers.Qwen3ForCausalLM, transformers.Qwen3Config
        config = config(
            vocab_size=c.vocab_size,
            max_position_embeddings=c.block_size,
            hidden_size=c.n_embd,
            intermediate_size=c.hidden,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    theirs = kind(config)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return theirs.eval()


GPT2 = dict(norm="layernorm", position="learned", mlp="gelu", bias=True)


@pytest.mark.parametrize(
    "settings",
    [
        dict(n_kv_head=2),
        dict(n_kv_head=1, tied=False, rope_theta=500.0),
        dict(n_kv_head=2, qk_norm=True),
        GPT2,
        dict(GPT2, mlp="gelu_tanh"),
    ],
    ids=["llama", "llama-untied", "qwen3", "gpt2", "gpt2-tanh"],
)
@torch.no_grad()
def test_logits_and_greedy_tokens_match_hugging_face(settings):
    model = tiny(n_embd=32, block_size=256, vocab_size=300, **settings)
    for p in model.core.parameters():
        p *= 2 if p.ndim == 2 and model.config.tied else 1  # otherwise a tied model repeats its last token
    theirs, idx = hugging_face(model), tokens(3, 256, vocab=300)
    assert rel_error(model(idx)[0], theirs(idx).logits) < 1e-5
    prompt = idx[:, :20]
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200, do_sample=False, pad_token_id=0
    )
    assert expected.shape == (3, 220) and torch.equal(greedy(model, prompt, 200), expected)
    assert len(expected[:, 20:].unique()) > 20


# ----------------------------------------------------------------------------------------------------------
# Initialization


@pytest.mark.parametrize("init", ["gpt2", "zero", "fan_in"])
@pytest.mark.parametrize("tied", [True, False])
def test_std_of_every_matrix(init, tied):
    torch.manual_seed(0)
    c = GPTConfig(
        n_layer=8,
        n_head=4,
        n_embd=128,
        vocab_size=2000,
        bias=True,
        init=init,
        tied=tied,
        position="learned",
        norm="layernorm",
        share="lora",
    )
    model = GPT(c)
    base = 0.02 if init == "gpt2" else 128**-0.5
    proj = {"gpt2": 0.02 / 4, "zero": 0.0, "fan_in": 128**-0.5}[init]
    stds = {"tokens": 0.02, "positions": 0.02, "qkv.base": base, "attn.proj.base": proj, "fc.base": base}
    stds |= {"mlp.proj.base": c.hidden**-0.5 if init == "fan_in" else proj, "up": 0.0, "qkv.down": base}
    stds |= {"fc.down": base, "attn.proj.down": base, "head.linear": 0.0 if init == "zero" else 0.02}
    stds |= {"mlp.proj.down": 0.02 if init == "gpt2" else c.hidden**-0.5}
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.all(p == (1.0 if "norm" in name and name.endswith("weight") else 0.0)), name
        else:
            expected = next(std for suffix, std in stds.items() if name.endswith(suffix + ".weight"))
            assert p.std().item() == pytest.approx(expected, rel=0.08), name
            assert abs(p.mean().item()) <= 5 * expected / math.sqrt(p.numel()), name


@pytest.mark.parametrize("size", [dict(vocab_size=4096, n_embd=128), dict(vocab_size=50257, n_embd=256)])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_initial_loss(size, tied):
    torch.manual_seed(0)
    c = GPTConfig(n_layer=4, n_head=4, block_size=256, tied=tied, **size)
    idx, targets = tokens(2, 256, vocab=c.vocab_size), tokens(2, 256, seed=2, vocab=c.vocab_size)
    expected = math.log(c.vocab_size) + c.n_embd * 0.02**2 / 2
    assert GPT(c)(idx, targets)[1].item() == pytest.approx(expected, rel=0.005)
    if not tied:
        assert GPT(replace(c, init="zero"))(idx, targets)[1].item() == pytest.approx(
            math.log(c.vocab_size), abs=1e-3
        )


@torch.no_grad()
def test_zero_init_blocks_are_the_identity():
    torch.manual_seed(0)
    c = GPTConfig(**TINY, init="zero")
    x = torch.randn(2, 9, 16)
    assert torch.equal(GPT(c).core(x, attn_inputs(c, tokens(2, 9))[1]), x)


# ----------------------------------------------------------------------------------------------------------
# The loss


def both_losses(dtype=torch.float32, N=37, C=24, targets=None, scale=1.0, **settings):
    """(loss, dx, dweight, with a pointer dgate, dcopied) of the plain and of the chunked cross-entropy of
    70 ids, padded to 128."""
    torch.manual_seed(0)
    c = GPTConfig(vocab_size=70, n_embd=C, n_head=2, **settings)
    x, weight = torch.randn(N, C, dtype=dtype), 0.5 * torch.randn(128, C, dtype=dtype)
    targets = torch.randint(70, (N,)) if targets is None else targets
    gate, copied = torch.rand(2, N, dtype=dtype).log()
    copied[::4] = -1e9  # nothing to copy
    results = []
    for chunked in (False, True):
        x, weight, gate, copied = params = [p.detach().requires_grad_() for p in (x, weight, gate, copied)]
        if chunked:
            mixture = (gate, copied) if c.pointer else None
            loss = chunked_cross_entropy(x[None], weight, targets[None], c, mixture)
        else:
            logits = x @ weight[:70].T
            if c.softcap:
                logits = c.softcap * torch.tanh(logits / c.softcap)
            if c.pointer:
                mask, rows = targets >= 0, torch.arange(N)
                p = gate.exp() * logits.softmax(-1)[rows, targets] + copied.exp()
                loss = -(p.log() * mask).sum() / mask.sum().clamp(min=1)
            else:
                loss = cross_entropy(logits[None], targets[None])
        (scale * loss).backward()
        results.append((loss.detach(), *(p.grad for p in params if p.grad is not None)))
    return results


@pytest.mark.parametrize("settings", [{}, {"pointer": True}, {"loss_chunk": 0}, {"softcap": 3.0}])
def test_losses_of_each_target_are_those_of_the_logits(settings):
    """Also with chunks, and 0 where there is no target."""
    model, idx, targets = tiny(**{"loss_chunk": 3} | settings), tokens(2, 9), tokens(2, 9, seed=1)
    targets[0, 2:4] = -1
    with torch.no_grad():
        losses = model(idx, targets, reduction="none")[1]
        expected = F.cross_entropy(
            model(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
        )
        mean = model(idx, targets)[1]
    assert losses.shape == (18,) and (losses[2:4] == 0).all()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert mean.item() == pytest.approx(losses.sum().item() / 16, rel=1e-6)


LOSS_SETTINGS = [
    dict(),
    dict(softcap=3.0),
    dict(pointer=True, softcap=3.0),
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("settings", LOSS_SETTINGS, ids=lambda s: "+".join(s) or "plain")
@pytest.mark.parametrize("loss_chunk", [1, 8, 36, 37, 256])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_chunked_loss_matches_plain_loss(dtype, tolerance, settings, loss_chunk, ignored):
    targets = torch.randint(70, (37,), generator=torch.Generator().manual_seed(3))
    if ignored != "none":
        targets[{"some": slice(5, 30, 2), "all": slice(None)}[ignored]] = -1
    plain, chunked = both_losses(dtype, targets=targets, loss_chunk=loss_chunk, scale=3.0, **settings)
    for expected, actual in zip(plain, chunked, strict=True):
        assert actual.dtype == dtype and (actual - expected).abs().max() <= tolerance * max(
            1.0, expected.abs().max()
        )
    assert torch.all(chunked[2][70:] == 0)
    if ignored == "all":
        assert all(torch.all(part == 0) for part in chunked)


def test_plain_loss_matches_torch():
    logits, targets = torch.randn(2, 9, V), tokens(2, 9)
    targets[0, 3:5] = -1
    flat = logits.flatten(0, 1), targets.flatten()
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(*flat, ignore_index=-1, label_smoothing=smoothing)
        assert cross_entropy(logits, targets, smoothing).item() == pytest.approx(expected.item(), rel=1e-6)
    mask = targets.flatten() != -1
    z = flat[0].logsumexp(-1)[mask].square().mean()
    actual = cross_entropy(logits, targets, 0.0, 0.5)
    assert actual.item() == pytest.approx(
        (F.cross_entropy(*flat, ignore_index=-1) + 0.5 * z).item(), rel=1e-6
    )


def test_loss_of_uniform_logits_is_log_v():
    model = tiny(tied=False)
    nn.init.zeros_(model.head.linear.weight)
    idx = tokens(2, 9)
    assert model(idx, idx)[1].item() == pytest.approx(math.log(V), abs=1e-6)


@pytest.mark.parametrize("loss_chunk", [0, 8])
def test_smoothing_and_z_loss_apply_only_in_training(loss_chunk):
    model = tiny(label_smoothing=0.2, z_loss=0.1, loss_chunk=loss_chunk)
    idx, targets = tokens(2, 9), tokens(2, 9, seed=2)
    plain = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())
    assert model(idx, targets)[1].item() == pytest.approx(plain.item(), rel=1e-6)
    assert model.train()(idx, targets)[1].item() > plain.item() + 0.1


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(softcap=2.0),
        dict(tied=False),
        dict(z_loss=0.1),
        dict(label_smoothing=0.2),
        dict(softcap=3.0, z_loss=0.1, label_smoothing=0.2),
    ],
    ids=lambda s: "+".join(s) or "plain",
)
def test_model_gradients_match_with_chunked_loss(settings):
    idx, targets = tokens(3, 9), tokens(3, 9, seed=2)
    targets[0, :4] = -1
    plain, chunked = tiny(loss_chunk=0, **settings).train(), tiny(loss_chunk=5, **settings).train()
    for model in (plain, chunked):
        model(idx, targets)[1].backward()
    for (name, a), b in zip(plain.named_parameters(), chunked.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-6 * max(1.0, a.grad.abs().max()), name


def test_padded_vocabulary_is_ignored():
    model, idx = tiny(tied=False, loss_chunk=5), tokens(3, 9)
    with torch.no_grad():
        model.head.linear.weight[V:] = 100.0
    assert model(idx)[0].shape[-1] == V
    logits, loss = model(idx)[0], model(idx, idx)[1]
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), idx.flatten()).item(), rel=1e-6)
    loss.backward()
    assert torch.all(model.head.linear.weight.grad[V:] == 0)
    assert torch.all(model.head.linear.weight.grad[:V].abs().sum(-1) > 0)


def test_chunked_loss_under_no_grad():
    x, weight = torch.randn(1, 9, 16), torch.randn(64, 16, requires_grad=True)
    c, targets = GPTConfig(**TINY, loss_chunk=4), tokens(1, 9)
    with torch.no_grad():
        loss = chunked_cross_entropy(x, weight, targets, c)
    assert torch.equal(loss, chunked_cross_entropy(x, weight, targets, c)) and not loss.requires_grad


def test_replaced_head_linear_uses_the_plain_loss():
    class Doubled(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return 2 * self.linear(x)

    model, idx = tiny(tied=False), tokens(2, 9)
    model.set_submodule("head.linear", Doubled(model.head.linear))
    logits, loss = model(idx, idx)
    expected = F.cross_entropy(model(idx)[0].flatten(0, 1), idx.flatten())
    assert logits is None and loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss_chunk", [0, 5])
def test_negative_targets_other_than_minus_one_are_ignored_or_raise(loss_chunk):
    model, idx, targets = tiny(loss_chunk=loss_chunk), tokens(2, 9), tokens(2, 9, seed=2)
    targets[0, :4] = -1
    expected = model(idx, targets)[1]
    targets[0, :4] = -100
    try:
        assert model(idx, targets)[1].item() == pytest.approx(expected.item(), rel=1e-6)
    except (IndexError, RuntimeError, ValueError):
        pass


# ----------------------------------------------------------------------------------------------------------
# Numerics and devices


def gradient(model: GPT, idx, targets) -> torch.Tensor:
    model.zero_grad()
    model(idx, targets)[1].float().backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters()])


@pytest.mark.parametrize("loss_chunk", [0, 8])
def test_bfloat16_autocast_is_close_to_float32(loss_chunk):
    model, idx, targets = tiny(loss_chunk=loss_chunk), tokens(4, 16), tokens(4, 16, seed=2)
    loss, grad = model(idx, targets)[1], gradient(model, idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        low_loss, low_grad = model(idx, targets)[1], gradient(model, idx, targets)
        assert rel_error(model(idx)[0].float(), model(idx)[0]) < 0.05
    assert low_loss.dtype == torch.float32 and low_loss.item() == pytest.approx(loss.item(), rel=0.01)
    assert F.cosine_similarity(grad, low_grad, dim=0) > 0.995
    full = tiny(loss_chunk=loss_chunk).bfloat16()
    assert full(idx)[0].dtype == torch.bfloat16
    assert full(idx, targets)[1].item() == pytest.approx(loss.item(), rel=0.03)
    assert F.cosine_similarity(grad, gradient(full, idx, targets), dim=0) > 0.98


@torch.no_grad()
def test_causality_in_bfloat16():
    model, idx = tiny(n_kv_head=2), tokens(1, 13)
    other = idx.clone()
    other[0, 6] = (idx[0, 6] + 1) % V
    with torch.autocast("cpu", torch.bfloat16):
        same = (model(idx)[0] == model(other)[0]).all(-1)[0].tolist()
    assert same[:6] == [True] * 6 and not all(same[6:])


def test_float16_gradients_do_not_underflow():
    torch.manual_seed(0)
    c = GPTConfig(vocab_size=4096, n_embd=24, n_head=2)
    x, weight = torch.randn(1, 6000, 24), 0.02 * torch.randn(4096, 24)
    targets, grads = torch.randint(4096, (1, 6000)), []
    for dtype in (torch.float32, torch.float16):
        weight = weight.detach().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            chunked_cross_entropy(x, weight, targets, c).backward()
        grads.append(weight.grad)
    assert rel_error(grads[1], grads[0]) < 0.01
    assert (grads[1] == 0).float().mean() < 0.001


def run_on_meta(settings: dict) -> None:
    """Forward, backward, clipping and AdamW on the meta device; a tensor on another device raises."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class OnMeta(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, (
                    f"{function} left the meta device"
                )
            return out

    with torch.device("meta"):
        model = GPT(GPTConfig(**{**TINY, **settings}))
    idx = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with OnMeta():
        assert model(idx)[0].is_meta
        model(idx, idx)[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if model.config.causal:
            model(idx, cache=KVCache(model.config, 2, device="meta"))
    assert all(p.grad.is_meta for p in model.parameters())
    optimizer.step()


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(loss_chunk=0, dropout=0.1),
        dict(position="alibi", window=4),
        dict(position="alibi", n_head=2, causal=False),
        dict(position="shaw", shaw_values=True, n_kv_head=2),
        dict(position="shaw", window=4),
        dict(position="sinusoidal", qk_norm=True),
        dict(position="learned", softcap=3.0, z_loss=0.1, label_smoothing=0.1),
    ],
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()) or "default",
)
def test_training_on_the_meta_device(settings):
    run_on_meta(settings)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**TINY)), tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    first = model(idx[:, :-1], idx[:, 1:])[1].item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first


RECIPES = {
    "tiny": dict(n_layer=2, n_head=2, n_embd=64, vocab_size=512),
    "gpt2": dict(GPT2, n_layer=2, n_head=2, n_embd=64, vocab_size=512),
    "modern": dict(
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=64,
        vocab_size=512,
        qk_norm=True,
        norm_weight=False,
        mlp="relu2",
        tied=False,
        init="zero",
        softcap=15.0,
        embed_norm=True,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_inductor_matches_eager(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, loss_chunk=48, **RECIPES[name]))
    idx, targets = tokens(2, 64, vocab=512), tokens(2, 64, seed=2, vocab=512)
    losses, grads = [], []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        losses.append(run(idx, targets)[1])
        losses[-1].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (
        losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5) and rel_error(grads[1], grads[0]) < 1e-4
    )


# ----------------------------------------------------------------------------------------------------------
# Weight sharing and counts


def step_and_roundtrip(model: GPT, folder) -> GPT:
    """One optimizer step, then save and load as a new model."""
    idx = tokens(2, 9)
    model(idx, idx)[1].backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    state = {"model_config": asdict(model.config), "model": model.state_dict()}
    checkpoint.save(folder / "x.pt", state | {"tokenizer": tokenizer.get("byte").state()})
    loaded, _ = checkpoint.load(folder / "x.pt")
    assert torch.equal(loaded(idx)[0], model.eval()(idx)[0])
    assert loaded.config == model.config
    return loaded


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_share_storage_after_a_roundtrip(tied, tmp_path):
    settings = dict(tied=tied, vocab_size=257)  # as the tokenizer in the checkpoint
    for model in (tiny(**settings), step_and_roundtrip(tiny(**settings), tmp_path)):
        assert (model.head.linear.weight is model.embedder.tokens.weight) == tied


@pytest.mark.parametrize("share", ["mlp", "layers", "lora"])
def test_shared_weights_share_storage_after_a_roundtrip(share, tmp_path):
    settings = dict(share=share, n_layer=3, vocab_size=257)
    for model in (tiny(**settings), step_and_roundtrip(tiny(**settings), tmp_path)):
        first, *others = model.core.blocks
        for block in others:
            if share == "lora":
                assert block.mlp.fc.base.weight is first.mlp.fc.base.weight
                assert block.attn.qkv.base.weight is first.attn.qkv.base.weight
                assert block.attn.qkv.up.weight is not first.attn.qkv.up.weight
            else:
                assert block.mlp.fc.weight is first.mlp.fc.weight
                assert (block.attn.qkv.weight is first.attn.qkv.weight) == (share == "layers")
            assert (block.norm1.weight is first.norm1.weight) == (share == "layers")


# ----------------------------------------------------------------------------------------------------------
# model.py as a single file


def test_model_py_works_as_a_single_file(tmp_path):
    """Copied into an empty directory, it builds GPT-2 and Llama shapes and does not import nanostlm."""
    (tmp_path / "model.py").write_bytes((ROOT / "model.py").read_bytes())
    program = """
import torch
from model import GPT, GPTConfig
gpt2 = dict(norm="layernorm", position="learned", mlp="gelu_tanh", bias=True, dropout=0.1)
for settings in ({}, dict(n_kv_head=2, tied=False, qk_norm=True, window=5, separator=3, softcap=5.0), gpt2):
    config = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=50, **settings)
    model, idx = GPT(config), torch.randint(50, (2, 16))
    logits, none = model(idx)
    assert logits.shape == (2, 16, 50) and none is None
    none, loss = model(idx, idx)
    loss.backward()
    assert none is None and loss.isfinite() and all(p.grad is not None for p in model.parameters())
    assert config.estimate()["parameters"] == sum(p.numel() for p in model.parameters())
import sys
assert not any(name.startswith("nanostlm") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_default_model_does_not_import_nanostlm():
    program = "import sys, model; model.GPT(model.GPTConfig(n_layer=1)); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    assert b"nanostlm" not in modules.stdout


# ----------------------------------------------------------------------------------------------------------
# GPT.generate, and user-defined layers


def test_gpt_generate_matches_cached_generation_and_full_forward():
    """Greedy equals cached generation within the context; past it, it uses the last block_size tokens."""
    model, prompt = tiny(separator=5), tokens(1, 3)
    ids = model.generate(prompt, 20, temperature=0)
    assert ids.shape == (1, 23) and torch.equal(ids[:, :3], prompt)
    cached = generate(model, [prompt[0, 1:].tolist()], 13, chain(temperature=0), eot=int(prompt[0, 0]))[0]
    assert cached == ids[0, 3 : 3 + len(cached)].tolist()
    assert ids[0, -1] == model(ids[:, -17:-1])[0][0, -1].argmax()
    torch.manual_seed(0)
    sampled = model.generate(prompt.expand(200, 3), 1, top_k=3)[:, -1]
    assert set(sampled.tolist()) == set(model(prompt)[0][0, -1].topk(3).indices.tolist())
    assert torch.equal(model.generate(prompt, 5, top_k=1), ids[:, :8])
    assert torch.equal(model.generate(prompt, 0), prompt)


class DepthwiseConv(nn.Module):
    """A causal convolution over the last 3 tokens, as an example of a user's replacement for the MLP."""

    def __init__(self, c, act):
        super().__init__()
        self.conv, self.act = nn.Conv1d(c.n_embd, c.n_embd, 3, groups=c.n_embd), act

    def forward(self, x):
        return self.act(self.conv(F.pad(x.mT, (2, 0))).mT)


def test_user_defined_layer_in_the_mlp_table(monkeypatch):
    monkeypatch.setitem(MLPS, "conv", (DepthwiseConv, F.relu))
    monkeypatch.setitem(CHOICES, "mlp", (*CHOICES["mlp"], "conv"))
    model = GPT(GPTConfig(**TINY, mlp="conv"))
    loss = model(tokens(2, 9), tokens(2, 9, seed=2))[1]
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
