"""Keys for a development federation: a CA of its own, the server's certificate, and an ECDSA key a node.

    ca.crt, ca.key            the CA; ca.crt goes to every machine, ca.key signs and is not needed to run
    server.pem, server.key    the server's certificate for its names and addresses (SAN), and its key
    node-0, node-0.pub, ...   each node's key, and what the server registers

Private keys can be read by their owner alone. Whoever has a real CA uses its files under these names.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509  # pyright: ignore[reportMissingImports]
from cryptography.hazmat.primitives import hashes, serialization  # pyright: ignore[reportMissingImports]
from cryptography.hazmat.primitives.asymmetric import ec  # pyright: ignore[reportMissingImports]
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID  # pyright: ignore[reportMissingImports]

from fedprior.records import write_private

ALWAYS = ("localhost", "127.0.0.1")  # the SuperLink's own processes connect to it there


def write(folder: Path, hosts: Sequence[str], nodes: int, days: int) -> None:
    """All files, into a new folder.

    Args:
        folder: new, or empty.
        hosts: names and addresses under which nodes reach the server, besides this machine's own.
        nodes: how many keys.
        days: that the certificates are valid.

    Raises:
        FileExistsError: if the folder holds anything.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: keys are never overwritten, choose another folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = _name("fedprior development CA")
    authority = _signed(_certificate(issuer, issuer, ca, days, _CA), ca)
    names = x509.SubjectAlternativeName([_host(name) for name in dict.fromkeys([*ALWAYS, *hosts])])
    usage = [(names, False), (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False), *_END]
    usage += [(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key()), False)]
    certificate = _signed(_certificate(_name("fedprior server"), issuer, server, days, usage), ca)
    _private(folder / "ca.key", ca, serialization.PrivateFormat.PKCS8)
    _private(folder / "server.key", server, serialization.PrivateFormat.PKCS8)
    (folder / "ca.crt").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    for node in range(nodes):
        node_key(folder / f"node-{node}")


def node_key(path: Path) -> None:
    """A node's private key at `path`, and its public key beside it, as ssh-keygen would write them."""
    key = ec.generate_private_key(ec.SECP384R1())
    _private(path, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public + b"\n")


def _usage(signs: bool) -> x509.KeyUsage:
    """A CA signs certificates, a server signs handshakes."""
    return x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False)


_CA = [(x509.BasicConstraints(ca=True, path_length=0), True), (_usage(True), True)]
_END = [(x509.BasicConstraints(ca=False, path_length=None), True), (_usage(False), True)]


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    extensions: Iterable[tuple[x509.ExtensionType, bool]],
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
    builder = builder.not_valid_after(now + datetime.timedelta(days=days))
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder


def _signed(builder: x509.CertificateBuilder, ca: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    return builder.sign(ca, hashes.SHA384())


def _private(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    write_private(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
