"""The server's name in a request's Host header.

A page of another site can lead its own name to this machine, so a name is not looked up.
"""

from __future__ import annotations

import ipaddress


def host_name(host: str) -> str:
    """Return the name or address in a Host header, which may have a port after it."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def names_this_machine(name: str) -> bool:
    """Return whether a name or an address can lead to nothing but this machine."""
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
