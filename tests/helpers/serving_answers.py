"""What goes to a server, and what a refusal looks like."""

from __future__ import annotations

import httpx

from duallora.serving.limits import Limits

LIMITS = Limits(max_body=0.5, max_pixels=1_000_000, max_images=4, queue=8, timeout=300)


def form(*pictures: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("image", (f"{i}.png", data, "image/png")) for i, data in enumerate(pictures)]


def refused(response: httpx.Response, status: int, *parts: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (sentence,) = response.json().values()
    assert list(response.json()) == ["error"]
    assert not [part for part in parts if part not in sentence], sentence
