"""Runs the blocks of a page as its reader would, in a folder of their own, and compares what is printed.

Run are blocks marked ``python`` and ``console``; Python that begins with the name of a file in a comment is
saved, for a later command. In a console block a line that begins with ``$`` is a command, and the lines below
it are what it prints, numbers and spaces aside; ``...`` stands for lines that are left out. `duallora` is
called in this process, but for `serve`, which is started, and ended with the page.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from duallora.cli import main

ENTRY = "from duallora.cli import main; raise SystemExit(main())"
Words = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class Block:
    """A fenced block: what it is marked as, and its lines."""

    language: str
    text: str


@dataclass
class Terminal:
    """Runs commands and remembers their exit code.

    Attributes:
        change: what to make of the words of a `duallora` command; as they are by default.
        code: of the last command.
        said: everything that commands printed, for a test to look at.
    """

    change: Words = lambda words: words
    code: int = 0
    said: list[str] = field(default_factory=list)
    server: subprocess.Popen[str] | None = None
    address: str = ""

    def run(self, line: str) -> str:
        """What a command prints, stderr included."""
        words = shlex.split(line, comments=True)
        if words[0] == "duallora":
            printed = self._serve(words) if words[1] == "serve" else self._duallora(words[1:])
        elif line == "echo $?":
            printed, self.code = str(self.code), 0
        elif words[0] == "python":
            printed = self._python(words[1:])
        else:
            printed = self._other(words)
        self.said.append(printed)
        return printed

    def close(self) -> None:
        """Ends the server, where one was started."""
        if self.server is not None:
            self.server.kill()
            self.server.wait()

    def _duallora(self, words: list[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            self.code = main(self.change(words))
        return printed.getvalue()

    def _python(self, words: list[str]) -> str:
        script, *rest = words
        printed, before, self.code = io.StringIO(), sys.argv, 0
        sys.argv = [script, *self.change(rest)]
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                execute(Path(script).read_text(encoding="utf-8"), script)
        except SystemExit as ended:
            self.code = int(ended.code or 0)
        finally:
            sys.argv = before
        return printed.getvalue()

    def _serve(self, words: list[str]) -> str:
        command = [sys.executable, "-u", "-c", ENTRY, *words[1:], "--port", "0"]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        said = self.server.stdout.readline()
        (self.address,) = re.findall(r"127\.0\.0\.1:\d+", said)
        self.code = 0
        return said

    def _other(self, words: list[str]) -> str:
        known = [word.replace("127.0.0.1:8000", self.address) for word in words]
        done = subprocess.run(known, capture_output=True, text=True, check=False)
        self.code = done.returncode
        return done.stdout + done.stderr


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in their order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(language, text) for language, text in found]


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Every command of a console block with the lines that it is to print; a backslash joins two lines."""
    joined = block.text.replace("\\\n", " ")
    for part in re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]:
        line, *printed = part.splitlines()
        yield line, [each for each in printed if each.strip() and each != "..."]


def plain(line: str) -> str:
    """A line without its numbers, spaces and frames; of a row of a table, the first two cells."""
    if line.startswith("│"):
        line = " ".join(line.split("│")[1:3])
    return re.sub(r"[\s│┃┏┓┗┛┡┩┳╇━─┴┬┼┌┐└┘├┤]+", " ", re.sub(r"\d+([.,]\d+)*", "#", line)).strip()


def missing(expected: list[str], printed: str) -> list[str]:
    """The expected lines that were not printed, numbers aside."""
    said = {plain(line) for line in printed.splitlines()}
    return [line for line in expected if plain(line) and plain(line) not in said]


def run_python(block: Block, page: Path) -> None:
    """Runs a block; one that begins with the name of a file is saved instead."""
    named = re.match(r"# (\w+\.py)\n", block.text)
    if named:
        Path(named[1]).write_text(block.text, encoding="utf-8")
    else:
        execute(block.text, page.name)


def execute(source: str, name: str) -> None:
    """Runs Python as a script."""
    exec(compile(source, name, "exec"), {"__name__": "__main__", "__file__": name})
