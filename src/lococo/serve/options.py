"""Flags of `lococo serve`."""

import ipaddress
from dataclasses import dataclass

from lococo.errors import ArgumentError
from lococo.options import check_at_least_one

MIB = 1 << 20


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, whom it answers, and its limits.

    Attributes:
        host: Address to listen on; others than this machine's own need --api-keys.
        port: Port to listen on; 0 takes a free one.
        api_keys: File with one API key per line; every key has contexts and conversations of its own.
        contexts: Folder where contexts are kept; lococo's cache folder by default.
        shared: Other servers use that folder as well, perhaps over a network: its index is locked as a file is.
        contexts_mib: All contexts together take at most this many MiB on disk; those unused for longest go first.
        memory_mib: Conversations, and contexts, are kept ready in at most this many MiB of memory each.
        max_batch: Requests that are read or answered at a time.
        max_queue: Requests that wait beside them; further ones are told to come back later.
        max_body_mib: Largest body of a request, MiB.
        max_prompt_tokens: Longest prompt or document.
        max_new_tokens: Longest answer; also where a request does not say.
        timeout: Seconds after which a request is given up.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: str | None = None
    contexts: str | None = None
    shared: bool = False
    contexts_mib: int = 4096
    memory_mib: int = 1024
    max_batch: int = 16
    max_queue: int = 64
    max_body_mib: int = 64
    max_prompt_tokens: int = 1_000_000
    max_new_tokens: int = 4096
    timeout: float = 600.0

    def __post_init__(self) -> None:
        counts = ("contexts_mib", "max_batch", "max_queue", "max_body_mib", "max_prompt_tokens", "max_new_tokens")
        check_at_least_one(**{name: getattr(self, name) for name in counts})
        if not 0 <= self.port < 1 << 16:
            raise ArgumentError(f"--port must be from 0 to 65535, got {self.port}")
        if self.memory_mib < 0:
            raise ArgumentError(f"--memory-mib must be at least 0, got {self.memory_mib}")
        if not 0 < self.timeout < float("inf"):
            raise ArgumentError(f"--timeout must be a number of seconds above 0, got {self.timeout}")
        if self.api_keys is None and not is_loopback(self.host):
            raise ArgumentError(
                f"--host {self.host} can be reached by other machines, and without keys anybody may use the server; "
                "add --api-keys FILE, or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
