"""experiments/hf.py: models of transformers, with random weights and made here, behind our interface."""

import dataclasses
import json
import math
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Rust

import evaluate
import export
import sample
from experiments import hf
from model import GPT, GPTConfig
from nanostlm import checkpoint
from nanostlm import tokenizer as tokenizers
from nanostlm.generate import Batch, Story, generate, greedy, stories
from nanostlm.score import bits_per_byte, loglikelihood, score, token_bytes

transformers = pytest.importorskip("transformers")

CORPUS = ["Once upon a time there was a little cat. She sat on a big red mat, and it was fun. The end."] * 20
TEXTS = [
    "Once upon a cat",
    "",
    "a </s> b<|endoftext|>c <s>",
    "tabs\t and\n\nlines",
    "naïve 🎃👩‍👩‍👧 日本",
    "  two  ",
]
CONTEXT = 24
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SIZES |= dict(max_position_embeddings=CONTEXT, pad_token_id=None)
GPT2_SIZES = dict(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT)
KINDS = {  # model_type -> settings. gpt_neox has 30 ids that its tokenizer lacks; llama a BOS besides its EOS
    "gpt2": GPT2_SIZES,
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8),
    "gpt_neox": dict(vocab_size=310),
    "llama": dict(num_key_value_heads=2, vocab_size=320),
    "mamba": dict(state_size=4),  # has another kind of cache
}
PROMPTS = [[5, 6, 7, 8, 9, 10], [40], [], [11, 12, 13]]

# ----------------------------------------------------------------------------------------------------------
# Tokenizers and models


def byte_level() -> Rust:
    """A byte-level BPE of 280 ids, without special tokens."""
    rust = Rust(models.BPE())
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=280, **options))
    return rust


def pieces(scheme: str = "prepend") -> Rust:
    """A BPE in the style of SentencePiece, as Llama 2's, of 320 ids; or with Metaspace instead."""
    rust = Rust(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "prepend":
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        rust.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    rust.train_from_iterator(CORPUS, trainer)
    if scheme == "first":  # the bytes are special tokens here, and not elsewhere
        return rust
    data = json.loads(rust.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    return Rust.from_str(json.dumps(data))


def fast(rust: Rust, **special):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **special)


BYTES, PIECES = byte_level(), pieces()
EOT = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
BOS_EOS = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save(folder, kind: str, tokenizer=None, **settings) -> str:
    """A folder of transformers with random weights, large enough for clear choices."""
    tokenizer = tokenizer or (fast(PIECES, **BOS_EOS) if kind == "llama" else fast(BYTES, **EOT))
    config = transformers.AutoConfig.for_model(
        kind, **{**SIZES, "vocab_size": 280, **KINDS.get(kind, {}), **settings}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if p.ndim == 2 and "A_log" not in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("hf")
    return {kind: save(root / kind, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def loaded(request, folders):
    """Our wrapper, its tokenizer, and the same model opened by transformers."""
    source = folders[request.param]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source.removeprefix("hf:"))
    return *hf.load(source), theirs.eval()


def given(tokenizer, ids: list[int]) -> list[int]:
    """What transformers' model is given for a prompt."""
    return [tokenizer.hf.bos_token_id, *ids]


# ----------------------------------------------------------------------------------------------------------
# Logits, losses, generation


def test_logits_and_losses_equal_those_of_transformers(loaded):
    model, tokenizer, theirs = loaded
    ids = torch.randint(3, 280, (2, 12), generator=torch.manual_seed(0))
    idx, texts = (F.pad(ids, (1, 0), value=value) for value in (tokenizer.eot, tokenizer.hf.bos_token_id))
    with torch.no_grad():
        logits, none = model(idx)
        expected = theirs(input_ids=texts).logits[..., : tokenizer.vocab_size]
        last = model(idx, last=True)[0]
    assert none is None and logits.dtype == torch.float32
    assert logits.shape == (2, 13, model.config.vocab_size) == (2, 13, len(tokenizer.hf))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(last, expected[:, -1:])
    model.arguments.discard("logits_to_keep")  # which not all classes have
    assert torch.equal(model(idx, last=True)[0], model(idx)[0][:, -1:])
    targets = ids.clone()
    targets[0, :5] = -1
    logp = expected[:, :-1].double().log_softmax(-1)
    nll = -logp.gather(-1, ids[..., None])[..., 0]
    for wanted, value in ((ids, nll.mean()), (targets, nll[targets != -1].mean())):
        none, loss = model(idx[:, :-1], wanted)
        assert none is None and loss.item() == pytest.approx(value.item(), rel=1e-5)
    if len(tokenizer.hf) == theirs.config.vocab_size:
        assert theirs(input_ids=texts, labels=texts).loss.item() == pytest.approx(nll.mean().item(), rel=1e-5)
    each = score(model, ids.tolist(), tokenizer.eot)
    torch.testing.assert_close(torch.from_numpy(np.stack(each)).double(), nll, rtol=1e-4, atol=1e-4)
    own = loglikelihood(model, [tokenizer.eot, *ids[0, :4].tolist()], ids[0, 4:].tolist())
    assert own == pytest.approx(-nll[0, 4:].sum().item(), rel=1e-5)


def test_greedy_generation_equals_that_of_transformers(loaded):
    model, tokenizer, theirs = loaded
    new = generate(model, PROMPTS, 12, [greedy], eot=tokenizer.eot)
    longest, eos = max(map(len, PROMPTS)), tokenizer.hf.eos_token_id
    padding = [longest - len(prompt) for prompt in PROMPTS]
    idx = torch.tensor([[0] * n + given(tokenizer, p) for n, p in zip(padding, PROMPTS, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest + 1 - n) for n in padding])
    extra = list(range(tokenizer.vocab_size, theirs.config.vocab_size)) or None
    options = dict(
        do_sample=False, max_new_tokens=12, eos_token_id=eos, pad_token_id=eos, suppress_tokens=extra
    )
    together = theirs.generate(idx, attention_mask=mask, **options)[:, longest + 1 :].tolist()
    for ids, row, prompt in zip(new, together, PROMPTS, strict=True):
        alone = torch.tensor([given(tokenizer, prompt)])
        (full,) = theirs.generate(alone, attention_mask=torch.ones_like(alone), **options).tolist()
        full = full[alone.shape[1] :]
        assert ids == (full[: full.index(eos)] if eos in full else full)
        if theirs.config.model_type != "mamba":  # padding changes its states a little
            assert ids == (row[: row.index(eos)] if eos in row else row)
    assert len({tuple(ids) for ids in new}) == len(new) and max(map(len, new)) > 3


@torch.no_grad()
def slow(theirs, tokenizer, prompt: list[int], n: int) -> list[int]:
    """
    Greedy decoding without end-of-text, which computes all tokens anew, and goes on from half a context
    when it is full.
    """
    history, used = given(tokenizer, prompt), len(prompt) + 1
    for _ in range(n):
        logits = theirs(input_ids=torch.tensor([history[-used:]]), use_cache=False).logits
        logits[..., tokenizer.hf.eos_token_id] = -torch.inf
        history.append(int(logits[0, -1, : tokenizer.vocab_size].argmax()))
        used = used + 1 if used < CONTEXT else CONTEXT // 2
    return history[len(prompt) + 1 :]


def test_generation_past_the_context_equals_a_slow_reference_with_and_without_cache(loaded):
    model, tokenizer, theirs = loaded
    model.config = dataclasses.replace(model.config, block_size=CONTEXT)  # mamba has no limit

    def no_end(logits, history):
        return logits.index_fill(1, torch.tensor([tokenizer.eot]), -torch.inf)

    expected = [slow(theirs, tokenizer, prompt, 45) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    assert generate(model, PROMPTS, 45, [no_end, greedy], eot=tokenizer.eot) == expected
    model.new_cache = lambda rows: None
    assert generate(model, PROMPTS, 45, [no_end, greedy], eot=tokenizer.eot) == expected


def test_a_cached_pass_equals_a_full_one_and_padding_is_masked(loaded):
    model, tokenizer, _ = loaded
    ids = torch.randint(3, 280, (2, 10), generator=torch.manual_seed(1))
    with torch.no_grad():
        full, cache = model(ids)[0], model.new_cache(2)
        if cache is None:
            assert model.hf.config.model_type == "mamba"
            return
        segments = torch.tensor([[0] * 3 + [1] * 3, [1] * 6])  # row 0 has 3 tokens only
        first = torch.stack((F.pad(ids[0, :3], (3, 0)), ids[1, :6]))
        assert model(first, cache=cache, segments=segments, last=True)[0].shape[1] == 1
        cache.select([1, 0, 0])
        for step in range(3):
            new = torch.stack([ids[row, at + step] for row, at in ((1, 6), (0, 3), (0, 3))])
            logits = model(new[:, None], cache=cache)[0][:, 0]
            wanted = torch.stack([full[1, 6 + step], full[0, 3 + step], full[0, 3 + step]])
            torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prompt_gives_the_same_logits_in_a_batch_and_alone(loaded):
    model, tokenizer, _ = loaded
    batch = Batch(model, [[5, 6, 7, 8], [9, 10], [9, 10]], tokenizer.eot)
    alone = Batch(model, [[9, 10]], tokenizer.eot)
    for step in range(5):
        together, single = batch.logits(), alone.logits()
        assert not together.allclose(together[1:2], atol=0.1)
        torch.testing.assert_close(together[-2:], single.expand(2, -1), atol=1e-5, rtol=1e-5)
        batch.append(torch.full((len(together), 1), 20 + step))
        alone.append(torch.tensor([[20 + step]]))
        if step == 2:
            batch.select([0, 2, 1])


def test_rows_that_end_leave_the_batch_without_affecting_others(loaded):
    model, tokenizer, _ = loaded
    end = generate(model, [[9]], 3, [greedy], eot=tokenizer.eot)[0]
    stops = [lambda ids: ids[:3] == end]
    new = generate(model, [[9], [5, 6, 7], [9]], 12, [greedy], eot=tokenizer.eot, stops=stops)
    assert new == [end, *generate(model, [[5, 6, 7]], 12, [greedy], eot=tokenizer.eot), end]


def test_ids_without_a_token_are_never_sampled(tmp_path):
    """Columns beyond the tokenizer's ids, and an id between them, however likely the model finds them."""
    data = json.loads(BYTES.to_str())
    vocab = data["model"]["vocab"]
    vocab |= {token: i + (i > 200) for token, i in vocab.items()}  # no token has the id 201
    source = save(tmp_path, "gpt_neox", fast(Rust.from_str(json.dumps(data)), **EOT))
    model, tokenizer = hf.load(source)
    head = model.hf.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(310))
    head.bias.data[[201, *range(281, 310)]] = 50
    assert model.config.vocab_size == tokenizer.vocab_size == 281 and tokenizer.decode_bytes([201]) == b""
    for samplers in ([], [greedy]):
        ids = [i for new in generate(model, PROMPTS, 60, samplers, eot=tokenizer.eot) for i in new]
        assert max(ids) < 281 and 201 not in ids
    nats = score(model, [list(range(1, 201))], tokenizer.eot)[0]
    assert math.isfinite(nats.sum()) and nats.mean() < 40  # the others have no part in the probabilities


class Sum(torch.nn.Module):
    """Has no cache and a minimal configuration: the next id is the sum of all given ids, modulo 96."""

    def __init__(self):
        super().__init__()
        self.config, self.weight = (
            SimpleNamespace(block_size=8, vocab_size=97),
            torch.nn.Parameter(torch.ones(1)),
        )

    def forward(self, idx, targets=None):
        assert idx.shape[1] <= 8
        return F.one_hot(idx.cumsum(1) % 96, 97) * self.weight, None


def test_a_model_with_two_calls_and_no_cache_generates():
    prompts = [[3, 4], [], [5, 1, 2, 2, 7]]
    for prompt, new in zip(prompts, generate(Sum(), prompts, 30, [greedy], eot=96), strict=True):
        history, used = [96, *prompt], len(prompt) + 1
        for _ in range(30):
            history.append(sum(history[-used:]) % 96)
            used = used + 1 if used < 8 else 4
        assert new == history[len(prompt) + 1 :]


# ----------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("name", ["bytes", "added", "prepend", "always", "first", "never"])
def test_exact_bytes_and_round_trips(name):
    rust = {"bytes": BYTES, "added": byte_level(), "prepend": PIECES}.get(name) or pieces(name)
    if name == "added":  # as Pythia's for runs of spaces
        rust.add_tokens([AddedToken("  ", normalized=False), AddedToken("ï", normalized=False)])
    theirs = fast(rust, **(EOT if name in ("bytes", "added") else BOS_EOS))
    tokenizer = hf.HFTokenizer(theirs, 400)
    space = b" " if name in ("prepend", "always", "first") else b""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.eot not in ids and tokenizer.bos not in ids
        if text.startswith(" ") and name in ("always", "first"):
            continue  # Metaspace reads "  two" and " two" alike
        whole = tokenizer.decode_bytes(ids)
        assert whole == (space + text.encode() if text else b"")
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == whole
        assert tokenizer.decode(ids) == text
        assert token_bytes(tokenizer)[ids].sum() == len(whole)
        story = Story(tokenizer)
        assert "".join(map(story.add, ids)) + story.end() == whole.decode()
    assert tokenizer.decode([tokenizer.eot]) == theirs.eos_token
    assert tokenizer.decode_bytes(tokenizer.encode("🎃")[-1:]) == b"\x83"
    assert tokenizer.decode(tokenizer.encode("x🎃")[:-1]) == "x\ufffd"
    with pytest.raises(ValueError, match="not a valid id"):
        tokenizer.decode_bytes([tokenizer.vocab_size])
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("\ud800")


def test_special_tokens_in_a_text_are_text_for_unigram_too():
    """Its vocabulary holds them, and finds them in a text."""
    rust = Rust(models.Unigram([("<s>", 0), ("</s>", 0), *((c, -3.0) for c in "▁ab</s>")], 0, False))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = hf.HFTokenizer(fast(rust, bos_token="<s>", eos_token="</s>"), 9)
    text = "a </s>b<s></s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert {tokenizer.eot, tokenizer.bos}.isdisjoint(tokenizer.encode(text))


def test_other_tokenizers_decode_like_transformers():
    word_piece = Rust(models.WordPiece({"[UNK]": 0, "</s>": 1, "cat": 2, "##s": 3, "a": 4, ".": 5}))
    word_piece.pre_tokenizer, word_piece.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    words = Rust(models.WordLevel({"[UNK]": 0, "</s>": 1, "cats": 2, "a": 3, ".": 4}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for rust in (word_piece, words):
        theirs = fast(rust, eos_token="</s>", unk_token="[UNK]")
        tokenizer = hf.HFTokenizer(theirs, 6)
        ids = tokenizer.encode("a cats a cats.")
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert tokenizer.decode_bytes(ids[1:3]).startswith(b" cat")


def test_tokenizers_that_do_not_fit_are_refused():
    assert hf.HFTokenizer(fast(BYTES, bos_token="<|endoftext|>"), 280).eot == BYTES.token_to_id(
        "<|endoftext|>"
    )
    with pytest.raises(ValueError, match="neither an EOS nor a BOS"):
        hf.HFTokenizer(fast(BYTES), 280)
    with pytest.raises(ValueError, match="the id 279, and the model predicts 279 ids only"):
        hf.HFTokenizer(fast(BYTES, **EOT), 279)
    padded = fast(BYTES, **EOT, pad_token="<pad>")  # an id that no text has
    assert len(padded) == 281 and hf.HFTokenizer(padded, 280).vocab_size == 280


# ----------------------------------------------------------------------------------------------------------
# Our own models, and sample.py


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint of a Llama-like model of ours, and the folder that export.py makes of it."""
    root, bpe = tmp_path_factory.mktemp("own"), tokenizers.train_bpe(CORPUS, 280)
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=32, vocab_size=280)
    config = GPTConfig(**sizes, init="fan_in", tied=False)
    torch.manual_seed(0)
    model = GPT(config)
    torch.nn.init.normal_(model.head.linear.weight, std=0.5)
    state = {
        "model": model.state_dict(),
        "model_config": dataclasses.asdict(config),
        "tokenizer": bpe.state(),
    }
    checkpoint.save(root / "best.pt", state)
    assert export.main(["--to", "hf", str(root / "hf"), str(root / "best.pt")]) == 0
    return root


def test_an_exported_model_has_the_same_bits_per_byte_and_stories(exported):
    own, theirs = checkpoint.load(exported), hf.load(f"hf:{exported / 'hf'}")
    texts = [text for text in (*CORPUS[:1], *TEXTS) if text]
    bpb = []
    for model, tokenizer in (own, theirs):
        ids = [tokenizer.encode(text) + [tokenizer.eot] for text in texts]
        for options in ({}, {"stride": 8}):
            nats = sum(each.sum(dtype=float) for each in score(model, ids, tokenizer.eot, **options))
            bpb.append(bits_per_byte(nats, sum(len(text.encode()) + 1 for text in texts)))
    assert bpb[:2] == pytest.approx(bpb[2:], abs=1e-6) and bpb[0] != bpb[1]
    ids = [own[1].encode(text) for text in TEXTS]
    assert ids == [theirs[1].encode(text) for text in TEXTS]
    short = [prompt for prompt in ids if len(prompt) + 20 < 32]  # the context, past which ours slides
    new = [generate(model, short, 20, [greedy], eot=tokenizer.eot) for model, tokenizer in (own, theirs)]
    assert new[0] == new[1] and len(short) >= 3
    assert stories(*own, "Once", 3, 20, temperature=1) == stories(*theirs, "Once", 3, 20, temperature=1)


def test_sample_prints_the_same_text_from_the_export(exported, capsys):
    def run(*arguments):
        status = sample.main(["--device=cpu", "--max_new_tokens=20", "--temperature=0", *arguments])
        return status, *capsys.readouterr()

    source = f"hf:{exported / 'hf'}"
    status, text, _ = run(str(exported), "--prompt=Once üpon")
    assert status == 0 and len(text) > 20
    for where in ([source], ["--out_dir", source]):
        status, out, err = run(*where, "--prompt=Once üpon")
        assert (status, out) == (0, text)
        line, speed = err.splitlines()
        assert line == f"{source}: 0.0M parameters, BPE of 280 ids, float32 on cpu" and "tokens/s" in speed
    status, out, err = run(source, "--num_samples=2", "--dtype=bfloat16", "--stop=zzz")
    assert status == 0 and out.count("---------------\n") == 1 and "bfloat16 on cpu" in err


def test_evaluate_gives_the_export_the_figures_of_our_model(exported, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pair = dict(sentence_good="A cat.", sentence_bad="Cat a.", linguistics_term="order", UID="words")
    Path("blimp").mkdir()
    Path("blimp", "words.jsonl").write_text(json.dumps(pair))
    Path("mine.txt").write_text(
        "\n<|endoftext|>\n".join(["Üne. Two! Three. Four. Five."] * 3), encoding="utf-8"
    )
    tasks = ["--tasks=bpb,progression,blimp,stories", "--blimp=blimp", "--limit=3", "--device=cpu"]
    models, figures = (str(exported), f"hf:{exported / 'hf'}"), []
    for model in models:
        assert evaluate.main([model, "--text=mine.txt", "--json=out.json", *tasks]) == 0
        [found] = json.loads(Path("out.json").read_text()).values()
        figures.append({(t, f["name"]): f["value"] for t, task in found.items() for f in task["figures"]})
    known = [{key: value for key, value in found.items() if value is not None} for found in figures]
    assert known[0] == pytest.approx(known[1], rel=1e-6, abs=1e-6) and len(known[0]) > 40
    capsys.readouterr()
    data = corpus / "mini" / "byte"  # of another tokenizer than the model's
    assert evaluate.main([models[1], f"--data={data}"]) == 0
    assert f"bytes of {data}/val.bin" in capsys.readouterr().out
    assert evaluate.main([f"hf:{exported / 'hf'}"]) == 2
    assert "pass --data or --text" in capsys.readouterr().err


def test_16_bit_weights_keep_the_tables_of_rope_in_float32(folders):
    model, _ = hf.load(folders["llama"], dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.hf.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model(torch.tensor([[2, 9]]))[0].dtype == torch.float32


def test_errors_are_one_line(folders, tmp_path, capsys, monkeypatch):
    def fails(status, message, source, *arguments):
        assert sample.main([source, "--device=cpu", *arguments]) == status
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err and out == ""

    def broken(name, **contents) -> str:
        """A folder of a gpt2 with other contents of NAME.json, or, for None, without this file."""
        source = save(tmp_path / name, "gpt2")
        for file, content in contents.items():
            path = tmp_path / name / f"{file}.json"
            path.unlink() if content is None else path.write_text(content)
        return source

    fails(2, "--compile: for models of this project only", folders["gpt2"], "--compile")
    fails(2, "--compile and --dtype int8: for", folders["gpt2"], "--compile", "--dtype=int8")
    fails(2, "there is no folder /no/such", "hf:/no/such")
    fails(2, "is empty", "hf:")
    fails(1, "Hub cannot be reached", "hf:nobody/no-such-model")  # conftest.py: HF_HUB_OFFLINE
    fails(2, "configuration cannot be used", f"hf:{tmp_path}")
    fails(2, "configuration cannot be used", broken("json", config="{"))
    fails(2, "configuration cannot be used", broken("t5", config='{"model_type": "t5"}'))
    fails(2, "it has special tokens only", broken("none", tokenizer=None, tokenizer_config=None))
    fails(2, "tokenizer cannot be used", broken("bad", tokenizer="{}"))
    fails(2, "is not causal", save(tmp_path / "bert", "bert"))
    source, file = broken("weights"), tmp_path / "weights" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    fails(2, "weights cannot be used", source)
    tensors = safetensors.torch.load(whole)
    del tensors["transformer.h.1.ln_1.weight"]
    file.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    fails(2, "there are none for transformer.h.1.ln_1.weight", source)
    file.unlink()
    fails(2, "weights cannot be used", source)
    torch.save(safetensors.torch.load(whole), tmp_path / "weights" / "pytorch_model.bin")  # the old format
    assert sample.main([source, "--device=cpu", "--max_new_tokens=3"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("nanostlm.machine.total_memory", lambda device: 1000)
    fails(2, "parameters, this takes at least", folders["gpt2"])


@pytest.mark.parametrize("silent", [False, True])
def test_no_network_is_an_error_at_once(silent, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        port = server.getsockname()[1]
        if not silent:
            server.close()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        assert sample.main(["hf:nobody/no-such-model", "--device=cpu"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Hub cannot be reached" in err
