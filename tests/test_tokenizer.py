"""Tokenizers: exact round trips, the same ids as Hugging Face, no special tokens from text, errors."""

import json
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HuggingFace
from tokenizers import models, pre_tokenizers, trainers

from nanostlm import tokenizer
from nanostlm.tokenizer import EOT, Tokenizer

CACHE = Path(__file__).parents[1] / ".." / "shared" / "tiktoken_cache"
WORDS = (
    "once upon a time there was little girl named lily who liked to play outside in the park with her "
    "dog don't can't we'll they've I'm said she'd happy 3 12 2024 wow oh"
).split()
SNIPPETS = [
    "'s",
    "'ll",
    "'S",
    "12345",
    "٣½Ⅷ",
    "👩‍👩‍👧",
    "🇫🇷",
    "e\u0301",
    "é",
    "ß",
    "中文字",
    "нет",
    "...",
    "!!!",
    "---",
    EOT,
    "<|",
    "\x00",
    "\ufeff",
    "😀😀😀",
    "\r\n",
]
BLANKS = " \n\t\r\u3000\xa0\u2028\x85\x1c\x0b "


def random_story(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(5, 40))).capitalize() + rng.choice([".", "!", "...\n\n"])


def random_piece(rng: random.Random) -> str:
    """A random piece of text: blanks, any code point, special cases, repetitions, words."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(BLANKS) * rng.randint(1, 6)
    if kind == 1:
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
    if kind == 2:
        return rng.choice(SNIPPETS)
    if kind == 3:
        return rng.choice(["a", "ab", "aab", " ", "é", "o n"]) * rng.randint(1, 20)
    if kind == 4:
        return "".join(rng.choice("aeoutnhsdl '-,.") for _ in range(rng.randint(1, 12)))
    return rng.choice(WORDS)[: rng.randint(1, 9)] + rng.choice(["", " "])


def texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(random_piece(rng) for _ in range(rng.randint(0, 12))) for _ in range(n)]


@pytest.fixture(scope="module")
def bpe():
    rng = random.Random(1)
    return tokenizer.train_bpe([random_story(rng) + random_piece(rng) * 3 for _ in range(3000)], 1000)


@pytest.fixture(scope="module", params=["bpe", "byte", "gpt2"])
def any_tokenizer(request, bpe):
    if request.param == "gpt2":
        return gpt2()
    return bpe if request.param == "bpe" else tokenizer.get("byte")


def gpt2():
    if not CACHE.is_dir():
        pytest.skip("needs GPT-2's vocabulary in ../shared/tiktoken_cache")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        return tokenizer.get("gpt2")


def hugging_face(tok, path):
    tok.save(path)
    hf = HuggingFace.from_file(str(path))
    hf.encode_special_tokens = True  # as in ours, <|endoftext|> in a text is text
    return hf


def test_sizes_and_names(bpe):
    assert (bpe.name, bpe.vocab_size, bpe.eot) == ("bpe1000", 1000, 999)
    byte = tokenizer.get("byte")
    assert (byte.name, byte.vocab_size, byte.eot) == ("byte", 257, 256)
    assert byte.encode("é\n") == [0xC3, 0xA9, 10]


def test_roundtrip_without_special_tokens(any_tokenizer):
    tok = any_tokenizer
    for text in [*texts(500), "", "Hello 👋🏽 wörld", EOT, f"a{EOT}b{EOT}", "".join(map(chr, range(256)))]:
        ids = tok.encode(text)
        assert tok.eot not in ids and all(type(i) is int and 0 <= i < tok.eot for i in ids)
        assert tok.decode(ids) == text
        assert tok.decode_bytes(ids) == text.encode()
    assert tok.decode([*tok.encode("a"), tok.eot]) == "a" + EOT


def test_encode_stories_matches_encode(any_tokenizer):
    tok = any_tokenizer
    batch = [*texts(700), "", "", f"x {EOT} y", "end \n\n"]
    expected = [tok.encode(text) for text in batch]
    assert tok.encode_stories(batch).tolist() == [i for ids in expected for i in (*ids, tok.eot)]
    assert tok.encode_stories(batch[:3]).tolist() == [i for ids in expected[:3] for i in (*ids, tok.eot)]
    assert tok.encode_stories([]).size == 0


def test_ids_match_hugging_face(bpe, tmp_path):
    hf = hugging_face(bpe, tmp_path / "tokenizer.json")
    assert hf.get_vocab_size() == bpe.vocab_size and hf.token_to_id(EOT) == bpe.eot
    samples = texts(20_000, seed=2)
    mismatches = [
        t for t, other in zip(samples, hf.encode_batch(samples), strict=True) if bpe.encode(t) != other.ids
    ]
    assert mismatches == []
    assert hf.decode(bpe.encode(samples[5]), skip_special_tokens=False) == samples[5]
    hf.encode_special_tokens = False
    assert hf.encode(EOT).ids == [bpe.eot]


@pytest.mark.parametrize("letters,size", [("ab", 300), ("abc ", 400), ("a \n", 330), ("ab😀é", 500)])
def test_ids_match_hugging_face_with_ambiguous_merges(letters, size, tmp_path):
    """With few letters, several pairs could form a token (a|aa and aa|a)."""
    rng = random.Random(size)
    tok = tokenizer.train_bpe(["".join(rng.choices(letters, k=60)) for _ in range(400)], size)
    hf = hugging_face(tok, tmp_path / "tokenizer.json")
    samples = [
        "".join(rng.choice(letters) * rng.choice([1, 1, 1, 2, 5]) for _ in range(40)) for _ in range(1500)
    ]
    assert [e.ids for e in hf.encode_batch(samples)] == [tok.encode(text) for text in samples]


def test_gpt2_ids_match_hugging_face(tmp_path):
    tok = gpt2()
    assert (tok.name, tok.vocab_size, tok.eot) == ("gpt2", 50257, 50256)
    assert tok.encode("Once upon a time") == [7454, 2402, 257, 640]
    hf = hugging_face(tok, tmp_path / "tokenizer.json")
    samples = texts(2000, seed=3)
    assert [e.ids for e in hf.encode_batch(samples)] == [tok.encode(text) for text in samples]


def test_state_and_file_roundtrip(any_tokenizer, tmp_path):
    tok = any_tokenizer
    torch.save({"tokenizer": tok.state()}, tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)["tokenizer"]
    tok.save(tmp_path / "tokenizer.json")
    for loaded in (tokenizer.from_state(state), tokenizer.load(tmp_path / "tokenizer.json", tok.name)):
        assert (loaded.name, loaded.vocab_size, loaded.eot) == (tok.name, tok.vocab_size, tok.eot)
        assert loaded.sha256 == tok.sha256 and loaded.tokens == tok.tokens
        assert loaded.encode("Once upon a time 👋") == tok.encode("Once upon a time 👋")


def test_training_is_deterministic_and_sha256_identifies_the_vocabulary(bpe):
    rng = random.Random(1)
    retrained = tokenizer.train_bpe(
        iter([random_story(rng) + random_piece(rng) * 3 for _ in range(3000)]), 1000
    )
    assert retrained.sha256 == bpe.sha256
    other = tokenizer.train_bpe([random_story(rng) for _ in range(3000)], 1000)
    assert other.sha256 != bpe.sha256 != tokenizer.get("byte").sha256
    assert tokenizer.get("byte").sha256.startswith("e66088df4cdb28fb")  # on every machine


def test_frequent_pairs_merge_first(bpe):
    assert tokenizer.train_bpe(["zy zy zy zy ab ab abc"], 300).tokens[256] == b"zy"
    assert len(bpe.encode("once upon a time there was a little girl named lily")) == 11  # one token per word


def test_token_that_no_merge_produces(tmp_path):
    tok = Tokenizer("bpe258", [*(bytes([b]) for b in range(256)), b"abc"])  # neither ab nor bc is a token
    hf = hugging_face(tok, tmp_path / "tokenizer.json")
    assert tok.encode("abc") == hf.encode("abc").ids == [256]
    assert tok.encode("abcabc") == hf.encode("abcabc").ids == list(b"abcabc")


def test_tiny_corpus_stops_early_with_a_note(capsys):
    tok = tokenizer.train_bpe(["the cat and the hat", "the cat"], 4096)
    assert tok.name == "bpe4096" and 257 < tok.vocab_size < 300 and tok.eot == tok.vocab_size - 1
    assert f"has {tok.vocab_size:,} ids only" in capsys.readouterr().err
    assert tok.decode(tok.encode("the dog 🐶")) == "the dog 🐶"
    assert tokenizer.train_bpe([], 300).vocab_size == 257


def test_smallest_vocabulary(tmp_path):
    tok = tokenizer.train_bpe(["hello hello hello"], 257)
    assert (tok.vocab_size, tok.encode("hé")) == (257, [104, 0xC3, 0xA9])
    assert hugging_face(tok, tmp_path / "t.json").encode("hé").ids == [104, 0xC3, 0xA9]


@pytest.mark.parametrize(
    "name,message",
    [
        ("bpe256", "257"),
        ("bpe0", "bpeN"),
        ("bpe", "bpeN"),
        ("-5", "bpeN"),
        ("gpt3", "gpt2, byte and bpeN"),
        ("", "bpeN"),
    ],
)
def test_invalid_names(name, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.bpe_size(name)


def test_invalid_input_raises_one_line(any_tokenizer, tmp_path):
    tok = any_tokenizer
    for call in (tok.encode, lambda t: tok.encode_stories([t]), lambda t: tok.encode_stories(["fine", t])):
        with pytest.raises(ValueError, match="a lone surrogate .*U\\+D83D"):
            call("a \ud83d b")
    for ids in ([tok.vocab_size], [0, -1]):
        with pytest.raises(ValueError, match=f"{ids[-1]} is not a valid id of tokenizer {tok.name}"):
            tok.decode(ids)
    assert tok.decode(np.array([65, 66])) == tok.decode([65, 66]) == tok.decode(torch.tensor([65, 66]))


def test_decoding_part_of_a_character():
    byte = tokenizer.get("byte")
    ids = byte.encode("😀")
    assert byte.decode_bytes(ids[:2]) == "😀".encode()[:2]
    assert byte.decode(ids[:2]) == "\ufffd" and byte.decode(ids) == "😀"


LONG_TEXTS = [
    " " * 1_100_000,
    "x\t" + "\r\n" * 600_000 + " x" + "\u3000\n" * 600_000 + "x" + " " * 999_999 + "!",
    " " * 899_999 + "1" + " " * 900_000 + "'s" + "\n" * 1_100_000 + EOT,
    " " * 1_100_000 + "\x1c" + " " * 1_100_000 + "\x1cx",
    "".join(random.Random(0).choices("abcdefgh", k=200_000)),
    "7" * 200_000,
    "=" * 200_000 + "x",
    "中文字" * 50_000,
    "\x1c!" * 100_000,
]


@pytest.mark.parametrize("text", LONG_TEXTS, ids=lambda text: repr(text[:6]))
def test_long_text_without_word_breaks(text, any_tokenizer):
    """tiktoken's regex overflows at a million blanks, with a panic that `except Exception` does not catch."""
    tok, start = any_tokenizer, time.process_time()
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    stories = tok.encode_stories(["a b", text, "c"])
    assert stories.tolist() == [*tok.encode("a b"), tok.eot, *ids, tok.eot, *tok.encode("c"), tok.eot]
    assert time.process_time() - start < 10


def repetitive_texts(n: int, seed: int) -> list[str]:
    """Texts with a long sequence of characters of one kind, some with ordinary text around it."""
    rng, result = random.Random(seed), []
    kinds = [
        "ab",
        "aab",
        "abcdefghijklmnopqrstuvwxyz",
        "etaoin",
        "0123456789",
        "!?-.",
        "-",
        "=",
        " ",
        " \n\t",
    ]
    kinds += ["中文字日本語", "😀👩\u200d", "é", "'s'll", "don't", "aA1!", "\x1c\x1d ", "\x85\u3000\xa0 "]
    for _ in range(n):
        text = "".join(rng.choices(rng.choice(kinds), k=rng.choice([20, 99, 256, 1000, 3000])))
        before = rng.choice(["", random_story(rng), " "])
        result.append(before + text + rng.choice(["", random_story(rng), " x", "\n", "'s"]))
    return result


def test_splitting_long_blanks_changes_no_ids(bpe, monkeypatch):
    """With a low limit, the ids are the same as those of tiktoken for the whole text."""
    samples = [*repetitive_texts(300, seed=4), *texts(300, seed=5)]
    expected = {tok: [tok.tiktoken.encode_ordinary(text) for text in samples] for tok in (bpe, gpt2())}
    pattern = tokenizer.LONG_BLANKS.pattern
    for limit in (1, 2, 5):
        monkeypatch.setattr(tokenizer, "BLANKS", limit)
        low_limit = re.compile(pattern.replace("900000", str(limit)), re.DOTALL)
        monkeypatch.setattr(tokenizer, "LONG_BLANKS", low_limit)
        assert sum(len(tokenizer.split_blanks(text)) > 1 for text in samples) > 50
        for tok, ids in expected.items():
            assert [tok.encode(text) for text in samples] == ids
            assert tok.encode_stories(samples).tolist() == [i for row in ids for i in (*row, tok.eot)]


def test_ids_of_long_words_match_hugging_face(bpe, tmp_path):
    hf, samples = hugging_face(bpe, tmp_path / "tokenizer.json"), repetitive_texts(300, seed=6)
    assert [e.ids for e in hf.encode_batch(samples)] == [bpe.encode(text) for text in samples]


def reference_vocabulary(texts, size: int) -> list[str]:
    """The tokens of a BPE trained by Hugging Face, without a limit on the length of words."""
    bpe = HuggingFace(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return sorted(bpe.get_vocab(), key=bpe.get_vocab().get)


def spellings(tok: Tokenizer) -> list[str]:
    """The tokens as strings, in the byte-level alphabet of Hugging Face, without end-of-text."""
    chars = tokenizer.byte_chars()
    return ["".join(chars[b] for b in token) for token in tok.tokens[:-1]]


def test_training_matches_hugging_face_on_ordinary_text(bpe):
    rng = random.Random(1)
    ordinary = [random_story(rng) + random_piece(rng) * 3 for _ in range(3000)]
    expected = reference_vocabulary(ordinary, 1000)
    assert sorted(spellings(bpe)) == sorted(expected)
    assert spellings(bpe)[256:] == [token for token in expected if len(token) > 1]


@pytest.mark.parametrize("text", LONG_TEXTS[3:], ids=lambda text: repr(text[:6]))
def test_training_on_long_text_without_word_breaks(text):
    start = time.process_time()
    tok = tokenizer.train_bpe([text[-200_000:], "once upon a time"] * 2, 600)
    assert time.process_time() - start < 5
    assert max(map(len, tok.tokens)) <= 256 and tok.decode(tok.encode(text)) == text


def test_training_on_chinese_without_spaces_gives_multi_character_tokens():
    rng = random.Random(0)
    words = ["小猫", "小狗", "花园", "喜欢", "妈妈", "从前", "有一个", "朋友", "他们", "一起玩", "，", "。"]
    texts = ["".join(rng.choices(words, k=3000))]
    texts += ["".join(rng.choices(words[:10], k=2000)) for _ in range(3)]
    tok = tokenizer.train_bpe(texts, 600)
    assert {word.encode() for word in words} <= set(tok.tokens)
    for text in texts:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and len(ids) < len(text) / 2


def test_invalid_tokenizer_files_and_states(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["vocab"].popitem()
    del data["model"]["vocab"]["a"]
    vocabs = ({"a": 0}, 3, data["model"]["vocab"])
    for text in ("", "{}", "[1]", *(json.dumps({"model": {"vocab": v}}) for v in vocabs)):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="tokenizer.json: "):
            tokenizer.load(path)
    for state in ({}, {"name": "x"}, {"name": "x", "ranks": "AA== 1\n"}, {"name": "x", "ranks": 5}, None):
        with pytest.raises(ValueError, match="the state of the tokenizer: "):
            tokenizer.from_state(state)


def test_unreachable_gpt2_fails_within_5_seconds(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        monkeypatch.setattr(tokenizer, "GPT2_URL", f"http://127.0.0.1:{server.getsockname()[1]}/gpt2/")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        start = time.monotonic()
        with pytest.raises(tokenizer.Unreachable, match="TIKTOKEN_CACHE_DIR.*--tokenizer bpe4096 or byte"):
            tokenizer.get("gpt2")
        assert time.monotonic() - start < 5


def test_within_times_out():
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        tokenizer.within(0.2, lambda: time.sleep(3))
    assert time.monotonic() - start < 2
    assert tokenizer.within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        tokenizer.within(5, lambda: 1 / 0)


def test_importing_loads_no_heavy_library():
    """train.py imports these modules at the start, so they must not import slow libraries."""
    heavy = "torch datasets tokenizers tiktoken huggingface_hub pandas pyarrow nanostlm.toystories"
    loaded = f"[m for m in '{heavy}'.split() if m in sys.modules]"
    code = f"import sys, prepare, nanostlm.data, nanostlm.sources, nanostlm.tokenizer; print({loaded})"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.stdout.strip() == "[]", result.stderr
