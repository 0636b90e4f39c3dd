"""Nested dicts with names that dots join."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return {"a.b.c": leaf} of a nested dict."""
    flat = {}
    for name, child in tree.items():
        path = (*prefix, name)
        flat |= flatten(child, path) if isinstance(child, dict) else {".".join(path): child}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of {"a.b.c": leaf}, the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
