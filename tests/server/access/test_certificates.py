"""Certificates as files: what is refused, and under which setting's name."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import pytest

from server.access.certificates import CertificateFiles
from server.errors import InvalidArgument
from tests.server.access.authority import DAY, Authority


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    authority = Authority()
    certificate, key = authority.issue("server").write(tmp_path, "server")
    client_ca = tmp_path / "ca.crt"
    client_ca.write_bytes(authority.pem)
    return CertificateFiles(certificate, key, client_ca)


def refusal(files: CertificateFiles) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        files.load()
    return caught.value


def test_what_is_right_is_read(files: CertificateFiles) -> None:
    assert files.client_ca is not None
    certificates = files.load()
    assert certificates.chain == files.certificate.read_bytes()
    assert certificates.key == files.key.read_bytes()
    assert certificates.client_ca == files.client_ca.read_bytes()
    assert DAY / 2 < certificates.expires - datetime.datetime.now(datetime.UTC) <= DAY


def test_the_key_of_another_certificate(files: CertificateFiles, tmp_path: Path) -> None:
    _, key = Authority().issue("other").write(tmp_path, "other")
    error = refusal(CertificateFiles(files.certificate, key))
    assert (error.field, error.allowed) == (
        "tls_key",
        f"the key of the certificate in {files.certificate}",
    )


def test_a_key_with_a_password(files: CertificateFiles, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", files.key, "-out", locked, "-passout", "pass:x"],
        check=True,
        capture_output=True,
    )
    error = refusal(CertificateFiles(files.certificate, locked))
    assert (error.field, error.allowed) == ("tls_key", "a private key in PEM without a password")


def test_an_expired_certificate(tmp_path: Path) -> None:
    issued = Authority().issue("server", lasts=datetime.timedelta(seconds=-1))
    error = refusal(CertificateFiles(*issued.write(tmp_path, "expired")))
    assert error.field == "tls_certificate"
    assert error.allowed.startswith("one valid now; it is from 20")


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
@pytest.mark.parametrize("setting", ["tls_certificate", "tls_key", "tls_client_ca"])
def test_junk(files: CertificateFiles, setting: str, content: bytes) -> None:
    path = getattr(files, setting.removeprefix("tls_"))
    path.write_bytes(content)
    error = refusal(files)
    assert (error.field, error.value) == (setting, str(path))


@pytest.mark.parametrize("setting", ["tls_certificate", "tls_key", "tls_client_ca"])
def test_a_file_that_is_gone(files: CertificateFiles, setting: str) -> None:
    getattr(files, setting.removeprefix("tls_")).unlink()
    assert str(refusal(files)).startswith(f"{setting}: got ")


def test_a_key_that_everybody_can_read(
    files: CertificateFiles, caplog: pytest.LogCaptureFixture
) -> None:
    files.load()
    assert caplog.records == []
    files.key.chmod(0o644)
    files.load()
    assert "chmod 600" in caplog.text
