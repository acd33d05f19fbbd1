"""The flags of the engine `vllm`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class ServerRequest:
    """A running server of vLLM.

    Attributes:
        url: without the path of an interface.
        folder: where it writes hidden states, as this machine sees it.
    """

    url: str
    folder: Path

    @property
    def port(self) -> int:
        """The port of the URL."""
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)


def add_flags(own: argparse._ArgumentGroup) -> None:
    """Add the engine's own flags."""
    own.add_argument(
        "--url",
        metavar="URL",
        help="a running server, such as http://localhost:8000 (default: vLLM in this process, where it is installed); "
        "--dry-run prints the command that starts it",
    )
    own.add_argument(
        "--hidden-states",
        metavar="DIR",
        help="the folder in which the server writes hidden states, as this machine sees it",
    )


def server_request(given: argparse.Namespace) -> ServerRequest | None:
    """Read the flags; None without a server.

    Raises:
        ValueError: one is missing, wrong, or of another engine.
    """
    url, folder = given.url, given.hidden_states
    named = [flag for flag, value in (("--url", url), ("--hidden-states", folder)) if value is not None]
    if given.engine != "vllm":
        if named:
            raise ValueError(f"{named[0]}: is for --engine vllm; leave it out with --engine {given.engine}")
        return None
    if given.device_map != "auto":
        raise ValueError(
            f"--device-map {given.device_map}: leave it out: with --engine vllm the layout is that of vLLM's own flags"
        )
    if len(named) == 1:
        other = (
            "--hidden-states, the folder of its files" if url is not None else "--url, the server's address"
        )
        raise ValueError(f"{named[0]}: give {other}, too; both are of one running server")
    if url is None:
        return None
    parts = urlsplit(url)
    try:
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_sound = False
    if not is_sound or parts.query or parts.fragment:
        raise ValueError(f"--url {url}: is no address of a server; give one such as http://localhost:8000")
    if not Path(folder).is_dir():
        raise ValueError(
            f"--hidden-states {folder}: there is no such folder here; give the server's shared_storage_path, as this "
            "machine sees it"
        )
    return ServerRequest(url.rstrip("/").removesuffix("/v1"), Path(folder))
