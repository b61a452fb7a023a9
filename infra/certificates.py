"""The keys by which the parts of the S3 server know one another: who has none is refused at every door but S3's own.

SeaweedFS is several servers in one process (master, volume, filer, admin), each with an HTTP and a gRPC port. They talk
to each other through these ports, and without certificates they talk to everybody: the master signs read tokens for
whoever asks and deletes the whole store on a GET that any web page can send. Signing keys do not close that, mutual TLS
does.
"""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import uuid
from pathlib import Path

from infra.private import write_secret

CA, CERTIFICATE, KEY = "ca.pem", "certificate.pem", "key.pem"
VALID = datetime.timedelta(days=3650)
RENEW_BEFORE = datetime.timedelta(days=365)  # a stack that is started today may run for long
GRPC_ROLES = ("MASTER", "VOLUME", "FILER", "S3", "ADMIN", "WORKER", "CLIENT")
HTTPS_ROLES = ("MASTER", "VOLUME", "FILER", "ADMIN", "CLIENT")


def environment(folder: Path) -> dict[str, str]:
    """What makes SeaweedFS, or its `weed shell`, use the certificates of `folder`."""
    ca, certificate, key = (str(folder / name) for name in (CA, CERTIFICATE, KEY))
    told = {"WEED_GRPC_CA": ca}
    for role in GRPC_ROLES:
        told |= {f"WEED_GRPC_{role}_CERT": certificate, f"WEED_GRPC_{role}_KEY": key}
    for role in HTTPS_ROLES:
        https = f"WEED_HTTPS_{role}"
        told |= {f"{https}_CERT": certificate, f"{https}_KEY": key, f"{https}_CA": ca, f"{https}_ENABLED": "true"}
    return told


def good(folder: Path) -> bool:
    """Whether `folder` has certificates that belong together and will not expire soon."""
    # Imported here, as below: only who starts or examines the stack pays for it.
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    try:
        certificate = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((folder / CA).read_bytes()))
        key = serialization.load_pem_private_key((folder / KEY).read_bytes(), password=None)
    except (OSError, ValueError, TypeError, InvalidSignature):
        return False
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return key.public_key() == certificate.public_key() and left > RENEW_BEFORE


def ensure(folder: Path) -> None:
    """Makes certificates in `folder`, with an authority of their own, unless there are good ones."""
    if good(folder):
        return
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    shutil.rmtree(folder, ignore_errors=True)
    now = datetime.datetime.now(datetime.UTC)
    # The key of the authority is forgotten when this function returns: nobody can ever sign a third certificate.
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    stack = uuid.uuid4().hex[:12]

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Figment {text} {stack}")])

    def builder(subject: str, public: ec.EllipticCurvePublicKey, is_ca: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("authority"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))  # the clock of the machine may be set back
            .not_valid_after(now + VALID)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
        )

    ca = builder("authority", ca_key.public_key(), is_ca=True).sign(ca_key, hashes.SHA256())
    certificate = (
        builder("S3 server", key.public_key(), is_ca=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]),
            critical=False,
        )
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_secret(folder / KEY, private.decode())
    write_secret(folder / CA, ca.public_bytes(pem).decode())
    write_secret(folder / CERTIFICATE, certificate.public_bytes(pem).decode())
