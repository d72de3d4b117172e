"""The camera of the view Try: frames are answered one at a time, and none is kept.

The browser sends a frame, waits for the answer, and takes the next frame then: where answers are slow, the
frames between two of them are dropped. A frame comes as plain pixels, so that no decoder reads it, and is
never written to a file. One that the user wants to keep is sent as a picture like any other.
"""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Mapping
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from duallora.app.answer_report import BELOW, live
from duallora.app.answers import answers
from duallora.app.assets import asset
from duallora.app.image_field import chosen
from duallora.app.session import Session
from duallora.app.shell import PRIVATE, sentence_of
from duallora.errors import DualLoRAError

EDGE = 256
"""Pixels of a frame's shorter side; cameras of more are asked for no more."""

_LONGEST = 4 * EDGE
_TEMPLATE = """
<div class="camera">
  <div class="camera-view">
    <video class="camera-picture" muted playsinline hidden aria-label="What the camera sees"></video>
    <div class="camera-buttons">
      <button type="button" class="camera-start">Start the camera</button>
      <button type="button" class="camera-take" hidden>Keep this picture</button>
    </div>
    <p class="camera-said" role="status">Its pictures go to this program alone, and none is kept.</p>
    <p class="camera-rate" aria-hidden="true"></p>
  </div>
  <div class="camera-answer"></div>
  <p class="camera-class unseen" role="status"></p>
</div>
"""


class Camera:
    """The part of the view; made inside ``gr.Blocks``.

    Args:
        session: the model.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._answering = threading.Lock()

        def answer_frame(frame: Any) -> dict[str, Any]:
            return self.answer(frame)

        self.part = gr.HTML(
            "",
            html_template=_TEMPLATE,
            js_on_load=asset("camera.js").replace("EDGE", str(EDGE)),
            server_functions=[answer_frame],
            elem_id="camera",
        )

    def connect(self, picture: Any) -> None:
        """A frame that is kept goes into the field of the view.

        Args:
            picture: that field.
        """
        self.part.taken(self.on_taken, self.part, picture, **PRIVATE)

    def answer(self, frame: Any) -> dict[str, Any]:
        """What the model says of a frame.

        Args:
            frame: ``width``, ``height``, ``rgb`` (base64 of height x width x 3 bytes) and ``below``, the
                familiarity below which it is unknown.

        Returns:
            ``html``, and ``name``, the class as it is read out; nothing where another frame is being
            answered, so that this one is dropped.
        """
        if not self._answering.acquire(blocking=False):
            return {}
        try:
            model = self.session.model()
            image, below = _image(frame)
            (said,) = answers(model, [model.preprocess(image)], ["camera"], 3, below)
        except Exception as error:
            return {"html": sentence_of(error), "failed": True}
        finally:
            self._answering.release()
        return {"html": live(said, below), "name": said.record["class"]}

    def on_taken(self, value: str) -> Any:
        """The file of a frame that was kept."""
        files = chosen(value)
        return files[0]["path"] if files else gr.skip()


def _image(frame: Any) -> tuple[Image.Image, float]:
    """The frame, and the familiarity below which it is unknown.

    Raises:
        DualLoRAError: it is no frame as the page sends them.
    """
    try:
        if not isinstance(frame, Mapping):
            raise ValueError
        width, height, below = int(frame["width"]), int(frame["height"]), float(frame.get("below", BELOW))
        if not (0 < width <= _LONGEST and 0 < height <= _LONGEST and 0 <= below <= 1):
            raise ValueError
        pixels = np.frombuffer(base64.b64decode(frame["rgb"], validate=True), np.uint8)
        return Image.fromarray(pixels.reshape(height, width, 3)), below
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error) as error:
        raise DualLoRAError("this is no frame of a camera; load the page again.") from error
