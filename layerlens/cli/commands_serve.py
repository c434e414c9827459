"""``serve`` offers LayerLens over HTTP; ``submit`` and ``jobs`` use such a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.places import Config, Debug, Json, Quiet
from layerlens.exceptions import LayerLensError

if TYPE_CHECKING:
    from layerlens.service.client import Client

Server = Annotated[
    str | None,
    typer.Option("--server", "-s", help="Address of the server; $LAYERLENS_SERVER or this machine when not given."),
]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="File with the token; $LAYERLENS_TOKEN when not given.")
]
AllowHttp = Annotated[bool, typer.Option("--allow-http", help="Send the token over plain HTTP to another machine.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.", show_default=False)]
jobs_app = typer.Typer(help="List, show, cancel and fetch the jobs of a server.", no_args_is_help=True)


@guarded("interrupted jobs wait for the next server")
def serve(
    root: Annotated[
        list[Path] | None, typer.Option("--root", help="Folder from which jobs may read models and data; repeatable.")
    ] = None,
    state_dir: Annotated[Path, typer.Option("--state-dir", help="Directory for jobs and results.")] = Path(
        "layerlens-state"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8642,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with access tokens, one per line, in addition to $LAYERLENS_SERVE_TOKEN."),
    ] = None,
    allow_url: Annotated[
        list[str] | None, typer.Option(help="Prefix of URLs that jobs may read and write; repeatable.")
    ] = None,
    allow_package: Annotated[
        list[str] | None, typer.Option(help="Package that package:NAME may import; repeatable.")
    ] = None,
    allow_hub: Annotated[
        bool, typer.Option("--allow-hub", help="Allow jobs to load from the Hugging Face hub.")
    ] = False,
    allow_code: Annotated[
        list[str] | None,
        typer.Option(help="Module whose functions jobs may call, such as model.factory my_project:build; repeatable."),
    ] = None,
    allow_pickles: Annotated[
        bool,
        typer.Option(
            "--allow-pickles", help="Allow jobs to load .pt and .bin files below the roots. Such files can run code."
        ),
    ] = False,
    max_running: Annotated[int, typer.Option(min=1, help="Jobs that run at the same time.")] = 1,
    max_queued: Annotated[int, typer.Option(min=1, help="Jobs that may wait in the queue.")] = 1000,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests per second for each token.")] = 50.0,
    burst: Annotated[int, typer.Option(min=1, help="Requests at once for each token.")] = 200,
    max_body_kb: Annotated[int, typer.Option(min=1, help="Largest request, KiB.")] = 1024,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest statistics file, MiB.")] = 256,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Open connections; fewer if the system allows fewer open files.")
    ] = 2000,
    max_connections_per_address: Annotated[
        int, typer.Option(min=0, help="Open connections per address; 0: three quarters of all.")
    ] = 0,
    max_streams: Annotated[int, typer.Option(min=1, help="Open event streams.")] = 100,
    job_timeout_s: Annotated[float, typer.Option(min=1, help="Maximum time for one job.")] = 86400.0,
    threads: Annotated[int, typer.Option(min=0, help="Threads per job; 0: all cores.")] = 0,
    tls_certificate: Annotated[Path | None, typer.Option(help="Certificate for HTTPS (PEM file).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of the certificate (PEM file).")] = None,
    debug: Debug = False,
) -> None:
    """Serve LayerLens over HTTP. Jobs run in their own processes and survive a crash of the server."""
    from layerlens.service.server import serve as run_server
    from layerlens.service.settings import MIB, ServiceSettings, load_tokens

    settings = ServiceSettings(
        state_dir=state_dir.absolute(),
        roots=tuple(path.absolute() for path in root or [Path.cwd()]),
        host=host,
        port=port,
        tokens=load_tokens(token_file),
        allow_urls=tuple(allow_url or ()),
        allow_packages=tuple(allow_package or ()),
        allow_hub=allow_hub,
        allow_code=tuple(allow_code or ()),
        allow_pickles=allow_pickles,
        max_running=max_running,
        max_queued=max_queued,
        rate_per_s=rate,
        burst=burst,
        max_body_bytes=max_body_kb * 1024,
        max_upload_bytes=max_upload_mb * MIB,
        max_connections=max_connections,
        max_connections_per_address=max_connections_per_address,
        max_streams=max_streams,
        job_timeout_s=job_timeout_s,
        threads=threads,
    )
    run_server(
        settings,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        ready=lambda address: output.note(
            f"LayerLens listens on {address} (open it in a browser; documentation: {address}/docs)"
        ),
    )


@guarded("the job continues on the server; `layerlens jobs` shows it")
def submit(
    config: Config,
    statistics: Annotated[
        str | None,
        typer.Option(
            help="Choose again from these statistics: a local statistics.safetensors, job:ID, or upload:SHA256."
        ),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--output", "-o", help="Wait for the job, and fetch its results into this directory.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Follow the job to its end.")] = False,
    server: Server = None,
    token_file: TokenFile = None,
    allow_http: AllowHttp = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Submit a job to a LayerLens server. Paths in the configuration refer to the server."""
    client = _client(server, token_file, allow_http)
    if directory is not None:
        from layerlens.utils.atomic import check_writable

        check_writable(directory)
    if statistics is None:
        job = client.submit_run(config)
    else:
        local = not statistics.startswith(("job:", "upload:"))
        job = client.submit_optimization(config, Path(statistics) if local else statistics)
    if not (wait or directory is not None):
        _show(job, json, quiet, f"Job {job['id']} is {job['state']}.")
        return
    job = _follow(client, job["id"], quiet or json)
    _fail_like(job)
    if directory is not None:
        client.download(job["id"], directory)
    result = client.result(job["id"])
    where = f"; results in {output.short(directory)}" if directory is not None else ""
    _show({**job, "result": result}, json, quiet, f"Score {result['score']:.6g}, gap {result['gap']:.2g}{where}")


@jobs_app.command("ls")
@guarded()
def ls(
    state: Annotated[
        str | None, typer.Option(help="Show only jobs in this state: queued, running, succeeded, failed or cancelled.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Number of jobs to list.")] = 50,
    server: Server = None,
    token_file: TokenFile = None,
    allow_http: AllowHttp = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the newest jobs."""
    found = _client(server, token_file, allow_http).jobs(state=state, limit=limit)
    if json:
        output.json_result(found)
        return
    from layerlens.cli.tables import new_table

    table = new_table("Jobs")
    for name in ("id", "kind", "state", "attempts", "created (UTC)", "error"):
        table.add_column(name, no_wrap=name != "error")
    for job in found:
        row = (job["id"], job["kind"], job["state"], str(job["attempts"]), job["created_at"][:19], job["error"] or "")
        table.add_row(*row)
    output.console().print(table)


@jobs_app.command("show")
@guarded()
def show(
    job: JobId,
    server: Server = None,
    token_file: TokenFile = None,
    allow_http: AllowHttp = False,
    debug: Debug = False,
) -> None:
    """Show a job and its result as JSON."""
    client = _client(server, token_file, allow_http)
    found = client.job(job)
    output.json_result({**found, "result": client.result(job)} if found["state"] == "succeeded" else found)


@jobs_app.command("cancel")
@guarded()
def cancel(
    job: JobId,
    server: Server = None,
    token_file: TokenFile = None,
    allow_http: AllowHttp = False,
    debug: Debug = False,
) -> None:
    """Cancel a job that has not ended."""
    found = _client(server, token_file, allow_http).cancel(job)
    output.note(f"Job {job} is {found['state']}" + ("; it was asked to end." if found["state"] == "running" else "."))


@jobs_app.command("fetch")
@guarded("the directory is unchanged")
def fetch(
    job: JobId,
    directory: Annotated[Path, typer.Option("--output", "-o", help="Directory for the results.")] = Path("out"),
    server: Server = None,
    token_file: TokenFile = None,
    allow_http: AllowHttp = False,
    debug: Debug = False,
) -> None:
    """Fetch the results of a job."""
    files = _client(server, token_file, allow_http).download(job, directory)
    output.note(f"Wrote {len(files)} files to {output.short(directory)}")


def _client(server: str | None, token_file: Path | None, allow_http: bool) -> Client:
    from layerlens.exceptions import ConfigurationError
    from layerlens.service.client import Client

    token = None
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"--token-file {token_file}: cannot be read: {reason}") from error
    return Client(server, token, allow_http=allow_http)


def _follow(client: Client, job_id: str, quiet: bool) -> dict[str, Any]:
    """Show what happens to the job until it has ended."""
    for event in client.events(job_id):
        if quiet:
            continue
        data = event.data
        if event.type == "warning":
            output.warning(data["message"])
        elif event.type == "state":
            output.note(f"{data['state']}" + (f" ({data['why']})" if "why" in data else ""))
        elif event.type == "progress":
            total = f"/{data['total']}" if data["total"] else ""
            output.note(f"  {data['step']}" + (f" {data['done']}{total}" if data["done"] else ""))
    return client.job(job_id)


def _fail_like(job: dict[str, Any]) -> None:
    """End as the command would have ended here."""
    if job["state"] == "succeeded":
        return
    from layerlens.exceptions import ServiceError

    error: LayerLensError = ServiceError(job["error"] or f"the job was {job['state']}")
    error.exit_code = job["exit_code"] or 1
    raise error


def _show(job: dict[str, Any], json: bool, quiet: bool, line: str) -> None:
    if json:
        output.json_result(job)
    elif not quiet:
        output.note(line)
