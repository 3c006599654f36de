"""VGG11 with batch norm for images of 32×32. Needs PyTorch."""

from __future__ import annotations

from typing import Any

from torch import nn

LAYERS = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
"""Source: Simonyan and Zisserman 2014, configuration A; one linear layer less, since five poolings leave one pixel."""


def vgg11(n_classes: int, width: float = 1.0, dropout: float = 0.3) -> Any:
    """Pixels (batch, 3, 32, 32) -> logits (batch, n_classes). ``width`` scales the number of channels."""
    parts: list[Any] = []
    n_channels = 3
    for layer in LAYERS:
        if isinstance(layer, str):
            parts.append(nn.MaxPool2d(2))
            continue
        n_next = max(1, round(layer * width))
        parts += [nn.Conv2d(n_channels, n_next, 3, padding=1, bias=False), nn.BatchNorm2d(n_next), nn.ReLU()]
        n_channels = n_next
    return nn.Sequential(*parts, nn.Flatten(), nn.Dropout(dropout), nn.Linear(n_channels, n_classes))
