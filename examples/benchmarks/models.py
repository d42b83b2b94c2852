"""Networks for step-time measurements, each with random batches and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

Batch = tuple[torch.Tensor, torch.Tensor]


class Task(NamedTuple):
    network: nn.Module
    batch: Callable[[], Batch]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


class Transformer(nn.Module):
    """A language model: each token attends to the previous ones."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.tokens(x) + self.positions, self.mask, is_causal=True))


class LSTM(nn.Module):
    """The language model of Accordion's WikiText-2 runs: three layers of 650 units and an embedding of the same width."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.body = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.tokens(x))[0])


def resnet18() -> Task:
    """ResNet-18 as it is used on CIFAR-10: 11.2 M parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for stage, outputs in enumerate((64, 128, 256, 512)):
        layers += [Block(width, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        width = outputs
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return Task(network, lambda: (torch.randn(4, 3, 32, 32), torch.randint(10, (4,))), F.cross_entropy)


def transformer() -> Task:
    """Four layers of width 512: 16.8 M parameters."""
    network = Transformer(vocabulary=4096, width=512, layers=4, heads=8, length=32)
    return Task(network, lambda: tokens(4096, 4, 32), next_token_loss)


def lstm() -> Task:
    """23.2 M parameters. It has 10,000 of WikiText-2's 33,000 words, as otherwise the last layer dominates a step."""
    return Task(LSTM(vocabulary=10_000, width=650, layers=3), lambda: tokens(10_000, 4, 35), next_token_loss)


def tokens(vocabulary: int, batch: int, length: int) -> Batch:
    return torch.randint(vocabulary, (batch, length)), torch.randint(vocabulary, (batch, length))


def next_token_loss(scores: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores.flatten(0, 1), following.flatten())


TASKS: dict[str, Callable[[], Task]] = {"resnet18": resnet18, "transformer": transformer, "lstm": lstm}
BATCHES = {"resnet18": "4 images", "transformer": "4 x 32 tokens", "lstm": "4 x 35 tokens"}
