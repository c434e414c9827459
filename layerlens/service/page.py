"""The server's own page at ``/``: jobs, their results, and a form, as one HTML file without a request elsewhere.

The page itself is open, as ``/docs`` is, and shows nothing until it is given a token. It sends the token as every
client does: in the ``Authorization`` header. Its policy allows the one script and the one style that it has, by their
hashes. A report is shown in a frame (``/report-frame``) that a sandbox gives an origin of its own: whatever a
report does, it reaches neither the page with the token nor the server.
"""

from __future__ import annotations

from functools import cache
from html import escape
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from layerlens import __version__
from layerlens.manifest.page import report_script, script_hash

TEMPLATES = Path(__file__).parent / "templates"
PAGE_PATH, FRAME_PATH = "/", "/report-frame"
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def add_page(app: FastAPI) -> None:
    """Give the application its page and the frame for reports."""

    @app.get(PAGE_PATH, include_in_schema=False)
    def page() -> HTMLResponse:
        """The page; what it shows comes by the same interface as everything else."""
        content, policy = _page()
        return HTMLResponse(content, headers={**HEADERS, "X-Frame-Options": "DENY", "Content-Security-Policy": policy})

    @app.get(FRAME_PATH, include_in_schema=False)
    def frame() -> HTMLResponse:
        """An empty document that shows the report which the page hands over."""
        content, policy = _frame()
        return HTMLResponse(content, headers={**HEADERS, "Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    style, script = _template("page.css"), _template("page.js")
    content = _template("page.html").replace("{version}", escape(__version__))
    content = content.replace("{style}", style).replace("{script}", script)
    rules = (
        "default-src 'none'",
        f"script-src '{script_hash(script)}'",
        f"style-src '{script_hash(style)}'",
        "connect-src 'self'",
        "frame-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return content, "; ".join(rules)


@cache
def _frame() -> tuple[str, str]:
    script = _template("frame.js")
    content = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Report</title></head>'
        f"<body><script>{script}</script></body></html>\n"
    )
    rules = (
        "sandbox allow-scripts",
        "default-src 'none'",
        f"script-src '{script_hash(script)}' '{script_hash(report_script())}'",
        "style-src 'unsafe-inline'",  # a report has bars of its own widths
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'self'",
    )
    return content, "; ".join(rules)


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
