"""``duallora serve``: a saved model behind an address."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from duallora.commands import console
from duallora.commands.number_ranges import require_range
from duallora.errors import DualLoRAError
from duallora.serving.limits import Limits

_GRACE = 5  # seconds that requests get to end when the server is asked to
_NEEDED = ("fastapi", "uvicorn", "python_multipart")


def serve(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | None = None,
    limits: Limits = Limits(),
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32",
) -> None:
    """Answer requests with images over HTTP; a new state of the model is picked up, none can be taught.

    Args:
        model: folder of the saved model, or hf:OWNER/NAME
        host: address to listen at; any but this machine's own needs --token-file
        port: to listen at; 0 takes a free one and says which
        token_file: file with the token that requests have to carry
        limits: what a request may ask
        device: where to compute
        precision: of the backbone; beside 32, an answer may depend on the other images of its batch
    """
    require_range("--port", port, 0, 65535)
    _require_libraries()

    from duallora.serving.guard import is_local, read_token

    token = None if token_file is None else read_token(token_file)
    if token is None and not is_local(host):
        raise DualLoRAError(
            f"--host {host} can be reached from other machines; give --token-file as well, or listen at "
            "127.0.0.1."
        )

    import uvicorn

    from duallora.runtime.compute import Compute
    from duallora.runtime.ending import LastMoment, Terminated, watched
    from duallora.serving.app import create_app
    from duallora.serving.json_protocol import JsonProtocol
    from duallora.serving.listening import listening
    from duallora.serving.model_watch import ModelWatch
    from duallora.sharing.local import local_folder

    machine = Compute(device, precision=precision).start()
    folder = local_folder(model)
    with listening(host, port) as listener:
        watch = ModelWatch(folder, machine, lambda text: console.line(f"duallora: {text}", stderr=True))
        app = create_app(watch, limits, token, local=token is None)
        address, number = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        console.line(f"serving {model} at http://{shown}:{number} (what it takes: /docs); Ctrl-C ends it")
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=min(int(limits.timeout) + 1, _GRACE),
            http=JsonProtocol,
        )
        with suppress(Terminated):  # asked for, and done
            watched(uvicorn.Server(config), LastMoment()).run(sockets=[listener])


def _require_libraries() -> None:
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        name = missing[0].replace("_", "-")
        raise DualLoRAError(f"{name} is missing; it comes with `pip install 'duallora[serve]'`.")
