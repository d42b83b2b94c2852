"""The paper's networks: ResNet-18, SENet and VGG-19bn for images of 32 x 32, an LSTM language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

State = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016); with `squeeze`, channels are weighted before the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        body: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=squeeze),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=squeeze),
            nn.BatchNorm2d(outputs),
        ]
        self.body = nn.Sequential(*body, *([nn.ReLU(inplace=True), Excitation(outputs)] if squeeze else []))
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=squeeze)
            self.short = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


class Excitation(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): multiplies channels by weights in (0, 1) that depend on all channel means."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.weights = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weights(x.mean((2, 3)))[:, :, None, None]


def resnet18(classes: int, width: int = 64, channels: int = 3, squeeze: bool = False) -> nn.Module:
    """ResNet-18 for CIFAR: four stages of two blocks, of `width` to 8 `width` channels; 11.2 M parameters."""
    layers = [nn.Conv2d(channels, width, 3, 1, 1, bias=squeeze), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        layers += [Block(inputs, outputs, 2 if stage else 1, squeeze), Block(outputs, outputs, 1, squeeze)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def senet(classes: int, **options: Any) -> nn.Module:
    """SENet-18: ResNet-18 with squeeze and excitation in each block, and biases, as in the authors' code."""
    return resnet18(classes, squeeze=True, **options)


def vgg19bn(classes: int) -> nn.Module:
    """VGG-19 with batch normalisation (Simonyan, Zisserman 2015) and two hidden layers of 512 for images of 32 x 32."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, convolutions in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layers[-3].bias)
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    hidden = [m for _ in range(2) for m in (nn.Dropout(), nn.Linear(512, 512), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers, nn.Flatten(), *hidden, nn.Dropout(), nn.Linear(512, classes))


def vgg8(classes: int, size: int = 28) -> nn.Module:
    """The demo's network: six convolutions with batch norm and two dense layers, for grey images of `size` x `size`."""
    layers: list[nn.Module] = []
    inputs = 1
    for outputs in (16, 32, 64):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    features = inputs * (size // 8) ** 2
    hidden = [nn.Linear(features, 128), nn.ReLU(inplace=True), nn.Linear(128, classes)]
    return nn.Sequential(*layers, nn.Flatten(), *hidden)


class LSTM(nn.Module):
    """A language model over words with shared input and output embeddings (Press, Wolf 2017). Shapes: (time, streams)."""

    def __init__(self, words: int, width: int = 650, layers: int = 3, dropout: float = 0.4) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.words = nn.Embedding(words, width)
        self.body = nn.LSTM(width, width, layers, dropout=dropout if layers > 1 else 0.0)
        self.head = nn.Linear(width, words)
        self.head.weight = self.words.weight
        nn.init.uniform_(self.words.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """Returns the scores of the next words and the next state. The state None starts a sequence."""
        out, state = self.body(self.drop(self.words(x)), state)
        return self.head(self.drop(out)), state


MODELS = {"resnet18": resnet18, "senet": senet, "vgg19bn": vgg19bn, "vgg8": vgg8}
