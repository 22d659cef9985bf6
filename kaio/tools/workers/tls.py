"""The TLS context of `--cert`, `--key` and `--client-ca`.

Rules kept here: an error names the option and the file. A key with a passphrase is an error: a server that restarts by
itself has nobody to ask.
"""

from __future__ import annotations

import ssl
from typing import NoReturn

__all__ = ["TlsError", "make_tls"]


class TlsError(Exception):
    """A file that makes no TLS context. Its text names the option and the file."""


class _PassphraseNeededError(Exception):
    pass


def make_tls(cert: str | None, key: str | None, client_ca: str | None) -> ssl.SSLContext | None:
    """Make the context of a server; None without a certificate. Raises `TlsError`."""
    for option, path in (("--cert", cert), ("--key", key), ("--client-ca", client_ca)):
        if path is not None:
            _check_readable(option, path)
    if cert is None:
        for option, path in (("--key", key), ("--client-ca", client_ca)):
            if path is not None:
                raise TlsError(f"{option} {path}: needs --cert")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_chain(context, cert, key)
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError:
            raise TlsError(f"--client-ca {client_ca}: is no certificate in PEM format") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(option: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as exc:
        raise TlsError(f"{option} {path}: cannot be read: {exc.strerror}") from None


def _load_chain(context: ssl.SSLContext, cert: str, key: str | None) -> None:
    where = f"--key {key}" if key is not None else f"--cert {cert}"
    try:
        # OpenSSL reads the certificate first: alone, its mistakes are not taken for the key's.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert)
    except ssl.SSLError:
        raise TlsError(f"--cert {cert}: is no certificate in PEM format") from None
    try:
        context.load_cert_chain(cert, key, password=_refuse)
    except _PassphraseNeededError:
        raise TlsError(f"{where}: the private key has a passphrase; store it without one") from None
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise TlsError(f"{where}: the private key does not match the certificate {cert}") from None
        if exc.reason in (None, "NO_START_LINE", "PEM_LIB", "PEM lib"):
            raise TlsError(f"{where}: has no private key in PEM format") from None
        raise TlsError(f"--cert {cert}: OpenSSL refuses it: {exc.reason}") from None


def _refuse() -> NoReturn:
    raise _PassphraseNeededError
