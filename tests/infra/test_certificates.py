"""Each stack has keys of its own, made once, made again when they expire or are damaged."""

from __future__ import annotations

import datetime
import stat

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from infra import certificates
from infra.certificates import CA, CERTIFICATE, KEY, ensure, good


def test_they_are_made_once_and_for_this_user_alone(tmp_path):
    keys = tmp_path / "tls"
    assert not good(keys)
    ensure(keys)
    assert good(keys)
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in keys.iterdir()} == {
        CA: 0o600,
        CERTIFICATE: 0o600,
        KEY: 0o600,
    }
    before = {path.name: path.read_bytes() for path in keys.iterdir()}
    ensure(keys)
    assert {path.name: path.read_bytes() for path in keys.iterdir()} == before
    assert set(certificates.environment(keys).values()) == {*(str(path) for path in keys.iterdir()), "true"}


def test_they_are_made_again_before_they_expire(tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "VALID", certificates.RENEW_BEFORE - datetime.timedelta(days=1))
    ensure(tmp_path / "tls")
    assert not good(tmp_path / "tls")
    monkeypatch.undo()
    ensure(tmp_path / "tls")
    assert good(tmp_path / "tls")


@pytest.mark.parametrize("name", [CA, CERTIFICATE, KEY])
@pytest.mark.parametrize("damage", ["lost", "empty", "cut"])
def test_they_are_made_again_when_one_is_damaged(tmp_path, name, damage):
    keys = tmp_path / "tls"
    ensure(keys)
    path = keys / name
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 60 if damage == "cut" else 0])
    assert not good(keys)
    ensure(keys)
    assert good(keys)


def test_the_keys_of_one_stack_open_no_other(tmp_path):
    ensure(tmp_path / "one")
    ensure(tmp_path / "two")
    certificate = x509.load_pem_x509_certificate((tmp_path / "one" / CERTIFICATE).read_bytes())
    other = x509.load_pem_x509_certificate((tmp_path / "two" / CA).read_bytes())
    with pytest.raises((ValueError, InvalidSignature)):
        certificate.verify_directly_issued_by(other)
