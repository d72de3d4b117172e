"""HTTP below the application: what is no request is answered in the form of every other error."""

from __future__ import annotations

import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class JsonProtocol(H11Protocol):
    """uvicorn's HTTP, which answers a malformed request with one JSON document instead of plain text."""

    def send_400_response(self, msg: str) -> None:
        """Says what is wrong and closes the connection."""
        body = json.dumps({"error": f"{msg.rstrip('.')}; send HTTP/1.1."}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
