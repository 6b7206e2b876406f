from __future__ import annotations

import base64
import datetime
import ssl
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tandem.cluster import kubeconfig
from tandem.cluster.pki import Authority, create_service_account_keys

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path, "test", NOW)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_client_is_a_user_with_groups(authority: Authority) -> None:
    pair = authority.issue("n", "system:node:n", NOW, organizations=["system:nodes"])
    certificate = load(pair.certificate)
    subject = certificate.subject
    assert [a.value for a in subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [
        "system:node:n"
    ]
    names = subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    assert [a.value for a in names] == ["system:nodes"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate.verify_directly_issued_by(load(authority.path))
    assert pair.key.stat().st_mode & 0o777 == 0o600


def test_a_server_has_its_addresses(authority: Authority) -> None:
    pair = authority.issue("s", "s", NOW, hosts=["127.65.0.1", "localhost"])
    names = load(pair.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert [str(ip) for ip in names.value.get_values_for_type(x509.IPAddress)] == ["127.65.0.1"]
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)


def test_the_authoritys_key_is_nowhere_on_disk(authority: Authority, tmp_path: Path) -> None:
    authority.issue("n", "n", NOW)
    ours = authority.key.public_key().public_numbers()
    for path in tmp_path.glob("*.key"):
        key = load_pem_private_key(path.read_bytes(), None)
        assert key.public_key().public_numbers() != ours  # type: ignore[union-attr]


def test_service_account_keys_belong_together(tmp_path: Path) -> None:
    private, public = create_service_account_keys(tmp_path)
    key = load_pem_private_key(private.read_bytes(), None)
    assert key.public_key() == load_pem_public_key(public.read_bytes())
    assert private.stat().st_mode & 0o777 == 0o600


def test_a_kubeconfig_holds_everything(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("admin", "admin", NOW)
    path = kubeconfig.write(
        tmp_path / "kubeconfig", cluster="c", server="https://x", ca=authority.path, client=pair
    )
    assert path.stat().st_mode & 0o777 == 0o600
    document = yaml.safe_load(path.read_text())
    assert document["current-context"] == "c"
    assert document["clusters"][0]["cluster"]["server"] == "https://x"
    user = document["users"][0]["user"]
    assert base64.b64decode(user["client-key-data"]) == pair.key.read_bytes()
