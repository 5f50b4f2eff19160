"""Addresses on which the server may listen without protection."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.access.exposure import (
    allows_anonymous_control,
    check_exposure,
    is_loopback,
    page_prompts_problem,
)
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


@pytest.mark.parametrize(
    ("page_prompts", "metrics_host", "problem"),
    [
        ("loopback", "127.0.0.1", ""),
        ("loopback", "0.0.0.0", "other machines can reach this page"),
        ("always", "0.0.0.0", ""),
        ("never", "127.0.0.1", "page_prompts is never"),
    ],
)
def test_where_the_page_runs_prompts(page_prompts: str, metrics_host: str, problem: str) -> None:
    settings = load_settings({"page_prompts": page_prompts, "metrics_host": metrics_host})
    found = page_prompts_problem(settings)
    assert problem in found
    assert bool(found) == bool(problem)


def test_the_page_asks_for_no_certificate(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    names = "tls_certificate", "tls_key", "tls_client_ca", "clients"
    settings = load_settings(dict.fromkeys(names, str(file)))
    assert "certificates (tls_client_ca)" in page_prompts_problem(settings)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ([], ["allow_plaintext, because it has no TLS", "known clients (clients)"]),
        (["allow_plaintext"], ["known clients (clients)"]),
        (["allow_anonymous"], ["allow_plaintext, because it has no TLS"]),
        (["allow_plaintext", "allow_anonymous"], []),
        (["allow_plaintext", "clients"], []),
    ],
)
def test_prompts_from_other_machines(given: list[str], missing: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    values = {name: "true" if name.startswith("allow") else str(file) for name in given}
    beyond = {"page_prompts": "always", "metrics_host": "0.0.0.0"}
    settings = load_settings({**beyond, **values})
    if not missing:
        check_exposure(settings)
        return
    with pytest.raises(InvalidArgument, match="page_prompts: got 'always'") as caught:
        check_exposure(settings)
    assert all(part in str(caught.value) for part in missing)
