"""A running page in a process of its own, and a headless Chromium that looks at it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

ENTRY = "from duallora.cli import main; raise SystemExit(main())"
CHROMIUM = shutil.which("chromium")
# A container's shared memory may be too small for what Chromium puts there.
ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", "--use-fake-device-for-media-stream"]
NO_CHROMIUM = "no chromium: install Debian's package chromium"


def files_below(folder: Path) -> list[Path]:
    """Files with content, while the program may be deleting them and their folders."""
    found = []
    for parent, _, names in os.walk(folder):  # passes over a folder that has gone
        for name in names:
            with suppress(FileNotFoundError):
                if (Path(parent) / name).stat().st_size:
                    found.append(Path(parent) / name)
    return found


@contextmanager
def running_app(
    model: Path, *options: str, environment: Mapping[str, str] = {}
) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """``duallora app MODEL --port 0``; gives its address, how its token is handed over, and the process."""
    words = [sys.executable, "-u", "-c", ENTRY, "app", str(model), "--port", "0", *options]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        said = process.stdout.readline().strip()
        found = re.fullmatch(
            rf"page for {re.escape(str(model))} at (http://127\.0\.0\.1:\d+)(/\?token=[\w-]{{40,}})?; .*",
            said,
        )
        assert found, said + process.stderr.read()
        yield found[1], found[2] or "/", process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
