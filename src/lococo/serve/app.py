"""The application: routes, errors in OpenAI's shape, and what stands before them."""

import sqlite3
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match

from lococo import __version__
from lococo.serve import answer_routes, context_routes, pages
from lococo.serve.failures import ApiError, index_busy, internal
from lococo.serve.gate import App, Gate, Receive, Scope, Send
from lococo.serve.journal import METHODS, Journal
from lococo.serve.options import MIB
from lococo.serve.pending import ClientGone
from lococo.serve.replies import Health, described, done, told
from lococo.serve.state import State, state_of

ABOUT = "OpenAI's API in front of one model that reads text of any length into a fixed number of slots."
GONE = 499  # what nginx calls it; nobody reads it but the log


def make_app(state: State) -> FastAPI:
    """Return the application of a server.

    Args:
        state: Its parts, started.
    """
    app = FastAPI(title="lococo", version=__version__, description=ABOUT, docs_url=None, redoc_url=None)
    app.state.lococo = state
    app.include_router(answer_routes.router)
    app.include_router(context_routes.router)
    app.openapi = lambda: described(app, locked=state.keys is not None)  # type: ignore[method-assign]
    app.get(
        "/health",
        summary="Tell whether requests are taken",
        responses=told() | done(Health) | done(Health, status=503),
        openapi_extra={"security": []},
    )(health)
    app.get(
        "/metrics",
        summary="Figures for Prometheus",
        response_class=Response,
        responses=told() | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )(metrics)
    app.get("/", include_in_schema=False)(page)
    app.get("/docs", include_in_schema=False)(docs)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)  # in the middle of a body
    app.add_exception_handler(sqlite3.OperationalError, _busy)
    app.add_exception_handler(Exception, _failed)
    # The last one added is the first to see a request.
    options = state.options
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        Gate,
        keys=state.keys,
        max_body=options.max_body_mib * MIB,
        max_requests=options.max_batch + options.max_queue,
    )
    app.add_middleware(Journal, counted=state.metrics.counted)
    return app


class HeadAsGet:
    """ASGI middleware that lets HEAD find what GET would; uvicorn leaves the body out.

    Args:
        app: What is behind it.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            # A copy, but for the route, which the journal looks for.
            inner = {**scope, "method": "GET"}
            await self.app(inner, receive, send)
            scope.update({name: inner[name] for name in inner.keys() - {"method"}})
            return
        await self.app(scope, receive, send)


async def health(request: Request) -> JSONResponse:
    """Return 200 while requests are taken, 503 while the server shuts down."""
    engine = state_of(request).engine
    status = "draining" if engine.is_draining else "ok" if engine.is_alive else "failed"
    return JSONResponse({"status": status, "version": __version__}, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    """Return what the server has done and holds."""
    text = await run_in_threadpool(state_of(request).metrics.text)  # the index may be in use for a while
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def page(request: Request) -> HTMLResponse:
    """Return the page for people."""
    return HTMLResponse(pages.INDEX, headers=pages.HEADERS)


async def docs(request: Request) -> HTMLResponse:
    """Return the API's description as a page that loads nothing from elsewhere."""
    return HTMLResponse(pages.docs(request.app.openapi()), headers=pages.HEADERS)


async def _told(request: Request, error: Any) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.reply_headers())


async def _invalid(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or None
    message = f"{place or 'the body'}: {first['msg']}"
    return await _told(request, ApiError(400, message, code=first["type"], param=place))


async def _refused(request: Request, error: Any) -> JSONResponse:
    said = await _told(request, ApiError(error.status_code, str(error.detail)))
    if error.status_code == 405:
        said.headers["Allow"] = ", ".join(sorted(_methods(request)))
    return said


def _methods(request: Request) -> set[str]:
    """Return what may be asked of a path; several routes may share it."""
    found = set()
    for method in METHODS - {"HEAD"}:
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            found.add(method)
    return found | ({"HEAD"} if "GET" in found else set())


async def _gone(request: Request, error: Any) -> Response:
    return Response(status_code=GONE)


async def _busy(request: Request, error: Any) -> JSONResponse:
    return await _told(request, index_busy())


async def _failed(request: Request, error: Any) -> JSONResponse:
    return await _told(request, internal())
