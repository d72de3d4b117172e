"""From a typed function to a jsonargparse parser, and from a command line to that function's arguments.

The rules: a parameter before the ``*`` of the signature is a positional argument, one after it an option
(``train_per_class`` is ``--train-per-class``, ``class_`` is ``--class``), a bool is a switch, and the
docstring's ``Args`` are the help. A parameter whose type is a dataclass becomes one option for each field, in
a group of its own in the help. A parameter of type `MethodChoice` becomes ``--method NAME`` and one
``--method.FIELD`` for each field of that method's configuration, so the method's name is found before the
parser is built.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from argparse import ArgumentError, HelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, Namespace

from duallora.commands.configs import read_config, take_config_files
from duallora.commands.parse_errors import explain, nearest, refuse_blank, refuse_unknown
from duallora.errors import DualLoRAError
from duallora.teaching.method_choice import DEFAULT_METHOD, MethodChoice

Command = Callable[..., None]


class CommandParser(ArgumentParser):
    """jsonargparse's parser; its help shows ``--method``, the short form of ``--method.name``."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text."""
        return str(super().format_help(*args, **kwargs)).replace("--method.name", "--method")


def parse(verb: str, command: Command, argv: Sequence[str]) -> dict[str, Any]:
    """Reads a command line for a command.

    Args:
        verb: The command's name.
        command: The typed function behind it.
        argv: The words after the verb.

    Returns:
        The keyword arguments to call the function with.

    Raises:
        DualLoRAError: Unknown options or values, and unreadable ``--config`` files.
        SystemExit: After ``--help`` and ``--print_config``.
    """
    if any("\0" in word for word in argv):
        raise DualLoRAError("an argument has a NUL character in it, which no name may have: leave it out")
    words, files = take_config_files(argv)
    return _parsed(verb, command, words, [read_config(file) for file in files])


def parse_values(verb: str, command: Command, values: dict[str, Any]) -> dict[str, Any]:
    """Checks values that are there already as those of a ``--config`` file; see `parse`.

    Raises:
        DualLoRAError: Unknown options or values.
    """
    return _parsed(verb, command, [], [values])


def _parsed(verb: str, command: Command, words: list[str], configs: list[dict[str, Any]]) -> dict[str, Any]:
    method = None
    if any(_is_choice(hint) for hint in get_type_hints(command).values()):
        words = [_spell_out(word) for word in words]
        method = _find_method(words, configs)
    parser = build_parser(verb, command, method)
    refuse_blank(configs, parser)
    refuse_unknown(words, configs, parser, method)
    # Files go first: a value on the command line wins over any file, wherever it stands.
    first = [{"method": {"min_steps": 0}}] if method is not None and _names_epochs(words, configs) else []
    texts = [text for config in (*first, *configs) for text in ("--config", json.dumps(config, default=str))]
    if any("\\u0000" in text for text in texts):
        raise DualLoRAError("a --config file has a NUL character in a value: leave it out")
    try:
        namespace = parser.parse_args([*texts, *words])
    except ArgumentError as error:
        raise DualLoRAError(explain(str(error), words, configs, parser)) from error
    return _keywords(command, namespace)


def build_parser(verb: str, command: Command, method: str | None = None) -> CommandParser:
    """Builds the parser of a command.

    Args:
        verb: The command's name.
        command: The typed function.
        method: Whose fields are the ``--method.FIELD`` options; None for a command without a method.
    """
    doc = docstring_parser.parse(inspect.getdoc(command) or "")
    about = {entry.arg_name: entry.description or "" for entry in doc.params}
    parser = CommandParser(
        prog=f"duallora {verb}",
        description=" ".join(part for part in (doc.short_description, doc.long_description) if part),
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    hints = get_type_hints(command)
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if _is_choice(hint):
            _add_method(parser, method or DEFAULT_METHOD, keep_unsaid=parameter.default is None)
        elif dataclasses.is_dataclass(hint):
            _add_group(parser, hint, parameter.default)
        else:
            _add_parameter(parser, parameter, hint, about.get(parameter.name, ""))
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file of option values, or the name of a shipped one; the command line wins",
    )
    needed = [" ".join([*a.option_strings[:1], str(a.metavar)]) for a in parser._actions if a.required]
    parser.usage = " ".join([parser.prog, *needed, "[options]"])
    return parser


def _add_parameter(parser: Any, parameter: inspect.Parameter, hint: Any, about: str) -> None:
    option = "--" + _key(parameter.name).replace("_", "-")
    settings: dict[str, Any] = {"help": about}
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
        option = parameter.name
        several = get_origin(hint) is list
        settings |= {"type": get_args(hint)[0], "nargs": "+"} if several else {"type": hint}
        settings["metavar"] = parameter.name.upper() + ("..." if several else "")
        if parameter.default is not inspect.Parameter.empty:
            settings |= {"nargs": "?", "default": parameter.default}
    elif hint is bool:
        settings["action"] = "store_true"
    else:
        settings |= {"type": hint, "metavar": _metavar(hint)}
        if parameter.default is inspect.Parameter.empty:
            settings["required"] = True
        else:
            settings |= {"default": parameter.default, "help": _with_default(about, parameter.default)}
    parser.add_argument(option, **settings)


def _add_group(parser: CommandParser, kind: Any, defaults: Any) -> None:
    """Adds one option for each field of a dataclass; its summary is the title of the group."""
    about, hints = _field_docs(kind), get_type_hints(kind)
    title = (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".")
    group = parser.add_argument_group(title[:1].lower() + title[1:])
    for each in dataclasses.fields(kind):
        default = getattr(defaults, each.name)
        parameter = inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default)
        _add_parameter(group, parameter, hints[each.name], about.get(each.name, ""))


def _add_method(parser: CommandParser, method: str, *, keep_unsaid: bool) -> None:
    """Adds ``--method`` and the fields of one method; with ``keep_unsaid``, what is not given stays None."""
    from duallora.methods import METHODS

    config = METHODS[method].config
    group = parser.add_argument_group(f"method {method}", "for the fields of another: --method NAME --help")
    about, hints = _field_docs(config), get_type_hints(config)
    names: Any = Literal[tuple(METHODS)]
    rows: list[tuple[str, Any, Any, Any, str]] = [("name", names, DEFAULT_METHOD, method, "the method")]
    for each in dataclasses.fields(config):
        rows.append((each.name, hints[each.name], each.default, each.default, about.get(each.name, "")))
    for field, hint, shown, default, text in rows:
        group.add_argument(
            f"--method.{field}",
            *(["--epochs"] if field == "epochs" else []),
            type=Union[hint, None] if keep_unsaid else hint,  # noqa: UP007 - `|` fails on some run-time types
            default=None if keep_unsaid else default,
            metavar=_metavar(hint),
            help=_with_default(text, shown),
        )


def _field_docs(config: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each field."""
    about: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        entries = docstring_parser.parse(kind.__doc__ or "").params
        about |= {entry.arg_name: entry.description or "" for entry in entries}
    return about


def _with_default(about: str, default: Any) -> str:
    text = about.strip().rstrip(".").replace("`", "").replace("%", "%%")
    shown = str(default).lower() if isinstance(default, bool) else default
    return text if default is None else f"{text} (default: {shown})"


def _metavar(hint: Any) -> str:
    """The values of a choice, else the type in a word."""
    if get_origin(hint) is Literal:
        values = [str(value) for value in get_args(hint)]
        return "{" + ("|" if any("," in value for value in values) else ",").join(values) + "}"
    if get_origin(hint) in (Union, UnionType):
        return "|".join(_metavar(part) for part in get_args(hint) if part is not type(None))
    return {bool: "{true,false}", int: "INT", float: "FLOAT", Path: "PATH"}.get(hint, "TEXT")


def _key(name: str) -> str:
    """The option of a parameter: a word of Python's own, as in ``class``, is a name with ``_`` after it."""
    return name.rstrip("_")


def _is_choice(hint: Any) -> bool:
    return hint is MethodChoice or MethodChoice in get_args(hint)


def _spell_out(word: str) -> str:
    """``--method`` and ``--method=`` by the option's full name, which is what YAML files nest."""
    return "--method.name" + word.removeprefix("--method") if word.split("=")[0] == "--method" else word


def _names_epochs(words: Sequence[str], configs: Sequence[dict[str, Any]]) -> bool:
    """Whether a number of epochs is named: then it means just these, unless the least steps are named too."""
    options = ("--epochs", "--method.epochs")
    methods = [config["method"] for config in configs if isinstance(config.get("method"), dict)]
    return any(word.split("=")[0] in options for word in words) or any("epochs" in own for own in methods)


def _find_method(words: Sequence[str], configs: Sequence[dict[str, Any]]) -> str:
    """The method that the command line names, else the last file that names one, else the default."""
    from duallora.methods import METHODS

    named = [config["method"].get("name") for config in configs if isinstance(config.get("method"), dict)]
    for name in named:
        if name is not None and not isinstance(name, str):
            raise DualLoRAError(
                f"method.name is a {type(name).__name__} in the configuration; write one name."
            )
    for position, word in enumerate(words):
        if word == "--method.name":
            named += words[position + 1 : position + 2]
        elif word.startswith("--method.name="):
            named.append(word.removeprefix("--method.name="))
    name = next((name for name in reversed(named) if name is not None), DEFAULT_METHOD)
    if name not in METHODS:
        raise DualLoRAError(f"there is no method {name}{nearest(str(name), list(METHODS))}")
    return str(name)


def _keywords(command: Command, namespace: Namespace) -> dict[str, Any]:
    """The parsed values under the names of the function's parameters."""
    keywords = {}
    hints = get_type_hints(command)
    for name, parameter in inspect.signature(command).parameters.items():
        value = namespace.get(_key(name))
        if dataclasses.is_dataclass(hints[name]) and not _is_choice(hints[name]):
            kind: Any = hints[name]
            value = kind(**{each.name: namespace.get(each.name) for each in dataclasses.fields(kind)})
        if _is_choice(hints[name]):
            fields = dict(vars(value))
            if parameter.default is None:
                fields = {key: item for key, item in fields.items() if item is not None}
            value = MethodChoice(fields.pop("name", None), fields) if fields else None
        keywords[name] = value
    return keywords
