"""From a command line or a YAML file that does not parse to one sentence that names the nearest valid words.

What a parser says of a mistake differs between its versions; taken from it is only which option it is about.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from duallora.errors import DualLoRAError

_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def nearest(word: str, valid: Sequence[str]) -> str:
    """The end of a sentence that refuses ``word``: the nearest valid words, or all when none is near."""
    close = difflib.get_close_matches(word, valid, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else f"; valid are {', '.join(valid)}."


def refuse_unknown(
    words: Sequence[str], configs: Sequence[Mapping[str, Any]], parser: ArgumentParser, method: str | None
) -> None:
    """Refuses options that a command does not have.

    Args:
        words: The command line.
        configs: Contents of the YAML files.
        parser: The command's parser.
        method: The method whose fields it takes; None for a command without one.

    Raises:
        DualLoRAError: Naming the nearest options.
    """
    options = {name for action in parser._actions for name in action.option_strings}
    for word in words[: words.index("--")] if "--" in words else words:
        name = word.split("=")[0]
        if name.startswith("--") and name not in options:
            raise DualLoRAError(_unknown_option(name, options, parser.prog, method))
    keys = {action.dest for action in parser._actions}
    for config in configs:
        for key, _ in _flat(config):
            if key not in keys:
                name = key if "." in key else key.replace("_", "-")
                raise DualLoRAError(_unknown_option(f"--{name}", options, parser.prog, method))


def refuse_blank(configs: Sequence[Mapping[str, Any]], parser: ArgumentParser) -> None:
    """Refuses keys of YAML files without a value, and lists or sections where one value belongs.

    Args:
        configs: Contents of the YAML files.
        parser: The command's parser.

    Raises:
        DualLoRAError: Naming the key.
    """
    actions = {action.dest: action for action in parser._actions}
    for config in configs:
        for key, value in _flat(config):
            action = actions.get("method.name" if key == "method" else key)
            if action is None:  # another check names what it could be
                continue
            if value is None and (key == "method" or not _may_be_none(action)):
                raise DualLoRAError(
                    f"{key} has no value in the configuration; write one, or remove the line."
                )
            if isinstance(value, list | Mapping) and not _takes_several(action):
                kind = "a list" if isinstance(value, list) else "a section"
                takes = _takes(action) or "one value"
                option = f"--{key.replace('_', '-')}"
                raise DualLoRAError(f"{key} is {kind} in the configuration; it takes {takes} ({option}).")


def _may_be_none(action: Any) -> bool:
    return type(None) in get_args(_hint(action)) or (action.default is None and not action.required)


def _takes_several(action: Any) -> bool:
    hint = _hint(action)
    return action.nargs in ("+", "*") or list in (hint, get_origin(hint), *map(get_origin, get_args(hint)))


def explain(
    message: str, words: Sequence[str], configs: Sequence[Mapping[str, Any]], parser: ArgumentParser
) -> str:
    """One sentence about what else is wrong with a command line.

    Args:
        message: What the parser says of it.
        words: The command line.
        configs: Contents of the YAML files.
        parser: The command's parser.
    """
    text = " ".join(message.split())
    see = f"see {parser.prog} --help."
    if found := re.match(r"unrecognized arguments: (\S+)", text, re.IGNORECASE):
        return f"unexpected argument {found[1]}; {see}"
    named = [action for action in parser._actions if _is_named(action, text)]
    if "required" in text and named:
        names = [_shown(action) for action in named]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing; {see}"
    if found := re.match(r"argument ([^\s:/]+)\S*: expected", text):
        action = parser._option_string_actions[found[1]]
        takes = _takes(action)
        return f"{_shown(action)} needs a value" + (f": {takes}." if takes else ".")
    if named:
        return _wrong_value(named[0], words, configs)
    return f"{text.rstrip('.')}; {see}"


def _unknown_option(option: str, options: set[str], prog: str, method: str | None) -> str:
    owner = _owner(option, method)
    if owner is not None:
        return f"{option} is a field of --method {owner}, not of --method {method}."
    known = sorted(_short(name) for name in options)
    # A field is often written without its prefix, and a hyphen for an underscore.
    tails = {name.rpartition(".")[2].replace("_", "-"): name for name in known if "." in name}
    close = difflib.get_close_matches(option, known, n=2, cutoff=0.6)
    bare = option.removeprefix("--").removeprefix("method.").replace("_", "-")
    close += [tails[tail] for tail in difflib.get_close_matches(bare, list(tails), n=2, cutoff=0.8)]
    suggestions = list(dict.fromkeys(close))
    remedy = f"did you mean {' or '.join(suggestions)}?" if suggestions else f"see {prog} --help."
    return f"unknown option {option}; {remedy}"


def _owner(option: str, method: str | None) -> str | None:
    """The other method that has the field ``--method.FIELD`` asks for."""
    if method is None or not option.startswith("--method."):
        return None
    from duallora.methods import METHODS

    field = option.removeprefix("--method.").replace("-", "_")
    owners = [name for name, entry in METHODS.items() if field in {f.name for f in fields(entry.config)}]
    return owners[0] if owners and method not in owners else None


def _is_named(action: Any, text: str) -> bool:
    """Whether a parser's message is about this option: it quotes the key, or lists it after a colon."""
    listed = text.partition("required: ")[2].split(", ")
    return f'"{action.dest}"' in text or action.dest in listed


def _wrong_value(action: Any, words: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> str:
    value = _given(action, words, configs)
    close = difflib.get_close_matches(value, [str(choice) for choice in _choices(_hint(action))], n=3)
    guess = f"did you mean {' or '.join(close)}? It takes" if close else "it takes"
    return f"{_shown(action)} does not take {value}; {guess} {_takes(action) or 'another value'}."


def _given(action: Any, words: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> str:
    """The last value given for an option."""
    values = [str(value) for config in configs for key, value in _flat(config) if key == action.dest]
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name in action.option_strings:
            values.append(value if equals else following)
    return values[-1] if values else "this value"


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a YAML file, those of the method's section with its name before them."""
    for key, value in config.items():
        if key == "method" and isinstance(value, Mapping):
            yield from ((f"method.{field}", item) for field, item in value.items())
        else:
            yield key, value


def _hint(action: Any) -> Any:
    return getattr(action, "_typehint", None)


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _takes(action: Any) -> str:
    """The values that an option takes, in words; empty where a type says nothing to a user."""
    hint = _hint(action)
    kinds = [_KINDS[kind] for kind in (hint, *get_args(hint)) if isinstance(kind, type) and kind in _KINDS]
    return " or ".join([*kinds, *(str(choice) for choice in _choices(hint))])


def _short(option: str) -> str:
    return "--method" if option == "--method.name" else option


def _shown(action: Any) -> str:
    """An option as the user writes it, a positional argument in capitals."""
    return _short(action.option_strings[0]) if action.option_strings else str(action.dest).upper()
