"""Tokenizers behind one interface: text -> ids -> text.

    gpt2      GPT-2's 50,256 tokens and end-of-text, encoded by tiktoken (downloads 1.5 MB once)
    bpe4096   byte-level BPE trained on the corpus, N ids in all (any N from 257)
    byte      the 256 bytes and end-of-text: no vocabulary at all

    import tokenizer
    tok = tokenizer.train_bpe(texts, 4096)       # or tokenizer.get("gpt2"), tokenizer.get("byte")
    tok.decode(tok.encode("Once upon a time"))   # any text comes back exactly, emoji too
    tok.save("tokenizer.json")                   # Hugging Face's `tokenizers` reads it and gives equal ids

A vocabulary is a list of byte strings whose place is their id; end-of-text is the id after the last. Text never turns into
end-of-text, even where it reads `<|endoftext|>`. User mistakes raise ValueError; a vocabulary out of reach, Unreachable.
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
# GPT-2's split into words, written with possessive quantifiers as tiktoken does (same pieces, several times as fast).
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # vocab.bpe and encoder.json


class Unreachable(OSError):
    """Something that only a network can bring (the Hub, a vocabulary), and no network. The message names the ways out."""


def within(seconds, call):
    """call(), but TimeoutError after `seconds` whatever it waits for (name servers keep no time limit of their own)."""
    result = []

    def run():
        try:
            result.append((call(), None))
        except Exception as error:
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)  # a daemon: one that hangs does not keep the process alive
    thread.start()
    thread.join(seconds)
    value, error = result[0] if result else (None, TimeoutError(f"no answer within {seconds:g} seconds"))
    if error is not None:
        raise error
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

class Tokenizer:
    """tokens: the byte strings of ids 0, 1, ..., all 256 single bytes among them; merged in order of id, as tiktoken does."""

    def __init__(self, name, tokens):
        self.name = name
        self.tokens = [*tokens, EOT.encode()]
        self.eot = len(tokens)
        self.vocab_size = len(tokens) + 1
        self.ranks = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
        self.sha256 = hashlib.sha256(self.ranks.encode()).hexdigest()  # of the vocabulary, end-of-text left out

    @cached_property
    def tiktoken(self):  # made at the first encode: a training run that only reads ids needs none
        import tiktoken
        ranks = {token: i for i, token in enumerate(self.tokens[:-1])}
        return tiktoken.Encoding(self.name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOT: self.eot})

    def encode(self, text):
        """The list of ids. ValueError where the text is not valid Unicode (a lone surrogate)."""
        data = utf8(text)
        return list(data) if self.name == "byte" else self.tiktoken.encode_ordinary(text)

    def encode_stories(self, texts):
        """One uint32 array (n_ids,): the ids of each text, an end-of-text after each. Releases the GIL for most of its time.

        tiktoken gets all the texts in one string with end-of-text between them: 3 times as fast as one by one."""
        if self.name == "byte":
            data = [utf8(text) for text in texts]
            ends = np.cumsum([len(d) for d in data])
            return np.insert(np.frombuffer(b"".join(data), np.uint8).astype(np.uint32), ends, self.eot)
        joined = "".join(text + EOT for text in texts)
        utf8(joined)
        if joined.count(EOT) == len(texts):
            return self.tiktoken.encode_to_numpy(joined, allowed_special={EOT})
        ids = [i for text in texts for i in (*self.encode(text), self.eot)]  # some text holds the very string: one by one
        return np.array(ids, np.uint32)

    def encode_batch(self, texts, num_threads=8):
        """A list of uint32 arrays, one a text, encoded in parallel."""
        texts = list(texts)
        chunks = [texts[i:i + 256] for i in range(0, len(texts), 256)]
        with ThreadPoolExecutor(num_threads) as pool:
            encoded = pool.map(self.encode_stories, chunks)
        return [ids[:-1] for chunk in encoded for ids in np.split(chunk, np.flatnonzero(chunk == self.eot) + 1)[:-1]]

    def decode_bytes(self, ids):
        """The bytes of the ids: perhaps half a character at either end. ValueError for an id that is none."""
        try:
            if min(ids := [int(i) for i in ids], default=0) < 0:
                raise IndexError
            return b"".join([self.tokens[i] for i in ids])
        except IndexError:
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"{bad} is no id of the tokenizer {self.name} (0 to {self.vocab_size - 1})") from None

    def decode(self, ids):
        """The text of the ids; bytes that are not UTF-8 (which a model may well write) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def state(self):
        """Plain data for a checkpoint; `ranks` is the text of a .tiktoken file, so nothing else is needed to come back."""
        return {"name": self.name, "ranks": self.ranks}

    def save(self, path):
        """Writes tokenizer.json in Hugging Face's format, in which `tokenizers` and `transformers` give equal ids.

        Equal by construction: tiktoken merges the pair whose joined bytes have the lowest id, leftmost first; Hugging Face
        the pair that stands first in a list, leftmost first. Bytes between two boundaries merge as they would alone, so a
        token X ever arises from one pair only: the two parts left when X alone is merged. Listed in order of X, these
        pairs are all that tiktoken ever merges, in its order. (Two pairs for one X, as in a|aa and aa|a, would not do.)
        Hugging Face turns the text <|endoftext|> into the id unless `encode_special_tokens` is set there; we never do."""
        char = byte_chars()
        ranks = {token: i for i, token in enumerate(self.tokens[:-1])}
        spell = {token: "".join(char[b] for b in token) for token in ranks}
        pairs = [merge_pair(token, ranks) for token in ranks if len(token) > 1]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        end = {"id": self.eot, "content": EOT, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                 "ignore_merges": True,  # a whole word that is a token needs no merging: tiktoken looks it up first, too
                 "vocab": {spell[token]: i for token, i in ranks.items()},
                 "merges": [[spell[left], spell[right]] for left, right in filter(None, pairs)]}
        text = json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
                           "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
                           "decoder": byte_level, "model": model}, ensure_ascii=False, indent=1)
        Path(path).write_text(text, encoding="utf-8")


def utf8(text):
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: a lone surrogate (U+{ord(text[error.start]):04X}) "
                         f"at character {error.start}") from None


def byte_chars():
    """GPT-2's printable stand-in for each byte, in which tokenizer.json spells its tokens: 65 -> "A", 32 -> "Ġ"."""
    plain = [b for b in range(256) if chr(b).isprintable() and b != 32]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def merge_pair(token, ranks):
    """The two parts that are left just before merging makes `token` of its bytes; None where it never does."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Where tokenizers come from

def bpe_size(name):
    """4096 for "bpe4096", None for "gpt2" and "byte". ValueError for any other name."""
    if name in ("gpt2", "byte"):
        return None
    match = re.fullmatch(r"bpe([1-9]\d*)", name)
    if not match:
        raise ValueError(f"no tokenizer {name!r}: there are gpt2, byte and bpeN, as in bpe4096")
    if int(match[1]) < 257:
        raise ValueError(f"{name} is too small: the 256 bytes and end-of-text make 257 ids at least (bpe257)")
    return int(match[1])


def get(name):
    """The tokenizer that needs no corpus: "gpt2" or "byte". Unreachable, within 5 seconds, where gpt2's files cannot be had."""
    if bpe_size(name) is not None:
        raise ValueError(f"{name} is trained on a corpus: python prepare.py CORPUS --tokenizer {name}")
    if name == "byte":
        return Tokenizer("byte", [bytes([b]) for b in range(256)])
    import tiktoken
    urls = [GPT2_URL + "vocab.bpe", GPT2_URL + "encoder.json"]
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))  # as tiktoken itself looks for it
    folder = Path(tempfile.gettempdir(), "data-gym-cache") if folder is None else Path(folder)
    try:
        if not all((folder / hashlib.sha1(url.encode()).hexdigest()).exists() for url in urls):
            from urllib.request import Request, urlopen  # knows proxies
            within(4, lambda: urlopen(Request(urls[0], method="HEAD"), timeout=3).close())
        gpt2 = tiktoken.get_encoding("gpt2")
    except OSError as error:  # requests' and urllib's errors are of this class, too
        raise Unreachable(
            f"GPT-2's vocabulary cannot be downloaded from {GPT2_URL.split('/')[2]} ({type(error).__name__}): copy tiktoken's "
            "cache from another machine and set TIKTOKEN_CACHE_DIR to it, or take --tokenizer bpe4096 or byte, which need "
            "no download") from None
    return Tokenizer("gpt2", [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)])


def from_state(state):
    """The tokenizer whose state() this is. ValueError where it is not one."""
    try:
        lines = [line.split() for line in state["ranks"].splitlines()]
        tokens = [base64.b64decode(token) for token, _ in lines]
        if [int(i) for _, i in lines] != list(range(len(lines))) or len({t for t in tokens if len(t) == 1}) != 256:
            raise ValueError("ids missing")
        return Tokenizer(state["name"], tokens)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"this is not the state of a tokenizer ({error})") from None


def load(path, name=None):
    """The tokenizer that save() wrote to `path`; `name` where fewer ids than bpeN's N were found in the corpus."""
    byte = {char: b for b, char in byte_chars().items()}
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        vocab = {spelt: i for spelt, i in data["model"]["vocab"].items() if spelt != EOT}
        tokens = [bytes(byte[char] for char in spelt) for spelt in sorted(vocab, key=vocab.get)]
        if sorted(vocab.values()) != list(range(len(vocab))) or len({t for t in tokens if len(t) == 1}) != 256:
            raise ValueError("ids missing")
        return Tokenizer(name or f"bpe{len(tokens) + 1}", tokens)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a byte-level BPE in Hugging Face's format ({error})") from None


def train_bpe(texts, vocab_size):
    """Byte-level BPE of `vocab_size` ids in all, trained on an iterable of texts; ids 0 to 255 are the bytes themselves.

    Where the texts have too few pairs that occur twice, it stops early and says so: the tokenizer keeps its name."""
    bpe_size(name := f"bpe{vocab_size}")
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers
    bpe = HuggingFace(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's split
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False))
    byte = {char: b for b, char in byte_chars().items()}
    vocab = bpe.get_vocab()
    merged = [bytes(byte[char] for char in spelt) for spelt in sorted(vocab, key=vocab.get) if len(spelt) > 1]
    tokenizer = Tokenizer(name, [bytes([b]) for b in range(256)] + merged)
    if tokenizer.vocab_size < vocab_size:
        print(f"note: the corpus is too small for {name}: no pair occurs twice any more after "
              f"{tokenizer.vocab_size:,} ids, so it has that many", file=sys.stderr)
    return tokenizer
