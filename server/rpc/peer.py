"""Addresses of callers."""

from __future__ import annotations

from urllib.parse import unquote


def peer_address(peer: str) -> str:
    """Return gRPC's name of a peer, such as ``ipv6:%5B::1%5D:4711``, as ``[::1]:4711``."""
    scheme, colon, address = peer.partition(":")
    return unquote(address) if colon and scheme in ("ipv4", "ipv6") else unquote(peer)


def host_of(address: str) -> str:
    """Return the address of :func:`peer_address` without the port."""
    host, colon, port = address.rpartition(":")
    return host.strip("[]") if colon and port.isdigit() else address
