"""API keys: who a client is. Only their digests are kept, and compared in constant time."""

import hashlib
import hmac
from pathlib import Path

from lococo.errors import ArgumentError, DocumentError
from lococo.serve.failures import ApiError

LEAST_LENGTH = 16
LOCAL = "local"  # the one tenant of a server without keys


class Keys:
    """The keys that are known; every one of them is a tenant.

    Args:
        keys: As they are in the file.
    """

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @staticmethod
    def read(path: Path) -> "Keys":
        """Read a file with one key per line; blank lines and those that begin with # say nothing.

        Raises:
            ArgumentError: If it has no keys, or one that could be guessed.
            DocumentError: If there is no such file.
        """
        try:
            lines = path.read_text("utf-8").splitlines()
        except FileNotFoundError:
            raise DocumentError(f"{path}: no such file; expected one API key per line") from None
        except UnicodeDecodeError:
            raise DocumentError(f"{path} is not UTF-8; expected one API key per line") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise ArgumentError(f"{path} has no API keys; write one per line, such as `openssl rand -hex 32` makes")
        short = [number for number, key in enumerate(keys, 1) if len(key) < LEAST_LENGTH]
        if short:
            raise ArgumentError(f"{path}: key {short[0]} has fewer than {LEAST_LENGTH} characters; make it longer")
        return Keys(keys)

    def tenant(self, authorization: str) -> str:
        """Return whose key an Authorization header carries.

        Raises:
            ApiError: 401 if it carries none, or one that is not known.
        """
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip().encode("latin-1", "replace"))
        # All are compared, whichever fits: how long this takes tells nothing.
        matches = [digest for digest in self._digests if hmac.compare_digest(digest, given)]
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(
                401, "expected the header `Authorization: Bearer KEY` with a key of this server", code="invalid_api_key"
            )
        return matches[0].hex()[:16]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(b"lococo tenant\0" + key).digest()
