"""The process that decodes images of strangers: ``python -m duallora.data.decoder_process BYTES``.

It may be killed at any moment and holds nothing. It reads requests from its standard input and answers each
on its standard output; see :mod:`duallora.data.decoding` for the other side.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

REQUEST = struct.Struct(">BQdII")
"""Whether the rest is a path, most pixels, seconds of CPU, bytes of the name and of the rest."""

ANSWER = struct.Struct(">BII")
"""What it is; then width and height of RGB pixels, or 0 and the bytes of a sentence."""

PIXELS, REFUSED, TOO_MANY = range(3)


def main() -> int:
    """Answers until the input ends."""
    requests, answers = _own_streams()
    _limit_memory(int(sys.argv[1]))
    from duallora.data import images  # within the limit, as all that it allocates
    from duallora.errors import DualLoRAError

    while head := requests.read(REQUEST.size):
        is_path, most, seconds, name_bytes, size = REQUEST.unpack(head)
        name = os.fsdecode(requests.read(name_bytes))
        data = requests.read(size)
        _limit_time(seconds)
        try:
            if is_path:
                image = images.read_image(Path(os.fsdecode(data)), name, most)
            else:
                image = images.decode_image(data, name, most)
        except images.TooManyPixels as error:
            _say(answers, TOO_MANY, str(error))
        except DualLoRAError as error:
            _say(answers, REFUSED, str(error))
        else:
            answers.write(ANSWER.pack(PIXELS, *image.size))
            for top in range(0, image.height, _ROWS):  # a copy of all of it would be one too many
                answers.write(image.crop((0, top, image.width, min(top + _ROWS, image.height))).tobytes())
            del image
        answers.flush()
        del data
    return 0


_ROWS = 256


def _say(answers: BinaryIO, what: int, sentence: str) -> None:
    text = sentence.encode("utf-8", "backslashreplace")
    answers.write(ANSWER.pack(what, 0, len(text)) + text)


def _own_streams() -> tuple[BinaryIO, BinaryIO]:
    """The two streams under numbers of their own: what a decoder prints goes nowhere."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    return requests, answers


def _limit_memory(size: int) -> None:
    with suppress(OSError, ValueError):  # where the system knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: float) -> None:
    """Ends this process once it has computed for so long from now on; the other side starts another."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime + seconds) + 1
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    sys.exit(main())
