"""The ``fathom`` command as a client that has to identify itself."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from bench.report import Report
from server.rpc.access import AccessFiles
from tests.fathom_command import fathom
from tests.server.access.authority import Authority
from tests.server.rpc.credentials import (
    ALICE,
    CLIENTS,
    NOBODY,
    OPS,
    Deployed,
    written,
)
from tests.server.rpc.secured import secured


async def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command beside the server, which has this thread."""
    return await asyncio.to_thread(fathom, *arguments, **variables)


async def test_the_command(deployed: Deployed, tmp_path: Path) -> None:
    text = f"{CLIENTS}batch inference certificate:batch.internal\n"
    files = AccessFiles(deployed.mutual.certificates, written(tmp_path / "clients", text))
    ca = tmp_path / "ca.crt"
    ca.write_bytes(deployed.authority.pem)
    certificate, key = deployed.client_authority.issue("batch.internal").write(tmp_path, "batch")
    token_file = written(tmp_path / "token", f"{ALICE}\n")
    async with secured(files) as server:
        base = {"FATHOM_ADDRESS": server.address, "FATHOM_TLS_CA": str(ca)}
        mutual = {
            **base,
            "FATHOM_CLIENT_CERTIFICATE": str(certificate),
            "FATHOM_CLIENT_KEY": str(key),
        }
        asked = "generate", "Once", "--max-tokens", "3"
        results = await asyncio.gather(
            run("health", **mutual),
            run("model", "--token-file", token_file, **mutual),
            run(*asked, FATHOM_TOKEN=ALICE, **mutual),
            run(*asked, **mutual),
            run(*asked, FATHOM_TOKEN=OPS, **mutual),
            run(*asked, FATHOM_TOKEN=NOBODY, **mutual),
            run(*asked, **base),
        )
        assert [result.returncode for result in results] == [0, 0, 0, 0, 1, 1, 1], results
        assert results[0].stdout == "SERVING\n"
        assert "toy: ToyForCausalLM" in results[1].stdout
        assert results[2].stdout == results[3].stdout
        assert [result.stderr.split(":")[1].strip() for result in results[4:]] == [
            "PERMISSION_DENIED",
            "UNAUTHENTICATED",
            "UNAVAILABLE",
        ]


async def test_a_benchmark(deployed: Deployed, tmp_path: Path) -> None:
    files = AccessFiles(deployed.tls.certificates, written(tmp_path / "clients", CLIENTS))
    ca = tmp_path / "ca.crt"
    ca.write_bytes(deployed.authority.pem)
    async with secured(files) as server:
        asked = (
            *("bench", "throughput", "--address", server.address, "--tls-ca", ca),
            *("--streams", "2", "--rounds", "1", "--depths", "4", "--output-tokens", "4"),
            *("--output", tmp_path / "out"),
        )
        refused = await run(*asked)
        assert (refused.returncode, "UNAUTHENTICATED" in refused.stderr) == (1, True)
        result = await run(*asked, FATHOM_TOKEN=ALICE)
        assert result.returncode == 0, result.stderr
    report = Report.model_validate_json((tmp_path / "out" / "throughput.json").read_text())
    assert [row["depth"] for row in report.summary] == [8, 4]
    assert {row["num_tokens"] for row in report.rounds} == {8}
    assert ALICE not in report.model_dump_json()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--client-key", "x"], "--client-certificate and --client-key need each other"),
        (["--tls-ca", "/no/such/file"], "--tls-ca: /no/such/file: No such file or directory"),
        (["--token-file", "/no/such/file"], "--token-file: /no/such/file: No such file"),
    ],
)
async def test_what_the_command_refuses(arguments: list[str], problem: str) -> None:
    result = await run("health", *arguments)
    assert result.returncode == 2
    assert problem in " ".join(result.stderr.replace("│", " ").split())


async def test_a_handshake_that_fails_is_told(deployed: Deployed, tmp_path: Path) -> None:
    ca = tmp_path / "other.crt"
    ca.write_bytes(Authority("other").pem)
    async with secured(deployed.tls) as server:
        result = await run("health", "--address", server.address, "--tls-ca", ca)
    assert result.returncode == 1
    assert f"the TLS handshake with {server.address} failed" in result.stderr
    assert "CERTIFICATE_VERIFY_FAILED" in result.stderr
