"""Tokenizers behind one interface: text -> ids -> text.

    gpt2      GPT-2's 50,256 tokens and end-of-text, through tiktoken (downloads 1.5 MB once)
    bpe4096   byte-level BPE trained on the corpus; N ids in all, any N from 257
    byte      the 256 bytes and end-of-text

    from nanostlm import tokenizer
    tok = tokenizer.train_bpe(texts, 4096)       # or tokenizer.get("gpt2"), tokenizer.get("byte")
    tok.decode(tok.encode("Once upon a time"))   # any text comes back exactly, emoji too
    tok.save("tokenizer.json")                   # Hugging Face's `tokenizers` reads it and gives equal ids

A vocabulary is a list of byte strings, each at the place of its id; end-of-text is the id after the last.
Text never turns into end-of-text, even where it reads `<|endoftext|>`. A user's mistake raises ValueError.
"""

import base64
import hashlib
import json
import os
import re
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"
# GPT-2's split into words as tiktoken writes it: possessive quantifiers, the same pieces, much faster.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
BLANKS = 900_000  # blanks in a row; tiktoken's regular expressions overflow at a million
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


class Unreachable(OSError):
    """Only a network could bring it (the Hub's data, a vocabulary), and there is none. Names the ways out."""


# ------------------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """tokens: the byte strings of ids 0, 1, ... in the order in which they merge, all bytes among them."""

    def __init__(self, name: str, tokens: list[bytes]):
        if len({token for token in tokens if len(token) == 1}) != 256 or len(set(tokens)) != len(tokens):
            raise ValueError("a vocabulary has each of the 256 bytes, and nothing twice")
        self.name = name
        self.tokens = [*tokens, EOT.encode()]
        self.eot = len(tokens)
        self.vocab_size = len(tokens) + 1
        self.ranks = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
        self.sha256 = hashlib.sha256(self.ranks.encode()).hexdigest()

    @cached_property
    def tiktoken(self):  # made at the first encode: a run that only reads ids needs none
        import tiktoken

        ranks = {token: i for i, token in enumerate(self.tokens[:-1])}
        special = {EOT: self.eot}
        return tiktoken.Encoding(self.name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """ValueError where the text is not valid Unicode (a lone surrogate)."""
        data = checked(text)
        return list(data) if self.name == "byte" else self.tiktoken.encode_ordinary(text)

    def encode_stories(self, texts: list[str]) -> np.ndarray:
        """(n_ids,) uint32: the ids of each text, end-of-text after each.

        tiktoken gets all texts as one string with end-of-text between them, and works on it without the GIL:
        three times as fast as one by one."""
        if self.name == "byte":
            data = [checked(text) for text in texts]
            ids = np.frombuffer(b"".join(data), np.uint8).astype(np.uint32)
            return np.insert(ids, np.cumsum([len(d) for d in data], dtype=np.int64), self.eot)
        joined = "".join(text + EOT for text in texts)
        checked(joined)
        if joined.count(EOT) == len(texts):
            return self.tiktoken.encode_to_numpy(joined, allowed_special={EOT})
        # a text that holds the very words: one by one
        return np.array([i for text in texts for i in (*self.encode(text), self.eot)], np.uint32)

    def encode_batch(self, texts: list[str], num_threads: int = 8) -> list[np.ndarray]:
        """One (n_ids,) uint32 array a text, encoded in parallel."""
        texts = list(texts)
        with ThreadPoolExecutor(num_threads) as pool:
            chunks = pool.map(self.encode_stories, [texts[i : i + 256] for i in range(0, len(texts), 256)])
        return [ids[:-1] for c in chunks for ids in np.split(c, np.flatnonzero(c == self.eot) + 1)[:-1]]

    def decode_bytes(self, ids) -> bytes:
        """Perhaps half a character at either end. ValueError for an id that is none."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) <= self.eot:
            bad = next(i for i in ids if not 0 <= i <= self.eot)
            raise ValueError(f"{bad} is no id of the tokenizer {self.name} (0 to {self.eot})")
        return b"".join([self.tokens[i] for i in ids])

    def decode(self, ids) -> str:
        """Bytes that are no UTF-8, which a model may well write, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def state(self) -> dict:
        """Plain data for a checkpoint, all that from_state() needs; `ranks` is a .tiktoken file's text."""
        return {"name": self.name, "ranks": self.ranks}

    def save(self, path) -> None:
        """Writes tokenizer.json in Hugging Face's format, which gives equal ids there.

        Why equal: tiktoken merges the pair whose joined bytes have the lowest id, Hugging Face the pair that
        comes first in a list; both the leftmost of equals. What lies between two boundaries merges as if
        alone, so a token only ever arises from one pair: the two parts left when its own bytes are merged.
        Listed in the order of the tokens, these are all pairs that tiktoken merges, and they rank the same.
        (There, the text `<|endoftext|>` does become the id, unless `encode_special_tokens` is set.)"""
        char = byte_chars()
        ranks = {token: i for i, token in enumerate(self.tokens[:-1])}
        spelt = {token: "".join(char[b] for b in token) for token in ranks}
        pairs = [last_pair(token, ranks) for token in ranks if len(token) > 1]
        end = {
            "id": self.eot,
            "content": EOT,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is looked up, not merged, as in tiktoken
            "vocab": {spelt[token]: i for token, i in ranks.items()},
            "merges": [[spelt[left], spelt[right]] for left, right in filter(None, pairs)],
        }
        data = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        }
        Path(path).write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")


def checked(text: str) -> bytes:
    """The UTF-8 bytes of the text. ValueError where it has none, or where tiktoken would fail on it."""
    if len(text) > BLANKS and re.search(rf"(?<!\s)\s{{{BLANKS},}}+\S", text):
        raise ValueError(f"the text has {BLANKS:,} blanks in a row, which tiktoken cannot split")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: half a surrogate pair at character {error.start} "
            f"(U+{ord(text[error.start]):04X})"
        ) from None


def byte_chars() -> dict[int, str]:
    """The printable character that stands for each byte in tokenizer.json: 65 -> "A", 32 -> "Ġ"."""
    plain = [b for b in range(256) if chr(b).isprintable() and b != 32]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def last_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes] | None:
    """The two parts left just before merging makes `token` of its bytes; None where it never does."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ------------------------------------------------------------------------------------------------------------
# Where tokenizers come from


def bpe_size(name: str) -> int | None:
    """4096 for "bpe4096", None for "gpt2" and "byte". ValueError for any other name."""
    if name in ("gpt2", "byte"):
        return None
    match = re.fullmatch(r"bpe([1-9]\d*)", name)
    if not match:
        raise ValueError(f"no tokenizer is called {name!r}: there are gpt2, byte and bpeN, as in bpe4096")
    if int(match[1]) < 257:
        raise ValueError(f"{name} is too small: 256 bytes and end-of-text make 257 ids at least (bpe257)")
    return int(match[1])


def get(name: str) -> Tokenizer:
    """gpt2 or byte. Unreachable, within 5 seconds, where gpt2's files are in no cache and no reach."""
    if bpe_size(name) is not None:
        raise ValueError(f"{name} is trained on a corpus: python prepare.py CORPUS --tokenizer {name}")
    if name == "byte":
        return Tokenizer(name, [bytes([b]) for b in range(256)])
    import tiktoken

    files = [GPT2_URL + "vocab.bpe", GPT2_URL + "encoder.json"]
    default = Path(tempfile.gettempdir(), "data-gym-cache")  # where tiktoken looks, too
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default)))
    try:
        if not all((cache / hashlib.sha1(file.encode()).hexdigest()).exists() for file in files):
            from urllib.request import Request, urlopen  # knows proxies

            within(4, lambda: urlopen(Request(files[0], method="HEAD"), timeout=3).close())
        gpt2 = tiktoken.get_encoding("gpt2")
    except OSError as error:  # urllib's and requests' errors are of this class, too
        raise Unreachable(
            f"GPT-2's vocabulary cannot be had from {GPT2_URL.split('/')[2]} ({type(error).__name__}): set "
            "TIKTOKEN_CACHE_DIR to a copy of another machine's tiktoken cache, or take a tokenizer that "
            "needs no download (--tokenizer bpe4096 or byte)"
        ) from None
    return Tokenizer(name, [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)])


def within(seconds: float, call):
    """call(), or TimeoutError after so many seconds, whatever it waits for (DNS has no limit of its own)."""
    result = []

    def run():
        try:
            result.append((call(), None))
        except Exception as error:
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)  # one that hangs does not keep the process alive
    thread.start()
    thread.join(seconds)
    value, error = result[0] if result else (None, TimeoutError(f"no answer within {seconds:g} seconds"))
    if error is not None:
        raise error
    return value


def from_state(state: dict) -> Tokenizer:
    """The tokenizer whose state() this is. ValueError where it is none."""
    try:
        lines = [line.split() for line in state["ranks"].splitlines()]
        if [int(i) for _, i in lines] != list(range(len(lines))):
            raise ValueError("ids are missing")
        return Tokenizer(state["name"], [base64.b64decode(token) for token, _ in lines])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"this is not the state of a tokenizer: {error!r}") from None


def load(path, name: str | None = None) -> Tokenizer:
    """What save() wrote. `name`, since a bpe4096 of a tiny corpus has fewer ids than its name says."""
    byte = {char: b for b, char in byte_chars().items()}
    try:
        vocab = json.loads(Path(path).read_text(encoding="utf-8"))["model"]["vocab"]
        ids = {i: bytes(byte[char] for char in spelt) for spelt, i in vocab.items() if spelt != EOT}
        return Tokenizer(name or f"bpe{len(ids) + 1}", [ids[i] for i in range(len(ids))])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a byte-level BPE in Hugging Face's format: {error!r}") from None


def train_bpe(texts, vocab_size: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` ids in all, from an iterable of texts; ids 0 to 255 are the bytes.

    Where nothing is left to merge it stops early and says so: fewer ids, and the name as asked."""
    bpe_size(name := f"bpe{vocab_size}")
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers

    bpe = HuggingFace(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's split
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    byte = {char: b for b, char in byte_chars().items()}
    vocab = bpe.get_vocab()
    merged = [bytes(byte[char] for char in spelt) for spelt in sorted(vocab, key=vocab.get) if len(spelt) > 1]
    tokenizer = Tokenizer(name, [bytes([b]) for b in range(256)] + merged)
    if tokenizer.vocab_size < vocab_size:
        print(
            f"note: {name} has {tokenizer.vocab_size:,} ids only: this corpus has no more pairs to merge",
            file=sys.stderr,
        )
    return tokenizer
