"""GPTConfig: parameter counts, FLOPs, memory; invalid settings are named."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from test_model import TINY, V

from model import GPT, GPTConfig


def check_counts(model: GPT) -> None:
    """Compare the counts from the configuration with the tensors of the model."""
    c, counts = model.config, model.config.estimate()
    core = [p for part in (model.core, model.pointer) if part for p in part.parameters()]
    matrices = [p.numel() for p in model.core.blocks[0].parameters() if p.ndim == 2]
    per_token = c.n_layer * sum(matrices) + c.padded_vocab * c.n_embd + c.pointer * 3 * c.n_embd**2
    attention = 6 * (2 * c.n_layer + c.pointer) * c.block_size * c.n_embd
    assert counts["parameters"] == sum(p.numel() for p in model.parameters())
    assert counts["parameters"] - counts["embedding_parameters"] == sum(p.numel() for p in core)
    assert counts["flops_per_token"] == 6 * per_token + attention


def test_parameter_count():
    c = GPTConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab_size=100, mlp_hidden=48)
    block = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    embedding = 128 * 32 + 32
    counts = c.estimate()
    assert counts["parameters"] == embedding + 3 * block
    assert counts["embedding_parameters"] == embedding
    assert replace(c, tied=False).estimate()["embedding_parameters"] == embedding + 128 * 32
    check_counts(GPT(c))


@pytest.mark.parametrize(
    "settings, core, total",
    [
        (dict(n_layer=8, mlp_hidden=1320), 21_471_232, 47.20),
        (dict(n_layer=10, mlp_hidden=1536), 30_156_800, 55.89),
        (dict(n_layer=10, mlp_hidden=1536, share="mlp"), 8_923_136, 34.66),
    ],
    ids=["baseline", "debug", "ffn_sharing"],
)
def test_sizes_of_super_tiny_language_models(settings, core, total):
    """Published sizes in millions of parameters, with 50,257 rows of embedding (ours are padded)."""
    c = GPTConfig(n_head=16, n_kv_head=4, n_embd=512, vocab_size=50257, **settings)
    counts, padding = c.estimate(), (c.padded_vocab - c.vocab_size) * 512
    assert c.padded_vocab == 50304 and counts["parameters"] - counts["embedding_parameters"] == core
    assert (counts["parameters"] - padding) / 1e6 == pytest.approx(total, abs=0.006)
    with torch.device("meta"):
        check_counts(GPT(c))


def test_mlp_hidden_width():
    assert GPTConfig(n_embd=384, mlp="gelu").hidden == 1536
    assert GPTConfig(n_embd=384).hidden == 1024
    assert GPTConfig(n_embd=384, mlp_ratio=2.5, mlp="relu").hidden == 960
    assert GPTConfig(n_embd=384, mlp_hidden=77).hidden == 77
    gated, plain = (GPTConfig(n_layer=1, n_embd=384, mlp=mlp).estimate() for mlp in ("swiglu", "gelu"))
    assert gated["parameters"] == plain["parameters"]


def test_flops_per_token():
    c = GPTConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab_size=100, block_size=64, mlp_hidden=48)
    block = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48
    expected = 6 * (3 * block + 128 * 32) + 12 * 3 * 64 * 32
    for share in ("none", "mlp", "layers"):
        assert replace(c, share=share).estimate()["flops_per_token"] == expected


def test_memory_estimate():
    c = GPTConfig(n_layer=3, n_head=4, n_embd=32, vocab_size=100, mlp_hidden=48, loss_chunk=10)
    parameters, activations = c.estimate()["parameters"], 3 * (14 * 32 + 3 * 48)
    assert c.estimate()["activations_per_token"] == activations
    assert c.memory(50, 4) == 16 * parameters + 6 * 50 * activations + 12 * 10 * 128
    assert c.memory(50, 2) == 20 * parameters + 4 * 50 * activations + 10 * 10 * 128
    assert replace(c, loss_chunk=0).memory(50, 4) == 16 * parameters + 6 * 50 * activations + 12 * 50 * 128
    assert replace(c, loss_chunk=10**9).memory(50, 4) == replace(c, loss_chunk=0).memory(50, 4)
    c = replace(c, position="shaw", shaw_clip=7)
    assert c.estimate()["activations_per_token"] == activations + 3 * 4 * 15


# ----------------------------------------------------------------------------------------------------------
# Invalid settings


@pytest.mark.parametrize(
    "field, value",
    [
        ("n_layer", 0),
        ("n_layer", -1),
        ("n_layer", 2.5),
        ("n_layer", "6"),
        ("n_layer", None),
        ("n_layer", True),
        ("n_head", 0),
        ("n_head", 5),
        ("n_embd", 0),
        ("n_embd", float("nan")),
        ("block_size", 0),
        ("vocab_size", 0),
        ("vocab_size", 64.0),
        ("n_kv_head", 3),
        ("n_kv_head", 8),
        ("n_kv_head", -1),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("dropout", "0.1"),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("norm", "batchnorm"),
        ("norm", 1),
        ("norm", None),
        ("norm_eps", -1e-5),
        ("norm_eps", float("inf")),
        ("position", "xpos"),
        ("rope_theta", 0.0),
        ("rope_theta", float("nan")),
        ("rope_theta", -1.0),
        ("shaw_clip", 0),
        ("causal", 1),
        ("causal", "False"),
        ("tied", None),
        ("window", -1),
        ("window", 2.5),
        ("mlp", "swish"),
        ("mlp_ratio", -1.0),
        ("mlp_ratio", 0.0),
        ("mlp_ratio", float("inf")),
        ("mlp_hidden", -1),
        ("mlp_hidden", 3.5),
        ("share", "all"),
        ("lora_rank", 0),
        ("init", "xavier"),
        ("softcap", -1.0),
        ("softcap", float("inf")),
        ("z_loss", -1.0),
        ("z_loss", float("nan")),
        ("loss_chunk", -1),
        ("loss_chunk", 1.5),
        ("separator", -2),
        ("separator", V),
        ("separator", 1.0),
    ],
)
def test_invalid_setting_is_named_in_the_error(field, value):
    with pytest.raises(ValueError, match=field) as excinfo:
        GPT(GPTConfig(**{**TINY, field: value}))
    assert "\n" not in str(excinfo.value)


def test_rope_needs_an_even_head_width():
    with pytest.raises(ValueError, match="even head width"):
        GPT(GPTConfig(n_layer=1, n_head=2, n_embd=10, vocab_size=9))
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=10, vocab_size=9, position="alibi"))


def test_int_is_accepted_for_float():
    GPT(GPTConfig(**TINY, dropout=0, mlp_ratio=4, rope_theta=10000, softcap=15))


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        GPTConfig().n_layer = 3
