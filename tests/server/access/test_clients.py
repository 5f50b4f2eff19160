"""The file of clients: what it may hold, who is found in it, and what errors keep to themselves."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access.clients import ClientList, Permission, load_clients
from server.errors import InvalidArgument

SECRET = "correct-horse-battery"
OTHER = "staple-staple-staple"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "clients"
    path.touch(mode=0o600)
    return path


def load(path: Path, text: str) -> ClientList:
    path.write_text(text)
    return load_clients(path)


def refusal(path: Path, text: str) -> str:
    with pytest.raises(InvalidArgument) as caught:
        load(path, text)
    return str(caught.value)


def test_tokens_hashes_and_certificates(path: Path) -> None:
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    clients = load(
        path,
        f"""
        # a comment

        alice inference {SECRET}
        ops   control,inference   sha256:{digest}
        batch control certificate:batch.internal
        """,
    )
    alice, ops = clients.by_token(SECRET), clients.by_token(OTHER)
    assert alice is not None
    assert (alice.name, alice.permissions) == ("alice", frozenset({Permission.INFERENCE}))
    assert ops is not None
    assert (ops.name, ops.permissions) == ("ops", frozenset(Permission))
    batch = clients.by_certificate(["localhost", "batch.internal"])
    assert batch is not None
    assert (batch.name, batch.permissions) == ("batch", frozenset({Permission.CONTROL}))
    assert clients.uses_certificates
    assert clients.by_token(digest) is None
    assert clients.by_token("batch.internal") is None
    assert clients.by_certificate([SECRET, "batch"]) is None


def test_a_token_is_replaced_by_way_of_two_lines(path: Path) -> None:
    clients = load(path, f"alice inference {SECRET}\nalice inference {OTHER}\n")
    for token in (SECRET, OTHER):
        client = clients.by_token(token)
        assert client is not None
        assert client.name == "alice"


@given(token=st.text(max_size=40) | st.just(SECRET))
def test_no_other_token_is_known(token: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "clients-of-property"
    path.touch(mode=0o600)
    clients = load(path, f"alice inference {SECRET}\n")
    assert (clients.by_token(token) is None) == (token != SECRET)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a file with at least one client"),
        ("# nobody\n", "a file with at least one client"),
        (f"alice {SECRET}", "line 1: got '2 columns', allowed: three"),
        (f"\nalice inference {SECRET} more", "line 2: got '4 columns', allowed: three"),
        (f"alice admin {SECRET}", "permissions: got 'admin', allowed: inference, control"),
        (f"-x inference {SECRET}", "name: got '-x', allowed: at most 64 letters"),
        ("alice inference short-secret", "token: got 'another value', allowed: a token of 16"),
        (f"alice inference {SECRET}é", "token: got 'another value'"),
        (f"alice inference sha256:{SECRET}", "token: got 'another value'"),
        ("alice inference certificate:", "token: got 'another value'"),
        (f"a inference {SECRET}\nb control {SECRET}", "line 2: got 'that of another line for b'"),
    ],
)
def test_what_is_refused(path: Path, text: str, problem: str) -> None:
    message = refusal(path, text)
    assert message.startswith("clients: ")
    assert problem in message
    assert SECRET not in message
    assert "short-secret" not in message


def test_a_file_that_is_no_text(path: Path) -> None:
    path.write_bytes(b"\xff")
    with pytest.raises(InvalidArgument, match="allowed: a text file of clients"):
        load_clients(path)


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        load_clients(path.with_name("nowhere"))


def test_a_file_that_everybody_can_read(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(path, f"alice inference {SECRET}")
    assert caplog.records == []
    path.chmod(0o644)
    load_clients(path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "chmod 600" in caplog.text
