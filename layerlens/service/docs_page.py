"""The API's documentation as one HTML page made from the OpenAPI document: no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 0.9em ui-monospace, monospace; } pre { overflow-x: auto; padding: .6rem; border: 1px solid #8886; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8886; padding-top: 1rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .25rem .6rem;
border-bottom: 1px solid #8883; } .verb { text-transform: uppercase; font-weight: 700; margin-right: .5rem; }
"""


def docs_page(document: dict[str, Any]) -> str:
    """The page."""
    info = document["info"]
    parts = [f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>", f"<p>{escape(info['description'])}</p>"]
    parts.append('<p>The same as a document: <a href="openapi.json">openapi.json</a> (OpenAPI 3.1).</p>')
    for path, operations in document["paths"].items():
        for verb, operation in operations.items():
            parts += _operation(path, verb, operation)
    parts.append("<h2>Objects</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts.append(f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{escape(schema.get("description", ""))}</p>')
        rows = [
            (f"<code>{escape(field)}</code>", _type(inner), escape(inner.get("description", "")))
            for field, inner in schema.get("properties", {}).items()
        ]
        parts += _table(("field", "type", "meaning"), rows)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}<title>LayerLens API</title></head><body>{body}</body></html>\n'


def _operation(path: str, verb: str, operation: dict[str, Any]) -> list[str]:
    parts = [f'<h2><span class="verb">{escape(verb)}</span><code>{escape(path)}</code></h2>']
    parts.append(f"<p><b>{escape(operation.get('summary', ''))}.</b> {escape(operation.get('description', ''))}</p>")
    rows = [
        (f"<code>{escape(one['name'])}</code> ({escape(one['in'])})", _type(one.get("schema", {})),
         escape(one.get("description", "")))
        for one in operation.get("parameters", [])
    ]  # fmt: skip
    parts += _table(("parameter", "type", "meaning"), rows)
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body: <code>{escape(media)}</code>, {_type(content.get('schema', {}))}</p>")
    answers = []
    for status, response in operation.get("responses", {}).items():
        kinds = [_type(content.get("schema", {})) for content in response.get("content", {}).values()]
        answers.append((escape(status), ", ".join(kinds), escape(response.get("description", ""))))
    return [*parts, *_table(("status", "body", "meaning"), answers)]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    return [f"<table><tr>{titles}</tr>", *(f"<tr>{line}</tr>" for line in lines), "</table>"]


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(inner) for inner in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "any")))
