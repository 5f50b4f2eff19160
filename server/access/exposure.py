"""The check that no address beyond this machine is served without protection."""

from __future__ import annotations

import ipaddress
import socket

from server.config import Settings
from server.errors import InvalidArgument


def check_exposure(settings: Settings) -> None:
    """Raise :class:`InvalidArgument` if other machines could call without TLS or as anybody.

    ``allow_plaintext`` and ``allow_anonymous`` permit that. The same holds for the page on the
    port of the metrics, where it runs prompts.
    """
    if settings.page_prompts == "always" and not is_loopback(settings.metrics_host):
        _check_page(settings)
    if is_loopback(settings.host):
        return
    missing = []
    if settings.tls_certificate is None and not settings.allow_plaintext:
        missing.append("TLS (tls_certificate, tls_key) or allow_plaintext")
    is_anonymous = settings.clients is None and settings.tls_client_ca is None
    if is_anonymous and not settings.allow_anonymous:
        missing.append("known clients (clients or tls_client_ca) or allow_anonymous")
    if missing:
        allowed = f"a loopback address such as 127.0.0.1; others with {', and '.join(missing)}"
        raise InvalidArgument("host", settings.host, allowed)


def _check_page(settings: Settings) -> None:
    missing = [] if settings.allow_plaintext else ["allow_plaintext, because it has no TLS"]
    if settings.clients is None and not settings.allow_anonymous:
        missing.append("known clients (clients) or allow_anonymous")
    if missing:
        allowed = f"loopback or never; always beyond this machine takes {', and '.join(missing)}"
        raise InvalidArgument("page_prompts", settings.page_prompts, allowed)


def allows_anonymous_control(settings: Settings) -> bool:
    """Return whether callers that are not known may operate the server.

    What counts is where it listens, not where a call comes from: behind a proxy on the same
    machine, every call comes from there.
    """
    match settings.anonymous_control:
        case "always":
            return True
        case "never":
            return False
        case "loopback":
            return is_loopback(settings.host)


def page_prompts_problem(settings: Settings) -> str:
    """Return why the page on the port of the metrics runs no prompts; empty if it does."""
    match settings.page_prompts:
        case "never":
            return "prompts are off: page_prompts is never"
        case "loopback" if not is_loopback(settings.metrics_host):
            return (
                "prompts are off: other machines can reach this page, and page_prompts is loopback"
            )
        case _ if settings.tls_client_ca is not None:
            return (
                "prompts are off: clients need certificates (tls_client_ca), and this page asks "
                "for none"
            )
        case _:
            return ""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``; False for an unknown name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found)
