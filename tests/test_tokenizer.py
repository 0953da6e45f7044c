"""Tokenizers: exact round trips, ids equal to Hugging Face's, and no special tokens from text."""

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


def story(r: random.Random) -> str:
    return " ".join(r.choices(WORDS, k=r.randint(5, 40))).capitalize() + r.choice([".", "!", "...\n\n"])


def piece(r: random.Random) -> str:
    """A random piece of text, of any kind that a str can hold."""
    kind = r.randrange(7)
    if kind == 0:
        return r.choice(BLANKS) * r.randint(1, 6)
    if kind == 1:
        return chr(r.choice([r.randrange(0xD800), r.randrange(0xE000, 0x110000)]))
    if kind == 2:
        return r.choice(SNIPPETS)
    if kind == 3:
        return r.choice(["a", "ab", "aab", " ", "é", "o n"]) * r.randint(1, 20)
    if kind == 4:
        return "".join(r.choice("aeoutnhsdl '-,.") for _ in range(r.randint(1, 12)))
    return r.choice(WORDS)[: r.randint(1, 9)] + r.choice(["", " "])


def texts(n: int, seed: int = 0) -> list[str]:
    r = random.Random(seed)
    return ["".join(piece(r) for _ in range(r.randint(0, 12))) for _ in range(n)]


@pytest.fixture(scope="module")
def bpe():
    r = random.Random(1)
    return tokenizer.train_bpe([story(r) + piece(r) * 3 for _ in range(3000)], 1000)


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
    hf.encode_special_tokens = True  # as here: <|endoftext|> in a text is text
    return hf


def test_sizes_and_names(bpe):
    assert (bpe.name, bpe.vocab_size, bpe.eot) == ("bpe1000", 1000, 999)
    byte = tokenizer.get("byte")
    assert (byte.name, byte.vocab_size, byte.eot) == ("byte", 257, 256)
    assert byte.encode("é\n") == [0xC3, 0xA9, 10]


def test_round_trip_and_nothing_special(any_tokenizer):
    tok = any_tokenizer
    for text in [*texts(500), "", "Hello 👋🏽 wörld", EOT, f"a{EOT}b{EOT}", "".join(map(chr, range(256)))]:
        ids = tok.encode(text)
        assert tok.eot not in ids and all(type(i) is int and 0 <= i < tok.eot for i in ids)
        assert tok.decode(ids) == text
        assert tok.decode_bytes(ids) == text.encode()
    assert tok.decode([*tok.encode("a"), tok.eot]) == "a" + EOT


def test_batches_equal_one_by_one(any_tokenizer):
    tok = any_tokenizer
    many = [*texts(700), "", "", f"x {EOT} y", "end \n\n"]
    alone = [tok.encode(text) for text in many]
    assert tok.encode_stories(many).tolist() == [i for ids in alone for i in (*ids, tok.eot)]
    assert tok.encode_stories(many[:3]).tolist() == [i for ids in alone[:3] for i in (*ids, tok.eot)]
    assert tok.encode_stories([]).size == 0


def test_equal_ids_in_hugging_face(bpe, tmp_path):
    hf = hugging_face(bpe, tmp_path / "tokenizer.json")
    assert hf.get_vocab_size() == bpe.vocab_size and hf.token_to_id(EOT) == bpe.eot
    many = texts(20_000, seed=2)
    wrong = [t for t, other in zip(many, hf.encode_batch(many), strict=True) if bpe.encode(t) != other.ids]
    assert wrong == []
    assert hf.decode(bpe.encode(many[5]), skip_special_tokens=False) == many[5]
    hf.encode_special_tokens = False
    assert hf.encode(EOT).ids == [bpe.eot]


@pytest.mark.parametrize("letters,size", [("ab", 300), ("abc ", 400), ("a \n", 330), ("ab😀é", 500)])
def test_equal_ids_where_merges_are_ambiguous(letters, size, tmp_path):
    """With few letters, several pairs could form a token (a|aa and aa|a): the hard case for equal ids."""
    r = random.Random(size)
    tok = tokenizer.train_bpe(["".join(r.choices(letters, k=60)) for _ in range(400)], size)
    hf = hugging_face(tok, tmp_path / "tokenizer.json")
    many = ["".join(r.choice(letters) * r.choice([1, 1, 1, 2, 5]) for _ in range(40)) for _ in range(1500)]
    assert [e.ids for e in hf.encode_batch(many)] == [tok.encode(text) for text in many]


def test_equal_ids_gpt2(tmp_path):
    tok = gpt2()
    assert (tok.name, tok.vocab_size, tok.eot) == ("gpt2", 50257, 50256)
    assert tok.encode("Once upon a time") == [7454, 2402, 257, 640]
    hf = hugging_face(tok, tmp_path / "tokenizer.json")
    many = texts(2000, seed=3)
    assert [e.ids for e in hf.encode_batch(many)] == [tok.encode(text) for text in many]


def test_state_and_files_come_back(any_tokenizer, tmp_path):
    tok = any_tokenizer
    torch.save({"tokenizer": tok.state()}, tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)["tokenizer"]
    tok.save(tmp_path / "tokenizer.json")
    for again in (tokenizer.from_state(state), tokenizer.load(tmp_path / "tokenizer.json", tok.name)):
        assert (again.name, again.vocab_size, again.eot) == (tok.name, tok.vocab_size, tok.eot)
        assert again.sha256 == tok.sha256 and again.tokens == tok.tokens
        assert again.encode("Once upon a time 👋") == tok.encode("Once upon a time 👋")


def test_training_is_deterministic_and_sha256_tells_vocabularies_apart(bpe):
    r = random.Random(1)
    again = tokenizer.train_bpe(iter([story(r) + piece(r) * 3 for _ in range(3000)]), 1000)
    assert again.sha256 == bpe.sha256
    other = tokenizer.train_bpe([story(r) for _ in range(3000)], 1000)
    assert other.sha256 != bpe.sha256 != tokenizer.get("byte").sha256
    assert tokenizer.get("byte").sha256.startswith("e66088df4cdb28fb")  # on every machine


def test_frequent_pairs_merge_first(bpe):
    assert tokenizer.train_bpe(["zy zy zy zy ab ab abc"], 300).tokens[256] == b"zy"
    assert len(bpe.encode("once upon a time there was a little girl named lily")) == 11  # one token per word


def test_a_word_that_no_merge_reaches(tmp_path):
    tok = Tokenizer("bpe258", [*(bytes([b]) for b in range(256)), b"abc"])  # neither ab nor bc is a token
    hf = hugging_face(tok, tmp_path / "tokenizer.json")
    assert tok.encode("abc") == hf.encode("abc").ids == [256]
    assert tok.encode("abcabc") == hf.encode("abcabc").ids == list(b"abcabc")


def test_a_tiny_corpus_stops_early_and_says_so(capsys):
    tok = tokenizer.train_bpe(["the cat and the hat", "the cat"], 4096)
    assert tok.name == "bpe4096" and 257 < tok.vocab_size < 300 and tok.eot == tok.vocab_size - 1
    assert f"has {tok.vocab_size:,} ids only" in capsys.readouterr().err
    assert tok.decode(tok.encode("the dog 🐶")) == "the dog 🐶"
    assert tokenizer.train_bpe([], 300).vocab_size == 257


def test_the_smallest_vocabulary(tmp_path):
    tok = tokenizer.train_bpe(["hello hello hello"], 257)
    assert (tok.vocab_size, tok.encode("hé")) == (257, [104, 0xC3, 0xA9])
    assert hugging_face(tok, tmp_path / "t.json").encode("hé").ids == [104, 0xC3, 0xA9]


@pytest.mark.parametrize(
    "name,words",
    [
        ("bpe256", "257"),
        ("bpe0", "bpeN"),
        ("bpe", "bpeN"),
        ("-5", "bpeN"),
        ("gpt3", "gpt2, byte and bpeN"),
        ("", "bpeN"),
    ],
)
def test_names_that_are_none(name, words):
    with pytest.raises(ValueError, match=words):
        tokenizer.bpe_size(name)


def test_bad_input_is_one_clear_line(any_tokenizer, tmp_path):
    tok = any_tokenizer
    for call in (tok.encode, lambda t: tok.encode_stories([t]), lambda t: tok.encode_stories(["fine", t])):
        with pytest.raises(ValueError, match="half a surrogate pair .*U\\+D83D"):
            call("a \ud83d b")
    for ids in ([tok.vocab_size], [0, -1]):
        with pytest.raises(ValueError, match=f"{ids[-1]} is no id of the tokenizer {tok.name}"):
            tok.decode(ids)
    assert tok.decode(np.array([65, 66])) == tok.decode([65, 66]) == tok.decode(torch.tensor([65, 66]))


def test_half_a_character_waits_for_its_other_half():
    byte = tokenizer.get("byte")
    ids = byte.encode("😀")
    assert byte.decode_bytes(ids[:2]) == "😀".encode()[:2]
    assert byte.decode(ids[:2]) == "\ufffd" and byte.decode(ids) == "😀"


LONG = [
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


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:6]))
def test_text_without_words(text, any_tokenizer):
    """tiktoken's regular expressions overflow at a million blanks, with a panic that is no Exception."""
    tok, began = any_tokenizer, time.process_time()
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    stories = tok.encode_stories(["a b", text, "c"])
    assert stories.tolist() == [*tok.encode("a b"), tok.eot, *ids, tok.eot, *tok.encode("c"), tok.eot]
    assert time.process_time() - began < 10


def runs(n: int, seed: int) -> list[str]:
    """Texts that are, or contain, a run of one kind of characters, with ordinary text around it."""
    r, made = random.Random(seed), []
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
        text = "".join(r.choices(r.choice(kinds), k=r.choice([20, 99, 256, 1000, 3000])))
        made.append(r.choice(["", story(r), " "]) + text + r.choice(["", story(r), " x", "\n", "'s"]))
    return made


def test_long_runs_of_blanks_have_the_ids_that_short_ones_have(bpe, monkeypatch):
    """With a low limit, the ids are those of tiktoken and of Hugging Face on the whole text."""
    many = [*runs(300, seed=4), *texts(300, seed=5)]
    want = {tok: [tok.tiktoken.encode_ordinary(text) for text in many] for tok in (bpe, gpt2())}
    pattern = tokenizer.LONG_BLANKS.pattern
    for limit in (1, 2, 5):
        monkeypatch.setattr(tokenizer, "BLANKS", limit)
        short = re.compile(pattern.replace("900000", str(limit)), re.DOTALL)
        monkeypatch.setattr(tokenizer, "LONG_BLANKS", short)
        assert sum(len(tokenizer.split_blanks(text)) > 1 for text in many) > 50
        for tok, ids in want.items():
            assert [tok.encode(text) for text in many] == ids
            assert tok.encode_stories(many).tolist() == [i for found in ids for i in (*found, tok.eot)]


def test_long_words_have_the_ids_of_hugging_face(bpe, tmp_path):
    hf, many = hugging_face(bpe, tmp_path / "tokenizer.json"), runs(300, seed=6)
    assert [e.ids for e in hf.encode_batch(many)] == [bpe.encode(text) for text in many]


def plain(texts, size: int) -> list[str]:
    """The tokens of a BPE that is trained without a limit on words."""
    bpe = HuggingFace(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return sorted(bpe.get_vocab(), key=bpe.get_vocab().get)


def spelt(tok: Tokenizer) -> list[str]:
    chars = tokenizer.byte_chars()
    return ["".join(chars[b] for b in token) for token in tok.tokens[:-1]]


def test_ordinary_text_trains_the_vocabulary_that_it_did(bpe):
    r = random.Random(1)
    ordinary = [story(r) + piece(r) * 3 for _ in range(3000)]
    assert sorted(spelt(bpe)) == sorted(plain(ordinary, 1000))
    assert spelt(bpe)[256:] == [token for token in plain(ordinary, 1000) if len(token) > 1]


@pytest.mark.parametrize("text", LONG[3:], ids=lambda text: repr(text[:6]))
def test_training_on_text_without_words(text):
    began = time.process_time()
    tok = tokenizer.train_bpe([text[-200_000:], "once upon a time"] * 2, 600)
    assert time.process_time() - began < 5
    assert max(map(len, tok.tokens)) <= 256 and tok.decode(tok.encode(text)) == text


def test_chinese_without_spaces_trains_tokens_of_several_characters():
    r = random.Random(0)
    words = ["小猫", "小狗", "花园", "喜欢", "妈妈", "从前", "有一个", "朋友", "他们", "一起玩", "，", "。"]
    texts = ["".join(r.choices(words, k=3000)), *("".join(r.choices(words[:10], k=2000)) for _ in range(3))]
    tok = tokenizer.train_bpe(texts, 600)
    assert {word.encode() for word in words} <= set(tok.tokens)
    for text in texts:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and len(ids) < len(text) / 2


def test_files_that_are_no_tokenizer(bpe, tmp_path):
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


def test_gpt2_out_of_reach_fails_within_5_seconds(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        monkeypatch.setattr(tokenizer, "GPT2_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/gpt2/")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        start = time.monotonic()
        with pytest.raises(tokenizer.Unreachable, match="TIKTOKEN_CACHE_DIR.*--tokenizer bpe4096 or byte"):
            tokenizer.get("gpt2")
        assert time.monotonic() - start < 5


def test_within_gives_up_on_what_hangs():
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        tokenizer.within(0.2, lambda: time.sleep(3))
    assert time.monotonic() - start < 2
    assert tokenizer.within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        tokenizer.within(5, lambda: 1 / 0)


def test_importing_is_light():
    """train.py imports these to read files: they import no library that takes a second."""
    heavy = "torch datasets tokenizers tiktoken huggingface_hub pandas pyarrow nanostlm.toystories"
    listed = f"[m for m in '{heavy}'.split() if m in sys.modules]"
    code = f"import sys, prepare, nanostlm.data, nanostlm.sources, nanostlm.tokenizer; print({listed})"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
