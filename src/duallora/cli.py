"""The console entry: one verb, one typed function."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from duallora.commands.console import line
from duallora.errors import DualLoRAError, is_low_memory
from duallora.runtime.ending import TERMINATED, Terminated, ending_in_order

# Verb -> where its function lives. By name, so that no verb imports the libraries of another.
VERBS = {
    "run": "duallora.commands.run:run",
    "compare": "duallora.commands.compare:compare",
    "reproduce": "duallora.commands.reproduce:reproduce",
    "methods": "duallora.commands.methods:methods",
    "streams": "duallora.commands.streams:streams",
    "backbones": "duallora.commands.backbones:backbones",
    "learn": "duallora.commands.learn:learn",
    "predict": "duallora.commands.predict:predict",
    "evaluate": "duallora.commands.evaluate:evaluate",
    "inspect": "duallora.commands.inspect:inspect",
    "undo": "duallora.commands.undo:undo",
    "export": "duallora.commands.export:export",
    "bench": "duallora.commands.bench:bench",
    "forget": "duallora.commands.forget:forget",
    "push": "duallora.commands.push:push",
    "pull": "duallora.commands.pull:pull",
    "serve": "duallora.commands.serve:serve",
    "app": "duallora.commands.app:app",
}

_LONGEST = 1200  # letters of a sentence about what is wrong
INTERNAL_ERROR = 1
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
PIPE_CLOSED = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after the program's name; those of this process by default.

    Returns:
        The exit code: 0, 2 for what the user can put right, 3 for a failed ``--check``, 130 after Ctrl-C and
        143 after SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.suppress(AttributeError):
            # A file name need not be valid in the terminal's encoding; it is shown escaped then.
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        with _plain_warnings(), ending_in_order():
            code = _dispatch(words)
        sys.stdout.flush()
        return code
    except DualLoRAError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; every saved file is whole.", INTERRUPTED)
    except Terminated:
        return _fail("asked to end; every saved file is whole.", TERMINATED)
    except BrokenPipeError:
        _silence_stdout()
        return PIPE_CLOSED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}.", DualLoRAError.exit_code)
    except Exception as error:  # the last resort: a user gets a sentence, a developer asks for the rest
        if is_low_memory(error):
            return _fail("there is not enough memory for this; free some, or give it less.", 2)
        if os.environ.get("DUALLORA_DEBUG"):
            traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"internal error: {text} (the traceback: set DUALLORA_DEBUG=1).", INTERNAL_ERROR)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        _print_help()
        return 0 if words else DualLoRAError.exit_code
    if words[0] == "--version":
        line(f"duallora {metadata.version('duallora')}")
        return 0
    verb = words[0]
    if verb not in VERBS:
        from duallora.commands.parse_errors import nearest

        raise DualLoRAError(f"there is no command {verb}{nearest(verb, list(VERBS))}")
    module, name = VERBS[verb].split(":")
    command = getattr(importlib.import_module(module), name)
    from duallora.commands.arguments import parse

    try:
        keywords = parse(verb, command, words[1:])
    except SystemExit as exit_:  # after --help and --print_config
        return int(exit_.code or 0)
    command(**keywords)
    return 0


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Inside, a warning of this package is one line on stderr, without the place in the source."""
    shown, package = warnings.showwarning, str(Path(__file__).parent)

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if filename.startswith(package):
            line(f"duallora: {' '.join(str(message).split())}", stderr=True)
        else:
            shown(message, category, filename, *rest)

    warnings.showwarning = show  # type: ignore[assignment]  # the rest is only passed on
    try:
        yield
    finally:
        warnings.showwarning = shown


def _print_help() -> None:
    line("usage: duallora VERB [options]\n")
    line("A pre-trained vision transformer learns task after task and forgets little.\n")
    for verb, place in VERBS.items():
        module, name = place.split(":")
        summary = (getattr(importlib.import_module(module), name).__doc__ or "").strip().splitlines()[0]
        line(f"  {verb:<11}{summary}")
    line("\nduallora VERB --help shows a command's options, duallora --version the version.")


def _fail(sentence: str, code: int) -> int:
    if len(sentence) > _LONGEST:  # somebody's megabyte of an argument; the remedy stands at the end
        sentence = f"{sentence[: _LONGEST // 2]} [...] {sentence[-_LONGEST // 2 :]}"
    with contextlib.suppress(OSError):
        line(f"duallora: {sentence}", stderr=True)
    return code


def _silence_stdout() -> None:
    """Points stdout at nothing: Python flushes it once more on exit, and the reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
