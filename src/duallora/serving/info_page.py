"""The page about the interface, made from its OpenAPI description; it loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; background: #8882; }
pre { padding: .75rem; overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; }
:root { color-scheme: light dark; }
"""


def page(schema: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description: every operation with parameters, answers and an example."""
    info = schema["info"]
    operations = [
        _operation(method.upper(), path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>'
        f"<main><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{escape(info.get('description', ''))}</p>"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{''.join(operations)}</main></html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    parts = [f"<h2><code>{method} {escape(path)}</code></h2>", f"<p>{escape(_text(operation))}</p>"]
    parameters = [
        (p["name"], f"{p.get('description', '')} (default: {p['schema'].get('default', 'none')})")
        for p in operation.get("parameters", [])
    ]
    if parameters:
        parts.append(_table(("parameter", "is"), parameters))
    if "x-example" in operation:
        parts.append(f"<pre>{escape(operation['x-example'])}</pre>")
    answers = [(status, answer.get("description", "")) for status, answer in operation["responses"].items()]
    parts.append(_table(("answer", "means"), answers))
    return "".join(parts)


def _text(operation: Mapping[str, Any]) -> str:
    return str(operation.get("description") or operation.get("summary", ""))


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td><code>{escape(a)}</code></td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table><tr><th>{head[0]}</th><th>{head[1]}</th></tr>{cells}</table>"
