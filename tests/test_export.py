"""
Exports to transformers and llama2.c give the same logits, ids and text; imports from transformers.

transformers is an independent implementation. For llama2.c, `RunC` below is a numpy implementation of the
format; if LLAMA2C names a checkout, the real run.c is compiled and compared too.
"""

import codecs
import json
import os
import shutil
import string
import struct
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import export
from model import GPT, GPTConfig
from nanostlm import checkpoint
from nanostlm import tokenizer as tokenizers
from nanostlm.formats.hf import from_hf, to_hf
from nanostlm.formats.llama2c import to_llama2c
from nanostlm.generate import chain, generate, stories

STORIES = [
    "Once upon a time there was a little pumpkin. She didn't like the big, dark barn!",
    'The dog and the cat were friends. "Let\'s play," said the dog. They played all day.',
    "One day, Lily saw 12 birds in the park.\nShe was happy. Her mom said: it's time to go home.",
    "Tom had a red ball. He lost it, and he was sad… then his friend Zoë found it 🙂.",
]
TEXTS = ["", " ", "Once upon a time", "don't  'said' <|endoftext|>\n\n 12345\t“Zoë” 🙂 \x00 ÿ", *STORIES]
SMALL = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=48)


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train_bpe(STORIES * 3, 300)


def random_model(tokenizer, **settings) -> GPT:
    """A random model in which every weight affects the output: no zeros or ones, logits of std about 1."""
    torch.manual_seed(0)
    model = GPT(replace(SMALL, vocab_size=tokenizer.vocab_size, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.ndim == 2 else 1 + torch.randn_like(p) * 0.3)
    return model


@pytest.fixture(scope="module")
def trained(bpe, tmp_path_factory):
    """The folder of a run that has memorized STORIES."""
    torch.manual_seed(0)
    model = GPT(replace(SMALL, block_size=96, vocab_size=bpe.vocab_size, n_kv_head=2, tied=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = [torch.tensor([bpe.eot, *bpe.encode(story), bpe.eot]) for story in STORIES]
    idx = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    assert idx.shape[1] <= 96
    for _ in range(100):
        model(idx[:, :-1].clamp(min=0), idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("run") / "out" / "tiny"
    folder.mkdir(parents=True)
    state = {"model": model.state_dict(), "model_config": asdict(model.config), "tokenizer": bpe.state()}
    checkpoint.save(folder / "best.pt", state)
    return folder


def greedy(model: GPT, ids: list[int], n: int, eot: int) -> list[int]:
    return generate(model, [ids], n, chain(temperature=0, top_p=1), eot=eot)[0]


# ----------------------------------------------------------------------------------------------------------
# Hugging Face

GPT2 = dict(norm="layernorm", position="learned", mlp="gelu_tanh", bias=True)
NANOCHAT = dict(mlp="relu2", qk_norm=True, norm_weight=False, embed_norm=True)
CASES = {  # name: (class of transformers, settings)
    "llama": ("Llama", dict()),
    "llama gqa untied": ("Llama", dict(n_kv_head=2, tied=False, norm_eps=1e-6, rope_theta=500.0)),
    "llama geglu biases": ("Llama", dict(mlp="geglu", bias=True)),
    "llama no norm weights": ("Llama", dict(norm_weight=False, window=48)),
    "shared feed-forward": ("Llama", dict(share="mlp")),
    "shared layers": ("Llama", dict(share="layers", tied=False)),
    "lora": ("Llama", dict(share="lora", n_kv_head=1, bias=True)),
    "window": ("Mistral", dict(window=5)),
    "shortest window": ("Mistral", dict(window=2)),
    "qk_norm": ("Qwen3", dict(qk_norm=True, n_kv_head=2)),
    "qk_norm shortest window": ("Qwen3", dict(qk_norm=True, window=2)),
    "qk_norm window": ("Qwen3", dict(qk_norm=True, window=5, tied=False)),
    "plain": ("Arcee", dict(mlp="relu2", bias=True)),
    "plain qk_norm": ("Apertus", dict(mlp="relu2", qk_norm=True, tied=False, rope_theta=100.0)),
    "nanochat": ("NanoChat", dict(NANOCHAT, softcap=5.0, n_kv_head=2, tied=False)),
    "nanochat tied": ("NanoChat", NANOCHAT),
    "gpt2": ("GPT2", GPT2),
    "gpt2 no biases": ("GPT2", dict(GPT2, bias=False, mlp="gelu", mlp_hidden=80, n_kv_head=4)),
    "gpt2 untied sinusoidal": ("GPT2", dict(GPT2, tied=False, position="sinusoidal", mlp="relu")),
    "gpt2 no positions": ("GPT2", dict(GPT2, position="none", mlp="tanh", share="layers", norm_weight=False)),
    "gpt2 silu": ("GPT2", dict(GPT2, mlp="silu", share="lora")),
    "gpt2 leaky": ("GPT2", dict(GPT2, mlp="leaky_relu", norm_eps=1e-3)),
}


def open_model(folder):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info  # no missing and no unexpected keys
    return model.eval()


def open_hf(folder):
    model = open_model(folder)
    return model, pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def edit_json(path: Path, missing: list[str], **changes) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if key not in missing}))


def hf_greedy(model, tokenizer, text: str, n: int) -> list[int]:
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=n, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids


@pytest.mark.parametrize("case", CASES)
def test_transformers_match(case, bpe, tmp_path):
    name, settings = CASES[case]
    model = random_model(bpe, **settings)
    assert to_hf(model, bpe, tmp_path).startswith(name)
    theirs, tokenizer = open_hf(tmp_path)
    assert type(theirs).__name__.startswith(name)
    assert theirs.get_input_embeddings().weight.shape[0] == bpe.vocab_size
    tied = theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    assert tied == settings.get("tied", True)
    idx = torch.randint(0, bpe.vocab_size, (3, 48))
    with torch.no_grad():
        expected = model(idx)[0]
        assert expected.std() > 0.3
        torch.testing.assert_close(theirs(idx).logits, expected, rtol=0, atol=1e-5)
    text = "Once upon a time"
    assert hf_greedy(theirs, tokenizer, text, 32) == greedy(model, bpe.encode(text), 32, bpe.eot)


@pytest.mark.parametrize("case", CASES)
def test_hf_roundtrip(case, bpe, tmp_path):
    model = random_model(bpe, **CASES[case][1])
    to_hf(model, bpe, tmp_path)
    loaded, tokenizer = from_hf(tmp_path)
    assert tokenizer.state() == bpe.state() | {"name": tokenizer.name} and tokenizer.name == "bpe300"
    idx = torch.randint(0, bpe.vocab_size, (3, 48))
    if model.config.share == "lora":  # merged, so equal up to rounding
        return torch.testing.assert_close(loaded(idx)[0], model(idx)[0], rtol=0, atol=1e-5)
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    ours, theirs, V = model.state_dict(), loaded.state_dict(), bpe.vocab_size
    for name, weight in theirs.items():
        if name in ours:  # bitwise, except for the padded vocabulary
            assert torch.equal(weight[:V], ours[name][:V]), name
        elif name != "embedder.positions.weight":  # written explicitly: ones or zeros
            assert weight.unique().item() == name.endswith("weight"), name


def test_unsupported_settings_are_named(bpe, tmp_path):
    for settings, message in [
        (dict(position="alibi"), "position=alibi has no equivalent in LlamaForCausalLM"),
        (dict(GPT2, position="shaw"), "position=shaw has no equivalent in GPT2LMHeadModel"),
        (dict(softcap=30.0), "softcap=30.0 has no equivalent in LlamaForCausalLM"),
        (dict(norm="layernorm"), "norm=layernorm has no"),
        (dict(norm="none"), "norm=none has no"),
        (dict(embed_norm=True), "embed_norm=True has no"),
        (dict(NANOCHAT, pointer=True), "pointer=True has no equivalent in NanoChat"),
        (dict(causal=False), "causal=False has no"),
        (dict(NANOCHAT, embed_norm=False, softcap=5.0), "embed_norm=False has no equivalent in NanoChat"),
        (dict(GPT2, window=8, n_kv_head=1), "window=8, n_kv_head=1 have no equivalent in GPT2LMHeadModel"),
        (dict(GPT2, mlp="swiglu"), "mlp=swiglu has no"),
        (dict(window=1), "window=1 has no equivalent in MistralForCausalLM with a cache"),
        (dict(window=1, qk_norm=True), "window=1 has no equivalent in Qwen3ForCausalLM with a cache"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_hf(random_model(bpe, **settings), bpe, tmp_path / "no")
        assert not (tmp_path / "no").exists()


def vocabularies(bpe):
    yield bpe
    yield tokenizers.get("byte")
    try:
        yield tokenizers.get("gpt2")
    except tokenizers.Unreachable:
        pass


def test_tokenizer_ids_match(bpe, tmp_path):
    pytest.importorskip("transformers")
    for ours in vocabularies(bpe):
        folder = tmp_path / ours.name
        to_hf(random_model(ours, n_embd=8, n_layer=1), ours, folder)
        model, theirs = open_hf(folder)
        assert theirs.bos_token_id == theirs.eos_token_id == ours.eot == model.config.bos_token_id
        for text in TEXTS:
            assert theirs(text).input_ids == [ours.eot, *ours.encode(text)], (ours.name, text)
            assert theirs.decode(ours.encode(text)) == text
        assert theirs("a", "b").input_ids == [ours.eot, *ours.encode("a"), ours.eot, *ours.encode("b")]
        assert from_hf(folder)[1].state() == ours.state()


def test_generated_text_matches_transformers(trained, bpe, tmp_path):
    model, _ = checkpoint.load(trained)
    to_hf(model, bpe, tmp_path)
    theirs, tokenizer = open_hf(tmp_path)
    for prompt, story in zip(("Once upon a time", "The dog", "One", "Tom"), STORIES, strict=True):
        n = model.config.block_size - 1 - len(bpe.encode(prompt))
        ours = stories(model, bpe, prompt, 1, n, temperature=0, top_p=1)[0]
        assert prompt + tokenizer.decode(hf_greedy(theirs, tokenizer, prompt, n)) == ours
        assert ours == story


# ----------------------------------------------------------------------------------------------------------
# Foreign models


def save_foreign(folder, model, tokens=STORIES, special=("<|endoftext|>",), edit=lambda data: None, **saving):
    """Write a folder as transformers does, with a new Hugging Face tokenizer whose special ids come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[*special],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.train_from_iterator(tokens, trainer)
    model.save_pretrained(folder, **saving)
    data = json.loads(hf.to_str())
    edit(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return hf


def foreign_model(name="Llama", **settings):
    """A random model of class {name}ForCausalLM of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=310,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes | settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.ndim == 2 else 1 + torch.randn_like(p) * 0.3)
    return model


def check_import(folder, theirs, hf, begin=0, end=0, atol=1e-5):
    model, tokenizer = from_hf(folder)
    for text in (text for text in TEXTS if "<|" not in text):
        assert [hf.id_to_token(i) for i in hf.encode(text).ids] == [
            "".join(tokenizers.byte_chars()[b] for b in tokenizer.tokens[i]) for i in tokenizer.encode(text)
        ]
    text = STORIES[0][:40]
    ids, inputs = tokenizer.encode(text), [begin, *hf.encode(text).ids]
    with torch.no_grad():
        actual = model(torch.tensor([[tokenizer.eot, *ids]]))[0][0]
        expected = theirs(torch.tensor([inputs])).logits[0].float()
    order = [hf.token_to_id("".join(tokenizers.byte_chars()[b] for b in t)) for t in tokenizer.tokens[:-1]]
    torch.testing.assert_close(actual, expected[:, [*order, end]], rtol=0, atol=atol)
    return model, tokenizer


def test_import_llama(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 99.0}
    for i, settings in enumerate(
        [
            dict(),
            dict(tie_word_embeddings=True),
            dict(rope_parameters=rope),
            dict(attention_bias=True, mlp_bias=True),
        ]
    ):
        theirs = foreign_model(**settings)
        hf = save_foreign(tmp_path / str(i), theirs)
        model, tokenizer = check_import(tmp_path / str(i), theirs, hf)
        assert tokenizer.vocab_size == 300 and model.config.tied == settings.get("tie_word_embeddings", False)
    hf = save_foreign(tmp_path / "shards", theirs, max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    check_import(tmp_path / "shards", theirs, hf)
    hf = save_foreign(tmp_path / "bf16", theirs.bfloat16())
    check_import(tmp_path / "bf16", type(theirs).from_pretrained(tmp_path / "bf16", dtype="float32"), hf)


QWEN3 = dict(head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=0)
SLIDING, FULL = ["sliding_attention"] * 2, ["full_attention"] * 2
MIXED = ["sliding_attention", "full_attention"]
INCOMPLETE = {  # class, its settings, keys left out of config.json, our settings
    "window of qwen3": ("Qwen3", QWEN3, ["layer_types"], dict(window=5)),
    "use_sliding_window": ("Qwen3", QWEN3, ["layer_types", "use_sliding_window"], dict(window=0)),
    "max_window_layers": ("Qwen3", QWEN3, ["layer_types", "max_window_layers"], dict(window=0)),
    "all full": ("Qwen3", QWEN3 | dict(layer_types=FULL), [], dict(window=0)),
    "all sliding": ("Qwen3", QWEN3 | dict(layer_types=SLIDING), ["max_window_layers"], dict(window=5)),
    "window of mistral": ("Mistral", {}, ["sliding_window"], dict(window=4096)),
    "no window": ("Mistral", dict(sliding_window=None), [], dict(window=0)),
    "mistral ignores use_sliding_window": (
        "Mistral",
        dict(sliding_window=5, use_sliding_window=False),
        [],
        dict(window=5),
    ),
    "softcap": ("NanoChat", {}, ["final_logit_softcapping"], dict(softcap=15.0)),
    "no softcap": ("NanoChat", dict(final_logit_softcapping=None), [], dict(softcap=0.0)),
    "biases": ("Llama", {}, ["attention_bias", "mlp_bias"], dict(bias=False)),
    "rope of llama": ("Llama", {}, ["rope_parameters"], dict(rope_theta=10000.0)),
    "key/value heads": ("Llama", dict(num_key_value_heads=4), ["num_key_value_heads"], dict(n_kv_head=0)),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_missing_config_keys_take_the_defaults_of_transformers(case, tmp_path):
    name, settings, missing, expected = INCOMPLETE[case]
    hf = save_foreign(tmp_path, foreign_model(name, **settings))
    edit_json(tmp_path / "config.json", missing)
    theirs = open_model(tmp_path)
    model, _ = check_import(tmp_path, theirs, hf)
    assert {key: getattr(model.config, key) for key in expected} == expected


@pytest.mark.parametrize(
    "name, settings, missing, message",
    [
        ("Qwen3", QWEN3 | dict(layer_types=MIXED), [], "layer_types=full_attention and sliding_attention"),
        ("Qwen3", QWEN3 | dict(max_window_layers=1), ["layer_types"], "max_window_layers=1"),
        ("Qwen3", dict(head_dim=8, layer_types=SLIDING), [], "layer_types=sliding_attention"),
        ("Qwen3", QWEN3, ["head_dim"], "head_dim=128"),
        ("Apertus", dict(hidden_act="relu2"), ["rope_parameters"], "rope_type=llama3"),
        ("Llama", dict(attention_bias=True, mlp_bias=True), ["mlp_bias"], "mlp_bias=False"),
        ("Llama", dict(partial_rotary_factor=0.5), [], "partial_rotary_factor=0.5"),
    ],
)
def test_unsupported_imports_raise(name, settings, missing, message, tmp_path):
    save_foreign(tmp_path, foreign_model(name, **settings))
    edit_json(tmp_path / "config.json", missing)
    with pytest.raises(ValueError, match=f"{message} has no equivalent in model.py"):
        from_hf(tmp_path)


def test_head_that_differs_from_the_embedding_is_not_tied(tmp_path):
    hf = save_foreign(tmp_path, foreign_model())
    edit_json(tmp_path / "config.json", [], tie_word_embeddings=True)
    model, _ = check_import(tmp_path, open_model(tmp_path), hf)
    assert not model.config.tied


def test_rope_theta_of_older_files_is_read(bpe, tmp_path):
    model = random_model(bpe, rope_theta=99.0)
    to_hf(model, bpe, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    idx = torch.randint(0, bpe.vocab_size, (1, 48))
    torch.testing.assert_close(from_hf(tmp_path)[0](idx)[0], model(idx)[0])


def test_bos_and_eos_may_differ(tmp_path):
    theirs = foreign_model(bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    hf = save_foreign(tmp_path, theirs, special=("<unk>", "<s>", "</s>"))
    with pytest.warns(UserWarning, match="left out: <unk>"):
        model, tokenizer = check_import(tmp_path, theirs, hf, begin=1, end=2)
    assert not model.config.tied and tokenizer.vocab_size == 298


def test_import_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=300,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=48,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    hf = save_foreign(tmp_path, theirs)
    model, _ = check_import(tmp_path, theirs, hf)
    assert model.config.mlp == "gelu_tanh" and model.config.hidden == 128 and model.config.tied
    # as in the files of gpt2: names without "transformer.", masks; no type of BPE, merges as strings
    weights = {
        name.removeprefix("transformer."): p.detach().clone()
        for name, p in theirs.transformer.named_parameters()
    }
    weights["h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    del data["model"]["type"], data["pre_tokenizer"]["use_regex"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"], config["n_inner"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = check_import(tmp_path, theirs, hf)
    assert model.config.tied


def test_invalid_imports_raise(tmp_path):
    good = foreign_model()
    save_foreign(tmp_path / "good", good)

    def fails(message, kind=ValueError, file="config.json", remove=False, **changes):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        if remove:
            (folder / file).unlink()
        elif file.endswith(".json"):
            data = json.loads((folder / file).read_text())
            for key, value in changes.items():
                place = data
                *path, last = key.split("__")
                for part in path:
                    place = place[part]
                place[last] = value
            (folder / file).write_text(json.dumps(data))
        else:
            tensors = safetensors.torch.load_file(folder / file) | changes.get("tensors", {})
            tensors = {name: x for name, x in tensors.items() if x is not None}
            safetensors.torch.save_file(tensors, folder / file)
        with pytest.raises(kind, match=message):
            from_hf(folder)

    fails("model_type=gpt_neox has no", model_type="gpt_neox")
    fails(
        "rope_type=llama3 has no", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    )
    fails("type=linear has no", rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0})
    fails("head_dim=16 has no", head_dim=16)
    fails("hidden_act=relu has no", hidden_act="relu")
    fails("mlp_bias=True has no", mlp_bias=True)
    fails("hidden_size", hidden_size=None)
    fails("eos_token_id=5", eos_token_id=5)
    fails("config.json: there is no such file", remove=True)
    fails("tokenizer.json: there is no such file", file="tokenizer.json", remove=True)
    fails("model.safetensors", FileNotFoundError, "model.safetensors", remove=True)
    tensors = "model.safetensors"
    fails(
        "layers.0.input_layernorm.weight has shape",
        file=tensors,
        tensors={"model.layers.0.input_layernorm.weight": None},
    )
    fails(
        "q_proj.bias has no equivalent",
        file=tensors,
        tensors={"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
    )
    fails(
        "embed_tokens.weight has shape",
        file=tensors,
        tensors={"model.embed_tokens.weight": torch.ones(200, 32)},
    )
    tokenizer_file = "tokenizer.json"
    fails("no byte-level BPE", file=tokenizer_file, model__type="WordPiece")
    fails("no byte-level BPE", file=tokenizer_file, pre_tokenizer={"type": "Metaspace"})
    llama3 = [{"type": "Split", "pattern": {"Regex": "a"}}, {"type": "ByteLevel", "use_regex": False}]
    llama3 = {"type": "Sequence", "pretokenizers": llama3}
    fails("splits text into words in another way", file=tokenizer_file, pre_tokenizer=llama3)
    fails("splits text into words in another way", file=tokenizer_file, pre_tokenizer__add_prefix_space=True)
    fails("changes texts", file=tokenizer_file, normalizer={"type": "NFC"})
    merges = json.loads((tmp_path / "good" / "tokenizer.json").read_text())["model"]["merges"]
    merged = ["ab", "bc", "abc"]  # abc is merged from a and bc, which is impossible in order of rank
    vocab = {
        token: i for i, token in enumerate(["<|endoftext|>", *tokenizers.byte_chars().values(), *merged])
    }
    wrong = [["a", "b"], ["b", "c"], ["a", "bc"]]
    fails("in an order", file=tokenizer_file, model__vocab=vocab, model__merges=wrong)
    fails("no merge makes", file=tokenizer_file, model__merges=merges[:-1])
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: Expecting"):
        from_hf(tmp_path / "bad")
    with pytest.raises(FileNotFoundError, match="no folder /no/such"):
        from_hf("/no/such")
    with pytest.raises(tokenizers.Unreachable, match="cannot be reached"):  # conftest.py: HF_HUB_OFFLINE
        from_hf("nobody/no-such-model")


# ----------------------------------------------------------------------------------------------------------
# llama2.c


class RunC:
    """A numpy implementation of llama2.c's format, version 0, independent of our code."""

    def __init__(self, path: Path):
        data = path.read_bytes()
        dim, hidden, layers, heads, kv_heads, vocab, self.seq_len = struct.unpack_from("<7i", data)
        self.heads, self.kv_heads, self.size, self.layers = heads, kv_heads, dim // heads, layers
        floats, at = np.frombuffer(data, "<f4", offset=28), 0

        def take(*shape):
            nonlocal at
            at += (n := int(np.prod(shape)))
            return floats[at - n : at].reshape(shape)

        V, kv = abs(vocab), kv_heads * self.size
        self.embedding, self.norm1 = take(V, dim), take(layers, dim)
        self.q, self.k, self.v = take(layers, dim, dim), take(layers, kv, dim), take(layers, kv, dim)
        self.o, self.norm2 = take(layers, dim, dim), take(layers, dim)
        self.w1, self.w2, self.w3 = (
            take(layers, hidden, dim),
            take(layers, dim, hidden),
            take(layers, hidden, dim),
        )
        self.norm = take(dim)
        take(2, self.seq_len, self.size // 2)
        self.head = self.embedding if vocab > 0 else take(V, dim)
        assert at == len(floats)
        data, at, self.tokens, self.scores = path.with_name("tokenizer.bin").read_bytes(), 4, [], []
        for _ in range(V):
            score, length = struct.unpack_from("<fi", data, at)
            self.tokens.append(data[at + 8 : at + 8 + length])
            self.scores.append(score)
            at += 8 + length
        assert at == len(data) and struct.unpack_from("<i", data)[0] == max(map(len, self.tokens))

    def logits(self, ids: list[int]) -> np.ndarray:  # (T, V)
        def rms(x, weight):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

        def rope(x):  # (T, heads, size): neighbours are pairs
            angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, self.size, 2) / self.size)
            rotated = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
            return np.stack((rotated.real, rotated.imag), -1).reshape(x.shape)

        x, T = self.embedding[ids].astype(np.float64), len(ids)
        for layer in range(self.layers):
            h = rms(x, self.norm1[layer])
            q, k, v = ((h @ w[layer].T).reshape(T, -1, self.size) for w in (self.q, self.k, self.v))
            q, k = rope(q), rope(k)
            k, v = (np.repeat(a, self.heads // self.kv_heads, axis=1) for a in (k, v))
            scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(self.size)
            scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            x = x + np.einsum("hts,shd->thd", p, v).reshape(T, -1) @ self.o[layer].T
            h = rms(x, self.norm2[layer])
            gate = h @ self.w1[layer].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ self.w3[layer].T)) @ self.w2[layer].T
        return rms(x, self.norm) @ self.head.T

    def encode(self, text: str) -> list[int]:
        """BOS, a space and the text's characters, merged by the best pair until no pair can be merged."""
        ids_by_token = {token: i for i, token in enumerate(self.tokens)}
        ids = [1]
        for char in (" " + text if text else "").encode("utf-8").decode("utf-8"):
            token_id = ids_by_token.get(char.encode())
            ids += [token_id] if token_id is not None else [b + 3 for b in char.encode()]
        while True:
            merged = (
                ids_by_token.get(self.tokens[a] + self.tokens[b]) for a, b in zip(ids, ids[1:], strict=False)
            )
            candidates = [(-1e10 if i is None else self.scores[i], -at) for at, i in enumerate(merged)]
            pairs = [pair for pair in candidates if pair[0] > -1e10]
            if not pairs:
                return ids
            at = -max(pairs)[1]
            ids[at : at + 2] = [ids_by_token[self.tokens[ids[at]] + self.tokens[ids[at + 1]]]]

    def text(self, prompt: str) -> str:
        """The output of `run -t 0 -n 0 -i PROMPT`: seq_len steps, without a leading space."""
        ids = self.encode(prompt)
        while len(ids) <= self.seq_len and (best := int(self.logits(ids)[-1].argmax())) != 1:
            ids.append(best)
        said = b"".join(self.tokens[i] for i in ids[1:])
        return codecs.getincrementaldecoder("utf-8")("replace").decode(said).removeprefix(" ")


def expected_text(model: GPT, tokenizer, prompt: str) -> str:
    prompt = " " + prompt if prompt else ""
    n = model.config.block_size - len(tokenizer.encode(prompt))
    return stories(model, tokenizer, prompt, 1, n, temperature=0, top_p=1)[0].removeprefix(" ")


PROMPTS = ["", "Once upon a time", "The dog", 'Tom had a red ball, didn\'t he? "12 birds!"']


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(tied=False, n_kv_head=2),
        dict(share="lora", n_kv_head=1),
        dict(norm_weight=False, mlp_hidden=37),
        dict(share="layers", window=48),
    ],
    ids=str,
)
def test_llama2c_matches(settings, bpe, tmp_path):
    model = random_model(bpe, **settings)
    assert to_llama2c(model, bpe, tmp_path / "new" / "m.bin") == tmp_path / "new" / "tokenizer.bin"
    theirs = RunC(tmp_path / "new" / "m.bin")
    order = [bpe.tokens.index(token) for token in theirs.tokens]  # our ids in the order of theirs
    assert sorted(order) == list(range(bpe.vocab_size)) and order[1] == bpe.eot
    assert theirs.tokens[3:259] == [bytes([b]) for b in range(256)]
    ids = torch.randint(0, bpe.vocab_size, (48,))
    with torch.no_grad():
        expected = model(ids[None])[0][0][:, order]
    actual = torch.from_numpy(theirs.logits([order.index(i) for i in ids.tolist()])).float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    for prompt in PROMPTS:
        assert [order[i] for i in theirs.encode(prompt)[1:]] == bpe.encode(" " + prompt if prompt else "")
        assert theirs.text(prompt) == expected_text(model, bpe, prompt)


def test_llama2c_vocabularies(bpe, tmp_path):
    for tokenizer in (*vocabularies(bpe), tokenizers.train_bpe(STORIES, 258)):
        to_llama2c(random_model(tokenizer, n_embd=8, n_layer=1), tokenizer, tmp_path / "m.bin")
        theirs = RunC(tmp_path / "m.bin")
        assert sorted(theirs.tokens) == sorted(tokenizer.tokens) and theirs.tokens[1] == b"<|endoftext|>"
        for prompt in PROMPTS[1:]:
            assert b"".join(theirs.tokens[i] for i in theirs.encode(prompt)[1:]).decode() == " " + prompt
            ours = [tokenizer.tokens[i] for i in tokenizer.encode(" " + prompt)]
            assert [theirs.tokens[i] for i in theirs.encode(prompt)[1:]] == ours


def test_text_never_becomes_end_of_text_in_llama2c(tmp_path):
    """Not even with a vocabulary that has all but its last character as one token."""
    start = b"<|endoftext|"
    merged = [start[:n] for n in range(2, len(start) + 1)]
    tokenizer = tokenizers.Tokenizer("bpe268", [bytes([b]) for b in range(256)] + merged)
    to_llama2c(random_model(tokenizer, n_embd=8, n_layer=1), tokenizer, tmp_path / "m.bin")
    theirs = RunC(tmp_path / "m.bin")
    assert [theirs.tokens[i] for i in theirs.encode("<|endoftext|>")[1:]] == [b" ", start, b">"]


def test_llama2c_names_unsupported_settings(bpe, tmp_path):
    for settings in (
        dict(norm_eps=1e-6),
        dict(rope_theta=500.0),
        dict(mlp="geglu"),
        dict(mlp="gelu"),
        dict(norm="layernorm"),
        dict(norm="none"),
        dict(position="learned"),
        dict(bias=True),
        dict(window=8),
        dict(softcap=9.0),
        dict(qk_norm=True),
        dict(embed_norm=True),
        dict(causal=False),
        dict(pointer=True),
    ):
        name, value = *settings, *settings.values()
        with pytest.raises(ValueError, match=f"^{name}={value} has no equivalent in llama2.c's run.c$"):
            to_llama2c(random_model(bpe, **settings), bpe, tmp_path / "m.bin")
    assert not list(tmp_path.iterdir())


def test_compiled_run_c_matches(trained, bpe, tmp_path):
    checkout = os.environ.get("LLAMA2C")
    if not checkout or not shutil.which("gcc"):
        pytest.skip("needs LLAMA2C=path to a checkout of llama2.c, and gcc")
    subprocess.run(["gcc", "-O2", "-o", tmp_path / "run", Path(checkout, "run.c"), "-lm"], check=True)
    cases = [(other, random_model(other, n_kv_head=2)) for other in vocabularies(bpe)]
    cases.append((bpe, checkpoint.load(trained)[0]))
    for tokenizer, model in cases:
        vocabulary = to_llama2c(model, tokenizer, tmp_path / "m.bin")
        for prompt in PROMPTS:
            command = [tmp_path / "run", tmp_path / "m.bin", "-z", vocabulary, "-t", "0", "-n", "0"]
            command += ["-i", prompt] if prompt else []
            output = subprocess.run(command, capture_output=True, check=True).stdout.decode(
                "utf-8", "replace"
            )
            expected = expected_text(model, tokenizer, prompt) + "\n"
            assert printable(output) == printable(expected), (tokenizer.name, prompt)


def printable(text: str) -> str:
    """run.c does not print bytes that are not printable alone, such as the parts of an emoji."""
    return "".join(char for char in text if char in string.printable)


def test_generated_text_matches_llama2c(trained, bpe, tmp_path):
    model, _ = checkpoint.load(trained)
    to_llama2c(model, bpe, tmp_path / "m.bin")
    theirs = RunC(tmp_path / "m.bin")
    texts = [theirs.text(prompt) for prompt in PROMPTS]
    assert texts == [expected_text(model, bpe, prompt) for prompt in PROMPTS]
    assert texts[0] in STORIES  # the generated text ends with the story


# ----------------------------------------------------------------------------------------------------------
# The command line


def test_command_line(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained.parent.parent)

    def status(*arguments) -> tuple[int, str]:
        code = export.main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        assert out.err.count("\n") == (code != 0)
        return code, out.out + out.err

    hf, file = tmp_path / "new" / "hf", tmp_path / "new" / "c" / "m.bin"
    assert "LlamaForCausalLM" in status("--to", "hf", hf)[1]
    assert status("--to", "llama2c", file)[0] == 0
    assert RunC(file).text("") in STORIES
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    ):
        assert (hf / name).stat().st_mode & 0o044, name  # readable by others
    for to, dest in (("hf", hf), ("llama2c", file)):
        code, out = status("--to", to, dest)
        assert code == 2 and "exists; use --overwrite" in out
        assert status("--to", to, dest, "--overwrite", "--out_dir", trained / "best.pt")[0] == 0
        assert status("--to", to, dest, trained, "--overwrite")[0] == 0
    code, out = status("--to", "hf", hf, trained, "--out_dir", trained)
    assert code == 2 and "RUN and --out_dir" in out
    code, out = status(
        "--to", "llama2c", file.with_name("other.bin")
    )  # would overwrite the vocabulary of m.bin
    assert code == 2 and "tokenizer.bin exists" in out and not file.with_name("other.bin").exists()
    code, out = status("--to", "onnx", hf)
    assert code == 2 and "invalid choice: 'onnx'" in out
    assert status("--to", "hf")[0] == status(hf)[0] == status("--to", "hf", hf, "--nonsense")[0] == 2
    assert (
        status("--to", "hf", file)[0] == status("--to", "hf", tmp_path / "x", "--out_dir", "no/such")[0] == 2
    )
    monkeypatch.chdir(tmp_path)
    code, out = status("--to", "hf", "x")
    assert code == 2 and "no checkpoint" in out

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    assert status("--to", "hf", "x", "--out_dir", trained)[0] == 1
