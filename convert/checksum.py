"""Checksums of tensors, to compare what a checkpoint held with what was made of it."""

import hashlib
from dataclasses import dataclass, field

import mlx.core as mx


@dataclass
class Checksums:
    """Those of a conversion's tensors, by their names where they came from and where they went."""

    sources: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


def tensor_bytes(array: mx.array) -> memoryview:
    """The elements in order, as a safetensors file holds them."""
    return memoryview(mx.contiguous(array).view(mx.uint8))


def checksum(array: mx.array) -> str:
    """SHA-256 of the elements in order, whatever the shape.

    Processors have instructions for it, the Hub names large files by it, and
    ``sha256sum`` computes it of bytes cut out of a file.
    """
    return hashlib.sha256(tensor_bytes(array)).hexdigest()
