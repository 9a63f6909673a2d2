"""What a server is started with, and the limits that it keeps to."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ..errors import UsageError

BODY_LIMIT_BYTES = 24 << 20  # of one request
BODIES_LIMIT_BYTES = 192 << 20  # of all requests that are read, waiting or drawn
BODY_SECONDS = 30.0  # until a body must have arrived
HEAD_SECONDS = 15.0  # until the head of a request must have arrived
CONNECTIONS_LIMIT = 512
PROMPT_LIMIT_CHARACTERS = 32_000
IMAGES_LIMIT = 10  # images of one request
SIDE_LIMIT_PIXELS = 2048  # of an image that is sent back
SIDE_LEAST_PIXELS = 16
PARTIALS_LIMIT, PARTIALS = 16, 3  # previews of a streamed image: the most, and the default
ANSWER_TOKENS = 256  # of an answer, unless a request says so
FILES_LIMIT, FILES_LIMIT_BYTES, FILES_SECONDS = 512, 256 << 20, 3600.0  # images that are sent as addresses
ALIVE_SECONDS = 10.0  # between two signs of life on a stream where nothing happens
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a server listens, whom it lets in, how much it takes on and what it logs.

    `queue` is the most images and answers that wait, `images` the most that are drawn together. A request
    that is not done after `deadline_s` is given up, and so is what is drawn `grace_s` after the server was
    asked to stop. Raises UsageError for a host beyond loopback without an `api_key`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    queue: int = 64
    images: int = 8
    deadline_s: float = 600.0
    grace_s: float = 30.0
    log_json: bool = False
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.loopback and self.api_key is None:
            raise UsageError(
                "A server that others can reach needs a key",
                where=f"host: expected {', '.join(LOOPBACK)} without a key, got {self.host!r}",
                fix="write a key into a file, and give it with --api-key-file",
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
