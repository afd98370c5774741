"""Signatures over a bundle: OpenSSF model-signing with a key pair, an optional extra."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from rprune.errors import InputError, UsageError, first_line

SIGNATURE = "model.sig"


def sign(folder: Path, key: Path, password: str | None = None) -> Path:
    """Sign every file of a bundle by an elliptic-curve key (PEM); the signature lies beside them.

    The file is a Sigstore bundle of an in-toto statement with the sha256 of all files, as OpenSSF model-signing
    writes it, so that its own command checks it, too.

    Raises:
        UsageError: the extra is not installed.
        InputError: the key cannot be read.
    """
    signing, _ = _modules()
    folder = folder.resolve()
    path = folder / SIGNATURE
    secret = None if password is None else password.encode()  # it says str, and hands on what it is given
    temporary = folder.parent / f".{folder.name}.{SIGNATURE}"
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=_readable(key), password=secret)
        config.set_hashing_config(_hashing(path)).sign(folder, temporary)
    except (ValueError, TypeError) as error:
        raise InputError(f"cannot sign with {key}: {first_line(error)}", "give an elliptic-curve key in PEM") from None
    temporary.replace(path)
    return path


def check_signature(folder: Path, key: Path) -> tuple[bool, str]:
    """Whether the bundle is signed by the owner of a public key (PEM), with no file more, less or other.

    Raises UsageError, InputError as :func:`sign`.
    """
    _, verifying = _modules()
    folder = folder.resolve()
    path = folder / SIGNATURE
    if not path.is_file():
        return False, f"there is no {SIGNATURE}"
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=_readable(key))
    except ValueError as error:
        raise InputError(f"cannot read {key}: {first_line(error)}", "give a public elliptic-curve key in PEM") from None
    try:
        config.set_hashing_config(_hashing(path)).verify(folder, path)
    except Exception as error:  # whatever a stranger's signature can cause
        return False, f"{SIGNATURE}: {first_line(error).partition(': Expected')[0]}"
    return True, f"all files are signed by the key of {key.name}"


def _hashing(signature: Path) -> Any:
    hashing = importlib.import_module("model_signing.hashing")
    return hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)


def _modules() -> tuple[Any, Any]:
    try:
        return importlib.import_module("model_signing.signing"), importlib.import_module("model_signing.verifying")
    except ImportError:
        raise UsageError("signatures need OpenSSF model-signing", "pip install 'rprune[sign]'") from None


def _readable(key: Path) -> Path:
    if not key.is_file():
        raise InputError(f"there is no key {key}", "make one: openssl ecparam -name prime256v1 -genkey -noout -out KEY")
    return key
