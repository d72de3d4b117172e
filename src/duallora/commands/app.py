"""``duallora app``: a saved model as a web page on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from duallora.commands import console
from duallora.commands.number_ranges import LARGEST_SEED, require_range
from duallora.errors import DualLoRAError
from duallora.teaching.method_choice import UNSAID, MethodChoice


def app(
    model: Path,
    *,
    port: int = 7860,
    open_: bool = False,
    no_token: bool = False,
    method: MethodChoice | None = None,
    backbone: str | None = None,
    backbone_file: Path | None = None,
    image_size: int | None = None,
    augment: str | None = None,
    seed: int | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Teach, try and look at a model on a web page, which only this machine can reach.

    Args:
        model: folder of the saved model; created by the first lesson when it does not exist
        port: of 127.0.0.1, to listen at; 0 takes a free one and says which
        open_: open the page in the browser
        no_token: ask for no token; then every account of this machine can use the page
        method: what learns
        backbone: of a new model, embedded (default) or a timm ViT by its full tag
        backbone_file: local .safetensors file with the backbone's weights, copied into the model
        image_size: of a new model, height and width of the input in pixels, where it is not that of the
            pre-training
        augment: views of the training images: crop, crop=SHARE and flip joined by a comma, or none (new
            models: crop,flip)
        seed: of initialisation, image order and augmentation (new models: 0)
        device: where to compute
    """
    require_range("--port", port, 0, 65535)
    require_range("--seed", seed, 0, LARGEST_SEED)
    _require_gradio()

    from duallora.app.server import serve
    from duallora.sharing.place import own_folder
    from duallora.teaching.model_request import ModelRequest

    request = ModelRequest(method or UNSAID, backbone, backbone_file, seed, augment, device, image_size)
    serve(own_folder(model), request, port, console.line, open_, not no_token)


def _require_gradio() -> None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise DualLoRAError("gradio is missing; it comes with `pip install 'duallora[app]'`.")
