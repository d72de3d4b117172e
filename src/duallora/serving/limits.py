"""What a server takes on, and the answers to what it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from duallora.errors import DualLoRAError

MEGABYTE = 1_000_000


class Refused(Exception):
    """A request that is not answered with predictions.

    Attributes:
        status: of HTTP.
        sentence: what is wrong and what to do about it.
        headers: of the response.
    """

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, dict(headers or {})


@dataclass(frozen=True)
class Limits:
    """Limits of the server.

    Attributes:
        max_body: largest request, in MB
        max_pixels: most pixels of an image; a larger one is refused before it is decoded
        max_images: most images of a request
        queue: requests that are worked on or wait at a time; further ones are told to come again (429)
        timeout: seconds after which a request is given up (503)
    """

    max_body: float = 32.0
    max_pixels: int = 64_000_000
    max_images: int = 64
    queue: int = 128
    timeout: float = 30.0

    def __post_init__(self) -> None:
        """Refuses limits that nothing fits.

        Raises:
            DualLoRAError: naming the option.
        """
        for name in ("max_body", "max_pixels", "max_images", "queue", "timeout"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                option = f"--{name.replace('_', '-')}"
                raise DualLoRAError(f"{option} must be more than 0 and finite, not {value}.")

    @property
    def body_bytes(self) -> int:
        """Largest request in bytes."""
        return int(self.max_body * MEGABYTE)

    def body_refused(self) -> Refused:
        """The answer to a request that is too large."""
        return Refused(413, f"the request is larger than {self.max_body:g} MB; send smaller or fewer images.")

    def images_refused(self) -> Refused:
        """The answer to a request with too many images."""
        return Refused(413, f"the request has more than {self.max_images} images; send several requests.")

    def time_refused(self) -> Refused:
        """The answer to a request that took too long."""
        return Refused(
            503,
            f"the request took longer than {self.timeout:g} s; try again later, or send fewer images.",
            {"Retry-After": "5"},
        )


@dataclass
class Admission:
    """Counts the requests that are worked on or wait; used by the event loop alone.

    Attributes:
        most: how many there may be.
        busy: how many there are.
    """

    most: int
    busy: int = field(default=0, init=False)

    def enter(self) -> None:
        """Admits a request; :meth:`leave` ends it.

        Raises:
            Refused: there are too many already.
        """
        if self.busy >= self.most:
            raise Refused(
                429, f"{self.busy} requests are waiting already; try again in a second.", {"Retry-After": "1"}
            )
        self.busy += 1

    def leave(self) -> None:
        """One request has ended, with all that was done for it."""
        self.busy -= 1
