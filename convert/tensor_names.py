"""Tensors' names in messages: layers that agree are written together."""

import re
from collections.abc import Iterable

LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def list_tensors(tensors: Iterable[tuple[str, str]]) -> str:
    """Names with a remark each, as one line.

    >>> list_tensors([("model.layers.0.a", ""), ("model.layers.1.a", ""), ("b", " [3]")])
    'model.layers.{0,1}.a, b [3]'
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, remark in tensors:
        layer = LAYER.search(name)
        groups.setdefault((LAYER.sub("*", name), remark), []).append(layer[0] if layer else "")
    listed = []
    for (pattern, remark), layers in groups.items():
        layer = layers[0] if len(layers) == 1 else "{" + ",".join(layers) + "}"
        listed.append(pattern.replace("*", layer) + remark)
    return ", ".join(listed)
