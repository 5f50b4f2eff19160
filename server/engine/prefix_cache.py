"""Salts of the prefix cache, which keep apart requests that must not share entries."""

from __future__ import annotations

import hashlib
import json
import secrets

from server.engine.base import CacheNamespace, LayerSelection


def cache_salt(
    layers: LayerSelection, namespace: CacheNamespace | None, client_salt: str = ""
) -> str:
    """Return the salt of a request's entries in the prefix cache.

    Keys and values depend on the layers that made them, and on what stood in for the others;
    where none is skipped, nothing does. Where prompt and generated tokens skip
    different layers, they also depend on where the prompt ended, which the cache does not know:
    such a request shares entries with no other, and neither does one without a namespace. Its salt
    is made unique by a random number, not by anything that the client sends. ``client_salt``, which
    the client may choose, splits a namespace and never joins two.

    A salt is the hash of a list, so that no text of a client can imitate another kind of salt.
    """
    content: list[object]
    if namespace is None or layers.prefill_skips != layers.decode_skips:
        content = ["alone", secrets.token_hex(16)]
    else:
        content = ["shared", namespace.kind, namespace.name, layers.prefill_skips]
        if layers.prefill_skips:
            content.append(layers.repair)
        if client_salt:
            content.append(["salt", client_salt])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
