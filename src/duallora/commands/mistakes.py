"""From what a parser says of a wrong command line to one sentence that names the nearest valid words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


def nearest(word: str, valid: Sequence[str]) -> str:
    """The end of a sentence that refuses ``word``: the nearest valid words, or all when none is near."""
    close = difflib.get_close_matches(word, valid, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; valid are {', '.join(valid)}."


def explain(message: str, parser: ArgumentParser, method: str | None) -> str:
    """One sentence for the user about a command line or configuration file that does not parse.

    Args:
        message: What the parser says.
        parser: The parser, for its options and their values.
        method: The method whose fields the parser takes; None for a command without one.
    """
    text = " ".join(message.split())
    if found := re.match(r"unrecognized arguments: (\S+)", text):
        return _unknown_option(found[1].split("=")[0], parser, method)
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        key = found[1] if "." in found[1] else found[1].replace("_", "-")
        return _unknown_option("--" + key, parser, method)
    if found := re.search(r'[Kk]ey "([^"]+)": .*(?:Got value:|Given value:) (.*)$', text):
        return _wrong_value(found[1], found[2].strip(), parser)
    if found := re.match(r"the following arguments are required: (.*)", text):
        missing = [_shown(key.strip(), parser) for key in found[1].split(",")]
        verb = "is" if len(missing) == 1 else "are"
        return f"{' and '.join(missing)} {verb} missing; see {parser.prog} --help."
    if found := re.match(r"argument ([^\s:]+): expected", text):
        option = found[1].split("/")[0]
        return f"{_short(option)} needs a value{_values(_hint(option.lstrip('-'), parser))}."
    return f"{text.rstrip('.')}; see {parser.prog} --help."


def _unknown_option(option: str, parser: ArgumentParser, method: str | None) -> str:
    if not option.startswith("-"):
        return f"unexpected argument {option}; see {parser.prog} --help."
    owner = _owner(option, method)
    if owner is not None:
        return f"{_short(option)} is a field of --method {owner}, not of --method {method}."
    known = [_short(name) for action in parser._actions for name in action.option_strings]
    # A field is often written without its prefix, and a hyphen for an underscore.
    tails = {name.rpartition(".")[2].replace("_", "-"): name for name in known if "." in name}
    close = difflib.get_close_matches(option, known, n=2, cutoff=0.6)
    bare = option.removeprefix("--").removeprefix("method.").replace("_", "-")
    close += [tails[tail] for tail in difflib.get_close_matches(bare, list(tails), n=2, cutoff=0.8)]
    suggestions = list(dict.fromkeys(close))
    remedy = f"did you mean {' or '.join(suggestions)}?" if suggestions else f"see {parser.prog} --help."
    return f"unknown option {option}; {remedy}"


def _owner(option: str, method: str | None) -> str | None:
    """The other method that has the field ``--method.FIELD`` asks for."""
    if method is None or not option.startswith("--method."):
        return None
    from duallora.methods import METHODS

    field = option.removeprefix("--method.").replace("-", "_")
    owners = [name for name, entry in METHODS.items() if field in entry.config.__dataclass_fields__]
    return owners[0] if owners and method not in owners else None


def _wrong_value(key: str, value: str, parser: ArgumentParser) -> str:
    hint = _hint(key, parser)
    close = difflib.get_close_matches(value, [str(choice) for choice in _choices(hint)], n=3, cutoff=0.6)
    guess = f"did you mean {' or '.join(close)}? It takes" if close else "it takes"
    return f"{_shown(key, parser)} does not take {value}; {guess} {_either(hint)}."


def _hint(key: str, parser: ArgumentParser) -> Any:
    """The type of an option, by its key in a configuration file."""
    for action in parser._actions:
        if action.dest == key.replace("-", "_"):
            return getattr(action, "_typehint", None)
    return None


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _either(hint: Any) -> str:
    """The values that a type takes, in words."""
    kinds = [_WORDS[kind] for kind in (hint, *get_args(hint)) if isinstance(kind, type) and kind in _WORDS]
    return " or ".join([*kinds, *(str(choice) for choice in _choices(hint))]) or "another value"


def _values(hint: Any) -> str:
    words = _either(hint)
    return "" if words == "another value" else f": {words}"


def _short(option: str) -> str:
    return "--method" if option == "--method.name" else option


def _shown(key: str, parser: ArgumentParser) -> str:
    """A key as the user writes it: an option by its name, a positional argument in capitals."""
    for action in parser._actions:
        if action.dest == key.replace("-", "_"):
            return _short(action.option_strings[0]) if action.option_strings else key.upper()
    return key
