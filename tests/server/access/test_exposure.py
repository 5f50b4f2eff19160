"""Addresses on which the server may listen without protection."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.access.exposure import allows_anonymous_control, check_exposure, is_loopback
from server.config import load_settings
from server.errors import InvalidArgument

TLS = "TLS (tls_certificate, tls_key) or allow_plaintext"
CLIENTS = "known clients (clients or tls_client_ca) or allow_anonymous"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    check_exposure(load_settings({"host": host}))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no.such.host.invalid"])
def test_beyond(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(InvalidArgument) as caught:
        check_exposure(load_settings({"host": host}))
    assert str(caught.value) == (
        f"host: got '{host}', allowed: a loopback address such as 127.0.0.1; others with "
        f"{TLS}, and {CLIENTS}"
    )


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ([], [TLS, CLIENTS]),
        (["clients"], [TLS]),
        (["allow_anonymous"], [TLS]),
        (["allow_plaintext"], [CLIENTS]),
        (["tls_certificate", "tls_key"], [CLIENTS]),
        (["tls_certificate", "tls_key", "clients"], []),
        (["tls_certificate", "tls_key", "tls_client_ca"], []),
        (["tls_certificate", "tls_key", "allow_anonymous"], []),
        (["allow_plaintext", "clients"], []),
        (["allow_plaintext", "allow_anonymous"], []),
    ],
)
def test_what_protects(given: list[str], missing: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    values = {name: "true" if name.startswith("allow") else str(file) for name in given}
    settings = load_settings({"host": "0.0.0.0", **values})
    if not missing:
        check_exposure(settings)
        return
    with pytest.raises(InvalidArgument) as caught:
        check_exposure(settings)
    assert [part in str(caught.value) for part in (TLS, CLIENTS)] == [
        part in missing for part in (TLS, CLIENTS)
    ]


@pytest.mark.parametrize(
    ("setting", "host", "allowed"),
    [
        ({}, "127.0.0.1", True),
        ({}, "0.0.0.0", False),
        ({"anonymous_control": "loopback"}, "::1", True),
        ({"anonymous_control": "always"}, "0.0.0.0", True),
        ({"anonymous_control": "never"}, "127.0.0.1", False),
    ],
)
def test_who_may_operate_without_being_known(
    setting: dict[str, str], host: str, allowed: bool
) -> None:
    settings = load_settings({"host": host, **setting})
    assert allows_anonymous_control(settings) is allowed
