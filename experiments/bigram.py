"""
A bigram model, the smallest architecture: the logits of the next token are a row of a table.

What one token of context is worth, as a floor for other experiments: 3.31 bits per byte on TinyStories.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from model import check_settings


@dataclass(frozen=True)
class Config:
    block_size: int = 256  # tokens in a window of training and evaluation
    vocab_size: int = 257  # comes from the tokenizer
    dropout: float = 0.0  # on the logits

    def validate(self) -> None:
        check_settings(self, {"block_size": (1, 10**9), "vocab_size": (1, 65_536), "dropout": (0, 0.999)}, {})


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        config.validate()
        self.config = config
        self.table, self.drop = nn.Embedding(config.vocab_size, config.vocab_size), nn.Dropout(config.dropout)
        nn.init.zeros_(self.table.weight)

    def forward(self, idx, targets=None):
        """idx (B, T) -> (logits (B, T, vocab_size), None); with targets -> (None, mean loss in nats)."""
        logits = self.drop(self.table(idx))
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
