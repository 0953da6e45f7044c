"""Tokenizers behind one interface: text -> ids -> text.

    gpt2      GPT-2's 50,256 tokens and end-of-text, through tiktoken (downloads 1.5 MB once)
    bpe4096   byte-level BPE trained on the corpus; N ids in all, any N from 257
    byte      the 256 bytes and end-of-text

    from nanostlm import tokenizer
    tok = tokenizer.train_bpe(texts, 4096)       # or tokenizer.get("gpt2"), tokenizer.get("byte")
    tok.decode(tok.encode("Once upon a time"))   # exact for any text, including emoji
    tok.save("tokenizer.json")                   # Hugging Face's `tokenizers` reads it and gives equal ids

A vocabulary is a list of byte strings; a token's id is its index, and end-of-text is the id after the last.
Special tokens, which an objective of training adds, follow end-of-text. Text is never encoded as one of these
ids, not even `<|endoftext|>`. User errors raise ValueError.
"""

import base64
import hashlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from nanostlm.schema import TEXT, WHOLE, check, naming, read_json

EOT = "<|endoftext|>"
FIM = "<|suffix|>", "<|prefix|>", "<|middle|>"  # the special tokens of experiments/fim.py
# GPT-2's split into words, as tiktoken writes it: possessive quantifiers give the same pieces, much faster.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
BLANKS = 900_000  # tiktoken's regular expressions overflow at a million blanks before a word
BLANK = r"[^\S\x1c-\x1f]"  # its \s
LONG_BLANKS = re.compile(rf"(?<!{BLANK})({BLANK}{{{BLANKS},}})(?={BLANK}(?!{BLANK}).)", re.DOTALL)
LONG_WORD = 256  # bytes; training counts pairs in parts of this length, since its time is quadratic in words
MAX_IDS = 1_000_000  # of a BPE
NAME = "gpt2, byte or bpeN", lambda x: type(x) is str and re.fullmatch("gpt2|byte|bpe[1-9][0-9]{2,9}", x)
STATE = {"name": NAME, "ranks": TEXT, "special?": [TEXT]}  # what state() returns
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


class Unreachable(OSError):
    """Data or a vocabulary must be downloaded, and the network fails. The message names the alternatives."""


# ------------------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """
    tokens: the byte strings of ids 0, 1, ..., in the order of their merges, including all 256 bytes.
    special: the texts of the ids after end-of-text; only decode() knows them.
    """

    def __init__(self, name: str, tokens: list[bytes], special: Sequence[str] = ()):
        if len({token for token in tokens if len(token) == 1}) != 256 or len(set(tokens)) != len(tokens):
            raise ValueError("a vocabulary contains each of the 256 bytes, and no token twice")
        self.name, self.special = name, [*special]
        self.tokens = [*tokens, *(text.encode() for text in (EOT, *special))]
        if special and len({b"", *self.tokens}) <= len(self.tokens):
            raise ValueError("special tokens are not empty, and differ from each other and from all tokens")
        self.eot = len(tokens)
        self.vocab_size = len(self.tokens)
        self.ranks = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
        self.sha256 = hashlib.sha256(self.ranks.encode()).hexdigest()

    @cached_property
    def tiktoken(self):  # created by the first encode(): a run that only reads ids does not need it
        import tiktoken

        ranks = {token: i for i, token in enumerate(self.tokens[: self.eot])}
        special = {EOT: self.eot}
        return tiktoken.Encoding(self.name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """ValueError if the text is not valid Unicode (it contains a lone surrogate)."""
        data = checked(text)
        if self.name == "byte":
            return list(data)
        return [i for part in split_blanks(text) for i in self.tiktoken.encode_ordinary(part)]

    def encode_stories(self, texts: list[str]) -> np.ndarray:
        """(n_ids,) uint32: the ids of all texts, with end-of-text after each.

        tiktoken encodes all texts as one string with end-of-text between them, and releases the GIL: this is
        three times as fast as one text at a time.
        """
        if self.name == "byte":
            data = [checked(text) for text in texts]
            ids = np.frombuffer(b"".join(data), np.uint8).astype(np.uint32)
            return np.insert(ids, np.cumsum([len(d) for d in data], dtype=np.int64), self.eot)
        joined = "".join(text + EOT for text in texts)
        checked(joined)
        if joined.count(EOT) == len(texts) and len(split_blanks(joined)) == 1:
            return self.tiktoken.encode_to_numpy(joined, allowed_special={EOT})
        # some text contains the string <|endoftext|>, or a long run of blanks
        return np.fromiter((i for text in texts for i in (*self.encode(text), self.eot)), np.uint32)

    def decode_bytes(self, ids) -> bytes:
        """May begin or end inside a character. ValueError for an invalid id."""
        ids, last = [int(i) for i in ids], self.vocab_size - 1
        if ids and not 0 <= min(ids) <= max(ids) <= last:
            bad = next(i for i in ids if not 0 <= i <= last)
            raise ValueError(f"{bad} is not a valid id of tokenizer {self.name} (0 to {last})")
        return b"".join([self.tokens[i] for i in ids])

    def decode(self, ids) -> str:
        """Invalid UTF-8, which a model can generate, becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def with_special(self, special: Sequence[str]) -> "Tokenizer":
        """This tokenizer, with these special tokens after those that it has."""
        new = [text for text in special if text not in self.special]
        return Tokenizer(self.name, self.tokens[: self.eot], self.special + new) if new else self

    def fim_ids(self) -> list[int]:
        """The ids of FIM. ValueError if this tokenizer lacks them."""
        if not {*FIM} <= {*self.special}:
            raise ValueError("this model cannot fill in text: that takes a run with --objective=fim")
        return [self.eot + 1 + self.special.index(text) for text in FIM]

    def fill_prompt(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """The ids after which a model that was trained with objective=fim writes what is between the two."""
        suffix_id, prefix_id, middle_id = self.fim_ids()
        return [suffix_id, *suffix, prefix_id, *prefix, middle_id]

    def state(self) -> dict:
        """Plain data for a checkpoint, for from_state(); `ranks` is the text of a .tiktoken file."""
        special = {"special": self.special} if self.special else {}
        return {"name": self.name, "ranks": self.ranks} | special

    def save(self, path) -> None:
        """Write tokenizer.json in Hugging Face's format, which gives equal ids there.

        Proof that the ids are equal: tiktoken merges the pair of parts whose joined bytes have the lowest id,
        and Hugging Face the pair that comes first in a list; of equal pairs, both merge the leftmost. Text
        between two boundaries is merged independently, so a token always results from the same pair: the last
        two parts when the token's own bytes are merged. In the order of their tokens, these pairs are
        therefore all the pairs that tiktoken merges, in the same order of priority. (With Hugging Face, the
        text `<|endoftext|>` becomes the id unless `encode_special_tokens` is set.)
        """
        from tokenizers import Tokenizer as HuggingFace
        from tokenizers import decoders, models, pre_tokenizers

        chars = byte_chars()
        ranks = {token: i for i, token in enumerate(self.tokens[: self.eot])}
        spelling = {token: "".join(chars[b] for b in token) for token in ranks}
        pairs = [last_pair(token, ranks) for token in ranks if len(token) > 1]
        bpe = HuggingFace(
            models.BPE(
                vocab={spelling[token]: i for token, i in ranks.items()},
                merges=[(spelling[left], spelling[right]) for left, right in filter(None, pairs)],
                ignore_merges=True,  # as in tiktoken, a word that is a token is not built by merges
            )
        )
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens([EOT, *self.special])
        Path(path).write_text(bpe.to_str(pretty=True), encoding="utf-8")  # Tokenizer.save hides the OSError


def checked(text: str) -> bytes:
    """The text as UTF-8. ValueError if it is not valid Unicode."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: a lone surrogate at character {error.start} "
            f"(U+{ord(text[error.start]):04X})"
        ) from None


def split_blanks(text: str) -> list[str]:
    """The text in parts that tiktoken can split into words: a word begins with the last blank before it."""
    return LONG_BLANKS.split(text) if len(text) > BLANKS else [text]


def byte_chars() -> dict[int, str]:
    """The printable character that represents each byte in tokenizer.json: 65 -> "A", 32 -> "Ġ"."""
    plain = [b for b in range(256) if chr(b).isprintable() and b != 32]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def last_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes] | None:
    """The last two parts when the bytes of `token` are merged; None if merging does not produce `token`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ------------------------------------------------------------------------------------------------------------
# Creating and loading tokenizers


def bpe_size(name: str) -> int | None:
    """4096 for "bpe4096", None for "gpt2" and "byte"; ValueError for any other name."""
    if name in ("gpt2", "byte"):
        return None
    match = re.fullmatch(r"bpe([1-9][0-9]*)", name)
    size = int(match[1][:9]) if match else 0
    if not 257 <= size <= MAX_IDS:  # 256 bytes and end-of-text
        known = f"gpt2, byte and bpeN, N from 257 to {MAX_IDS:,}, as in bpe4096"
        raise ValueError(f"no tokenizer is called {name!r:.60}: there are {known}")
    return size


def get(name: str) -> Tokenizer:
    """gpt2 or byte. Unreachable, within 5 seconds, if GPT-2's files are neither cached nor downloadable."""
    if bpe_size(name) is not None:
        raise ValueError(f"{name} is trained on a corpus: python prepare.py CORPUS --tokenizer {name}")
    if name == "byte":
        return Tokenizer(name, [bytes([b]) for b in range(256)])
    import tiktoken

    files = [GPT2_URL + "vocab.bpe", GPT2_URL + "encoder.json"]
    default = Path(tempfile.gettempdir(), "data-gym-cache")  # tiktoken's default
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default)))
    try:
        if not all((cache / hashlib.sha1(file.encode()).hexdigest()).exists() for file in files):
            from urllib.request import Request, urlopen  # supports proxies

            within(4, lambda: urlopen(Request(files[0], method="HEAD"), timeout=3).close())
        gpt2 = tiktoken.get_encoding("gpt2")
    except OSError as error:  # includes the errors of urllib and requests
        raise Unreachable(
            f"cannot download GPT-2's vocabulary from {GPT2_URL.split('/')[2]} ({type(error).__name__}): "
            "set TIKTOKEN_CACHE_DIR to a copy of another machine's tiktoken cache, or use a tokenizer that "
            "needs no download (--tokenizer bpe4096 or byte)"
        ) from None
    return Tokenizer(name, [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)])


def within(seconds: float, call):
    """Return call(), or raise TimeoutError after `seconds`, even if call() blocks, as DNS lookups do."""
    result = []

    def run():
        try:
            result.append((call(), None))
        except Exception as error:
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)  # daemon: a hanging call does not block exit
    thread.start()
    thread.join(seconds)
    value, error = result[0] if result else (None, TimeoutError(f"no answer within {seconds:g} seconds"))
    if error is not None:
        raise error
    return value


def from_state(state: dict) -> Tokenizer:
    """The tokenizer with this state(). ValueError if the state is invalid."""
    with naming("the state of the tokenizer"):
        check(state, STATE)
        lines = [line.split() for line in state["ranks"].splitlines()]
        if any(line[1:] != [str(i)] for i, line in enumerate(lines)):
            raise ValueError("ranks must list all ids in order")
        tokens = [base64.b64decode(line[0], validate=True) for line in lines]
        if state["name"] == "byte" and tokens != [bytes([b]) for b in range(256)]:
            raise ValueError("ranks must list the bytes in order")
        return Tokenizer(state["name"], tokens, state.get("special") or ())


def load(path, name: str | None = None) -> Tokenizer:
    """Read tokenizer.json. `name` matters because a bpe4096 of a tiny corpus has fewer ids than that."""
    byte = {char: b for b, char in byte_chars().items()}
    vocab = read_json(Path(path), {"model": {"vocab": {"*": WHOLE}}})["model"]["vocab"]
    with naming(path):
        ids = {i: bytes(byte[char] for char in spelt) for spelt, i in vocab.items() if spelt != EOT}
        return Tokenizer(name or f"bpe{len(ids) + 1}", [ids[i] for i in range(len(ids))])


def train_bpe(texts, vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with `vocab_size` ids in all on an iterable of texts; ids 0 to 255 are the bytes.

    If no pairs are left to merge, it prints a note, and the tokenizer has fewer ids than its name says.
    """
    bpe_size(name := f"bpe{vocab_size}")
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers

    bpe = HuggingFace(models.BPE())
    split = [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(length=LONG_WORD)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(split)  # GPT-2's words, in parts if they are long
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
