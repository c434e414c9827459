"""The HTTP interface: routes, what they take and what they answer. The work is done by the scheduler's processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from layerlens import __version__
from layerlens.config import RunConfig, parse_run_config
from layerlens.config.base import describe
from layerlens.exceptions import ActivationCacheError, ConfigurationError
from layerlens.service.confinement import (
    confine,
    confine_settings,
    confined_path,
    keep_upload,
    receive_upload,
    statistics_path,
)
from layerlens.service.events import EventWatch
from layerlens.service.guard import Guard
from layerlens.service.metrics import Measured, ServiceMetrics
from layerlens.service.page import add_page
from layerlens.service.probe import Probe, reason_of
from layerlens.service.scheduler import Scheduler
from layerlens.service.schemas import (
    IDEMPOTENCY_KEY,
    JOB_ID,
    Health,
    JobList,
    JobResult,
    JobView,
    Problem,
    Readiness,
    State,
    Submission,
    Upload,
    docs_page,
)
from layerlens.service.settings import ServiceSettings
from layerlens.service.slots import CountedFile, CountedStream, Slots
from layerlens.service.store import CACHE, JOBS, RESULTS, SUCCEEDED, UPLOADS, Job, JobStore, printable

DESCRIPTION = (
    "Choose which layers of a model to adapt, with which PEFT method and rank, within hard budgets and with a proved "
    "gap."
)
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
STUCK_S = 30.0

logger = logging.getLogger(__name__)


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    meanings = {
        400: "The body cannot be read", 401: "No valid token", 403: "Not a local name", 404: "Not found",
        409: "The state of the job does not allow this", 413: "The body is too large", 422: "A field is wrong",
        429: "Too many requests or waiting jobs", 503: "Not now",
    }  # fmt: skip
    return {code: {"model": Problem, "description": meanings[code]} for code in codes}


ALWAYS = _problems(401, 403, 413, 422, 429, 503)
LINKS = {
    operation: {"operationId": operation, "parameters": {"job_id": "$response.body#/id"}}
    for operation in ("show", "cancel", "remove", "events", "result")
}
EVENT = {
    "type": "object",
    "description": "One server-sent event.",
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9]+$", "description": "Number, for Last-Event-ID."},
        "event": {"type": "string", "enum": ["state", "stage", "progress", "warning"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["id", "event", "data"],
}
JobId = Annotated[str, Path(pattern=JOB_ID, description="Id of the job.")]


def create_app(settings: ServiceSettings, store: JobStore, *, files_at_once: int = 64) -> FastAPI:
    """The application of one server.

    Args:
        settings: what the operator decided.
        store: all jobs.
        files_at_once: uploads and downloads that may be under way.
    """
    metrics, watch = ServiceMetrics(store), EventWatch(store, settings.max_streams)
    files = Slots(files_at_once, "too many uploads are in progress; try again")
    probe = Probe(store, settings)
    scheduler = Scheduler(settings, store, metrics.job_ended)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(scheduler.recover)
        tasks = [asyncio.create_task(scheduler.work()), asyncio.create_task(watch.work())]
        yield
        await scheduler.close()
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    bearer = HTTPBearer(auto_error=False, description="One of the server's tokens.")
    secured = [Depends(bearer)] if settings.tokens else []  # the document says what is asked
    app = FastAPI(
        title="LayerLens",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        separate_input_output_schemas=False,
    )
    app.state.scheduler = scheduler

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        lines = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()]
        return JSONResponse({"detail": printable("\n".join(lines))[:10_000]}, 422)

    @app.exception_handler(ConfigurationError)
    @app.exception_handler(ActivationCacheError)
    async def _refused(_request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": printable(str(error))[:10_000]}, 422)

    @app.exception_handler(ClientDisconnect)
    async def _gone(_request: Request, _error: Exception) -> JSONResponse:
        """Nobody reads this; it is what the metrics count."""
        return JSONResponse({"detail": "the client closed the connection before the request was complete"}, 400)

    @app.exception_handler(sqlite3.OperationalError)
    @app.exception_handler(OSError)
    async def _no_room(_request: Request, error: Exception) -> JSONResponse:
        logger.error("the state directory cannot be used: %s", error)
        detail = f"the server cannot write its state ({reason_of(error)}); nothing was changed"
        return JSONResponse({"detail": printable(detail)}, 503, {"Retry-After": "30"})

    @app.exception_handler(405)
    async def _method(request: Request, _error: Exception) -> JSONResponse:
        """Starlette's answer names the methods of the first route of the path only."""
        routes = [route for route in app.routes if isinstance(route, Route)]
        fitting = [route.methods or () for route in routes if route.path_regex.match(request.url.path)]
        allowed = ", ".join(sorted({method for methods in fitting for method in methods}))
        return JSONResponse({"detail": f"this path takes {allowed}"}, 405, {"Allow": allowed})

    @app.exception_handler(Exception)
    async def _unexpected(_request: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return JSONResponse({"detail": "unexpected error; see the server's log"}, 500)

    def view(job: Job) -> JobView:
        return _view(job, settings.roots)

    def known(job_id: str) -> Job:
        job = store.get(job_id)
        if job is None:
            raise HTTPException(404, f"there is no job {job_id}")
        return job

    @app.post(
        "/v1/jobs", status_code=202, dependencies=secured, tags=["jobs"], summary="Submit a job",
        responses=ALWAYS | _problems(400, 409) | {202: {"links": LINKS}}, response_model=JobView, operation_id="submit",
    )  # fmt: skip
    def submit(
        submission: Submission,
        response: Response,
        idempotency_key: Annotated[
            str | None,
            Header(pattern=IDEMPOTENCY_KEY, description="The same key again gives the same job, not a second one."),
        ] = None,
        traceparent: Annotated[str | None, Header(description="W3C context that the job's trace continues.")] = None,
    ) -> JobView:
        """Queue a run or an optimisation; it is on disk when this answers, and survives a crash of the server."""
        config = _parsed(submission.config)
        statistics = None
        if submission.kind == "optimize":
            if submission.statistics is None:
                raise ConfigurationError("statistics: is missing; an optimisation needs the statistics of a run")
            statistics = statistics_path(submission.statistics, settings, store)
            if statistics is None:
                statistics = confined_path("statistics", submission.statistics, settings)
            config = confine_settings(config, settings)
        else:
            if submission.statistics is not None:
                raise ConfigurationError("statistics: a run measures its own; leave it out")
            config = confine(config, settings)
        content = config.model_dump(mode="json")
        content["runtime"]["cache_dir"] = str(settings.state_dir / CACHE)
        job = store.add(
            submission.kind,
            content,
            statistics=statistics,
            traceparent=traceparent if TRACEPARENT.fullmatch(traceparent or "") else None,
            idempotency_key=idempotency_key,
            max_queued=settings.max_queued,
        )
        if job is None:
            raise HTTPException(
                429, f"{settings.max_queued} jobs are already waiting; try again later", {"Retry-After": "30"}
            )
        if (job.kind, job.config, job.statistics) != (submission.kind, content, statistics):
            raise HTTPException(409, "Idempotency-Key: was used for another job; use a new key for each job")
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return view(job)

    @app.get(
        "/v1/jobs", dependencies=secured, tags=["jobs"], summary="List jobs", responses=ALWAYS, operation_id="list"
    )
    def listed(
        state: Annotated[State | None, Query(description="Only jobs in this state.")] = None,
        before: Annotated[int | None, Query(ge=1, le=2**62, description="Only jobs with a smaller number.")] = None,
        limit: Annotated[int, Query(ge=1, le=500, description="How many at most.")] = 50,
    ) -> JobList:
        """Jobs, newest first."""
        jobs = store.listed(state=state, before=before, limit=limit + 1)
        more = len(jobs) > limit
        return JobList(jobs=[view(job) for job in jobs[:limit]], next_before=jobs[limit - 1].seq if more else None)

    @app.get(
        "/v1/jobs/{job_id}", dependencies=secured, tags=["jobs"], summary="Show a job",
        responses=ALWAYS | _problems(404), operation_id="show",
    )  # fmt: skip
    def show(job_id: JobId) -> JobView:
        """State of a job."""
        return view(known(job_id))

    @app.post(
        "/v1/jobs/{job_id}/cancel", status_code=202, dependencies=secured, tags=["jobs"], summary="Cancel a job",
        responses=ALWAYS | _problems(404, 409), operation_id="cancel",
    )  # fmt: skip
    def cancel(job_id: JobId) -> JobView:
        """A waiting job is cancelled at once, a running one is asked to end and leaves no result."""
        before = known(job_id)
        job = store.cancel(job_id)
        if job is None or before.final:
            raise HTTPException(409, f"the job has already ended ({before.state})")
        return view(job)

    @app.delete(
        "/v1/jobs/{job_id}", status_code=204, dependencies=secured, tags=["jobs"], summary="Remove a job",
        responses=ALWAYS | _problems(404, 409), operation_id="remove",
    )  # fmt: skip
    def remove(job_id: JobId) -> None:
        """Forget a job that has ended, and its results."""
        known(job_id)
        if not scheduler.remove(job_id):
            raise HTTPException(409, "the job has not ended; cancel it first")

    @app.get(
        "/v1/jobs/{job_id}/events", dependencies=secured, tags=["jobs"], summary="Follow a job",
        response_class=StreamingResponse, operation_id="events",
        responses=ALWAYS
        | _problems(404, 503)
        | {200: {"content": {"text/event-stream": {"schema": EVENT}}, "description": "Events"}},
    )  # fmt: skip
    async def events(
        job_id: JobId,
        last_event_id: Annotated[
            str | None,
            Header(description="Number of the last event that the client received; the stream continues after it."),
        ] = None,
    ) -> StreamingResponse:
        """Server-sent events (state, stage, progress, warning) until the job has its last state."""
        await asyncio.to_thread(known, job_id)
        after = last_event_id or "0"
        if not (after.isascii() and after.isdigit() and len(after) <= 18):
            raise ConfigurationError("Last-Event-ID: must be the number of an event")
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        answer = CountedStream(watch.stream(job_id, int(after)), media_type="text/event-stream", headers=headers)
        answer.slots = watch.slots
        return answer

    @app.get(
        "/v1/jobs/{job_id}/result", dependencies=secured, tags=["results"], summary="Result of a job",
        responses=ALWAYS | _problems(404, 409), operation_id="result",
    )  # fmt: skip
    def result(job_id: JobId) -> JobResult:
        """What a job that succeeded found, and its files."""
        job = succeeded(job_id)
        assert job.outcome is not None
        fields = {name: value for name, value in job.outcome.items() if name in JobResult.model_fields}
        folder = settings.state_dir / JOBS / job_id / RESULTS
        fields["files"] = {
            path.relative_to(folder).as_posix(): path.relative_to(folder).as_posix()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink()
        } | {name: path for name, path in job.outcome["files"].items() if (folder / path).is_file()}
        return JobResult(id=job_id, **fields)

    @app.get(
        "/v1/jobs/{job_id}/files/{path:path}", dependencies=secured, tags=["results"], summary="Fetch a file",
        response_class=FileResponse, operation_id="fetch",
        responses=ALWAYS
        | _problems(404, 409, 503)
        | {200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
    )  # fmt: skip
    def fetch(job_id: JobId, path: Annotated[str, Path(description="Path as listed in the result.")]) -> FileResponse:
        """One file of a result."""
        succeeded(job_id)
        folder = (settings.state_dir / JOBS / job_id / RESULTS).resolve()
        try:
            found = (folder / path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise HTTPException(404, "the result has no such file") from error
        if not found.is_relative_to(folder) or not found.is_file():
            raise HTTPException(404, "the result has no such file")
        # Reports are HTML with data of users in it: never to be shown as a page of this server.
        headers = {"Content-Security-Policy": "sandbox; default-src 'none'", "X-Content-Type-Options": "nosniff"}
        answer = CountedFile(found, media_type="application/octet-stream", filename=found.name, headers=headers)
        answer.slots = files
        return answer

    def succeeded(job_id: str) -> Job:
        job = known(job_id)
        if job.state != SUCCEEDED:
            raise HTTPException(
                409, f"the job has no result; it is {job.state}" + (f": {job.error}" if job.error else "")
            )
        return job

    @app.post(
        "/v1/statistics", status_code=201, dependencies=secured, tags=["results"], summary="Send statistics",
        responses=ALWAYS, operation_id="upload",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )  # fmt: skip
    async def upload(request: Request) -> Upload:
        """Keep a statistics.safetensors for optimisations; the same content again is the same upload."""
        folder = settings.state_dir / UPLOADS
        with files.one():
            received, sha256 = await receive_upload(request.stream(), folder)
            spec = await asyncio.to_thread(keep_upload, received, sha256, folder)
        return Upload(statistics=f"upload:{sha256}", layers=len(spec.layers), model=spec.model_name)

    @app.get("/healthz", tags=["server"], summary="Does the server live?", operation_id="healthz")
    async def healthz() -> Health:
        """Answers as long as the process does, also while all threads are at work."""
        return Health(status="ok", version=__version__)

    @app.get(
        "/readyz", tags=["server"], summary="Whether the server accepts jobs", operation_id="readyz",
        responses={503: {"model": Readiness, "description": "It does not"}},
    )  # fmt: skip
    async def readyz(response: Response) -> Readiness:
        """Whether submissions can be written and jobs are being looked after."""
        try:
            counts = await asyncio.to_thread(store.counts)
            await asyncio.to_thread(probe.write)
        except (OSError, sqlite3.Error) as error:  # a full or lost disk, a database that is locked
            response.status_code = 503
            return Readiness(status="not ready", reason=f"the state directory cannot be used: {reason_of(error)}")
        if scheduler.closing or time.monotonic() - scheduler.alive_at > STUCK_S:
            response.status_code = 503
            return Readiness(status="not ready", reason="the server is not starting jobs", jobs=counts)
        return Readiness(status="ready", jobs=counts)

    @app.get(
        "/metrics", dependencies=secured, tags=["server"], summary="Metrics for Prometheus", operation_id="metrics",
        response_class=Response,
        responses=_problems(401, 403, 429)
        | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text format"}},
    )  # fmt: skip
    def exposition() -> Response:
        """Metrics of jobs and of this interface."""
        body, kind = metrics.exposition()
        return Response(body, media_type=kind)

    @app.get("/docs", include_in_schema=False)
    def documentation() -> HTMLResponse:
        """This page needs no script and nothing from elsewhere."""
        return HTMLResponse(docs_page(app.openapi()))

    add_page(app)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Measured, metrics=metrics)
    return app


def _parsed(config: dict[str, Any] | str) -> RunConfig:
    """The configuration of a submission.

    Raises:
        ConfigurationError: a line for each problem.
    """
    if isinstance(config, str):
        return parse_run_config(config, "config")
    try:
        return RunConfig.model_validate(config)
    except ValidationError as error:
        raise ConfigurationError(describe(error, "config").replace("config.", "")) from error


def _view(job: Job, roots: Sequence[pathlib.Path]) -> JobView:
    fields = {name: getattr(job, name) for name in JobView.model_fields if name != "number"}
    for name in ("model", "data"):
        fields[name] = _below(fields[name], roots)
    return JobView(number=job.seq, **fields)


def _below(place: str | None, roots: Sequence[pathlib.Path]) -> str | None:
    """A path as it is written in a configuration: from the root that it lies in."""
    path = pathlib.Path(place or "")
    root = next((root for root in roots if path.is_absolute() and path.is_relative_to(root)), None)
    return place if root is None else path.relative_to(root).as_posix()
