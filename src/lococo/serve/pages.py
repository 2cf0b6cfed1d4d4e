"""The page for people, and the API's description as a page. Neither loads anything from elsewhere."""

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

INDEX = files("lococo.serve").joinpath("page.html").read_text("utf-8")
STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:1rem/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "background:Canvas;color:CanvasText}"
    "h2,h3{overflow-wrap:anywhere}pre{overflow:auto;padding:.5rem;border:1px solid #8888}"
)


def _allowed(tag: str) -> str:
    """Return the hashes of the page's own styles or scripts, the only ones that a browser may use."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", INDEX, re.DOTALL) + ([STYLE] if tag == "style" else [])
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_allowed('script')}; style-src {_allowed('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def docs(schema: dict[str, Any]) -> str:
    """Return an OpenAPI description as HTML."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>lococo API</title><style>{STYLE}</style>",
        '<main><h1>lococo API</h1><p>As JSON: <a href="/openapi.json">openapi.json</a></p>',
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation.get('description') or operation['summary'])}</p>")
            if "requestBody" in operation:
                parts.append(_shown(operation["requestBody"]["content"]))
    parts.append("<h2>Schemas</h2>")
    for name, one in schema.get("components", {}).get("schemas", {}).items():
        parts.append(f'<h3 id="{html.escape(name)}">{html.escape(name)}</h3>{_shown(one)}')
    return "\n".join([*parts, "</main></html>"])


def _shown(value: Any) -> str:
    # What can be scrolled must be within a keyboard's reach.
    return f'<pre tabindex="0">{html.escape(json.dumps(value, indent=2))}</pre>'
