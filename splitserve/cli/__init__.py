"""``splitserve …``: the commands and their help. Each command is imported when it is called, so that ``--help`` is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from splitserve import __version__

GRPC_URL = "127.0.0.1:8001"
DEFAULT_REPOSITORY = "./models"

app = typer.Typer(
    name="splitserve",
    help="Serve a scikit-learn transform and an ONNX model as two services behind one address.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RepositoryOption = Annotated[
    str, typer.Option("--repository", "-r", envvar="MODEL_REPOSITORY", help="The model repository: a folder or a URL.")
]
FolderOption = Annotated[
    str, typer.Option("--repository", "-r", envvar="MODEL_REPOSITORY", help="The model repository, a folder that can be written.")
]
WritableOption = Annotated[
    str, typer.Option("--repository", "-r", envvar="MODEL_REPOSITORY", help="The model repository: a folder, or a bucket's URL.")
]
TrustedModulesOption = Annotated[
    list[str] | None, typer.Option(help="As PREPROCESS_TRUSTED_MODULES; may be given several times.")
]
EnvironmentMismatchOption = Annotated[
    bool, typer.Option("--allow-environment-mismatch", help="As PREPROCESS_ALLOW_ENVIRONMENT_MISMATCH.")
]
UnsafePickleOption = Annotated[bool, typer.Option("--allow-unsafe-pickle", help="Load pickles, which can run any code.")]
ModelArgument = Annotated[str, typer.Argument(help="Name of the model.")]
ClientUrlOption = Annotated[
    str, typer.Option("--url", "-u", help="The system: http://host:port, or grpc://host:port or host:port.")
]
UrlOption = Annotated[str, typer.Option("--url", "-u", help="Address of the proxy's gRPC face, host:port.")]


def main() -> None:
    """The entry point of the installed command."""
    app()


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(__version__)
        raise typer.Exit


def _folder(repository: str) -> Path:
    """The model repository as a folder, to write its index.

    Raises:
        typer.BadParameter: it is a URL.
    """
    from splitserve.repository.sources import is_url

    if is_url(repository):
        raise typer.BadParameter(
            f"{repository}: expected a folder, got a URL: services list buckets themselves and need no index there; for a web "
            "server, index the folder that is uploaded to it"
        )
    return Path(repository.removeprefix("file://"))


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def up(
    repository: RepositoryOption = DEFAULT_REPOSITORY,
    fused: Annotated[bool, typer.Option("--fused", help="All in one process instead of three.")] = False,
    host: Annotated[str, typer.Option(help="Address that the proxy listens on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="REST port of the proxy.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port of the proxy.")] = 8001,
    preprocess_port: Annotated[int, typer.Option(help="gRPC port of preprocess, on loopback.")] = 8011,
    predict_port: Annotated[int, typer.Option(help="gRPC port of predict, on loopback.")] = 8021,
    jobs_port: Annotated[int, typer.Option(help="gRPC port of jobs, on loopback.")] = 8031,
    admin_port: Annotated[
        str,
        typer.Option(
            help="Port of the proxy's admin listener (8002); those of preprocess, predict and jobs are 10, 20 and 30 above it. "
            "0: any free ones; off: none.",
            show_default=False,
        ),
    ] = "",
    jobs_dir: Annotated[str, typer.Option(envvar="JOBS_DIR", help="Folder of the jobs.")] = "./jobs",
    no_jobs: Annotated[bool, typer.Option("--no-jobs", help="Without the jobs service.")] = False,
) -> None:
    """Start all services on this machine.

    Waits until they are ready, prints example calls, follows their logs, and stops them on Ctrl-C.
    """
    from splitserve.cli.up import Ports, run

    if admin_port not in ("", "off") and not (admin_port.isdecimal() and int(admin_port) <= 65535 - 30):
        raise typer.BadParameter(f'expected a port, 0 for any free ones, or "off", got "{admin_port}"', param_hint="--admin-port")
    ports = Ports(
        http=http_port, grpc=grpc_port, preprocess=preprocess_port, predict=predict_port, jobs=jobs_port, admin=admin_port
    )
    raise typer.Exit(run(repository, host=host, ports=ports, is_fused=fused, jobs_dir="" if no_jobs else jobs_dir))


@app.command()
def serve(
    service: Annotated[Literal["proxy", "preprocess", "predict", "jobs", "fused"], typer.Argument(help="Which service.")],
) -> None:
    """Run one service in the foreground.

    Its settings are environment variables; docs/settings.md lists them.
    """
    from splitserve.cli.serve import run

    run(service)


@app.command()
def publish(
    name: Annotated[
        str, typer.Argument(help="What clients call the model; with --mlflow its registered name by default.", show_default=False)
    ] = "",
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Sample rows: .csv (with a header), .parquet, .npy or .npz.")
    ] = None,
    mlflow: Annotated[
        str,
        typer.Option(
            help="A scikit-learn model in MLflow's registry, models:/NAME@ALIAS or models:/NAME/VERSION: publishes both halves, "
            "with its input example as sample rows. Only its files are read."
        ),
    ] = "",
    rows: Annotated[
        Path | None,
        typer.Option(
            help="With --onnx, raw rows that the data were made from, in the same order: a release compares features on them. "
            "With --mlflow, more sample rows; required if the input example has fewer than 30."
        ),
    ] = None,
    pipeline: Annotated[
        Path | None, typer.Option(help="A fitted Pipeline (.skops, or .joblib with --allow-pickle): publishes both halves.")
    ] = None,
    transformer: Annotated[Path | None, typer.Option(help="Fitted transforms: publishes a preprocessor.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="An ONNX model: publishes a predictor.")] = None,
    trained_on: Annotated[
        Path | None,
        typer.Option(help="The fitted transforms that the ONNX model was trained on; it is paired only with equal ones."),
    ] = None,
    repository: WritableOption = DEFAULT_REPOSITORY,
    version: Annotated[int | None, typer.Option(help="Version number; the next free one by default.")] = None,
    input_name: Annotated[str, typer.Option(help="What the input is called if the data is one array.")] = "features",
    trusted_module: Annotated[
        list[str] | None, typer.Option(help="A module of your own transformers; may be given several times.")
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read .joblib and .pkl files, which can run any code: only your own. "
            "Write a pickle if skops does not support the transforms; services refuse it by default.",
        ),
    ] = False,
    golden: Annotated[
        str,
        typer.Option(help='What is stored as golden rows: "rows" of the data, "synthetic" ones, or those of a file like --data.'),
    ] = "rows",
    target: Annotated[
        list[str] | None,
        typer.Option(help="The name of a target, in the order of y's columns, if there are several; may be given several times."),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that converting and comparing may take.")] = 600.0,
) -> None:
    """Publish a model, or half of one, to a model repository."""
    from splitserve.cli.publish import run

    run(
        name,
        data,
        mlflow=mlflow,
        rows=rows,
        pipeline=pipeline,
        transformer=transformer,
        onnx=onnx,
        trained_on=trained_on,
        repository=repository,
        version=version,
        input_name=input_name,
        trusted_modules=trusted_module or [],
        allow_pickle=allow_pickle,
        golden=golden,
        targets=target or [],
        time_limit_s=time_limit,
    )


@app.command()
def release(
    model: ModelArgument,
    pair: Annotated[str, typer.Argument(help="The pair, K.M; with --withdraw the sequence number of a release.")],
    repository: WritableOption = DEFAULT_REPOSITORY,
    rows: Annotated[Path | None, typer.Option(help="More rows to prove it on: .csv, .npy or .npz.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Record the release; without it nothing is written.")] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take a release back, at once.")] = False,
    predict: Annotated[str, typer.Option(help="HOST:PORT of a third-party predict server, which has the predictor; gRPC.")] = "",
    accept_changed_features: Annotated[
        bool,
        typer.Option(
            "--accept-changed-features", help="Release it although features differ from those that the predictor was trained on."
        ),
    ] = False,
    accept_unknown_features: Annotated[
        bool,
        typer.Option("--accept-unknown-features", help="Release it although it is unknown what the predictor was trained on."),
    ] = False,
    trusted_module: TrustedModulesOption = None,
    allow_environment_mismatch: EnvironmentMismatchOption = False,
    allow_unsafe_pickle: UnsafePickleOption = False,
) -> None:
    """Prove a pair of halves that were published apart, and release it.

    The predictor may also be in a running third-party server (--predict); M is 0 where it does not number its versions.
    Runs the two together, compares features with those that the predictor was trained on and answers with those of the release
    that serves now, and shows what changes. With --yes it records the release: from then on the pair serves.
    """
    from splitserve.cli.release import run, run_withdraw

    if withdraw:
        raise typer.Exit(run_withdraw(model, pair, repository=repository))
    raise typer.Exit(
        run(
            model,
            pair,
            repository=repository,
            rows=rows,
            is_written=yes,
            accepts_changed=accept_changed_features,
            accepts_unknown=accept_unknown_features,
            trusted_modules=trusted_module or [],
            allow_environment_mismatch=allow_environment_mismatch,
            allow_unsafe_pickle=allow_unsafe_pickle,
            predict=predict,
        )
    )


@app.command()
def releases(
    model: ModelArgument,
    repository: RepositoryOption = DEFAULT_REPOSITORY,
) -> None:
    """List the releases of a model: sequence, pair, when, how it was proven, and which one serves by default."""
    from splitserve.cli.release import run_list

    raise typer.Exit(run_list(model, repository))


@app.command()
def rollback(
    model: ModelArgument,
    repository: WritableOption = DEFAULT_REPOSITORY,
) -> None:
    """Release again what served before the current release."""
    from splitserve.cli.release import run_rollback

    raise typer.Exit(run_rollback(model, repository=repository))


@app.command("publish-test-models")
def publish_test_models(repository: WritableOption = DEFAULT_REPOSITORY) -> None:
    """Publish simple models for trying clients and load generators.

    Sum and difference (simple, simple_string), and identity in every datatype.
    """
    from splitserve.cli.publish import run_test_models

    run_test_models(repository)


@app.command()
def models(repository: RepositoryOption = DEFAULT_REPOSITORY) -> None:
    """List the bundles of a model repository, and which pair of each model is released."""
    from splitserve.cli.models import run

    raise typer.Exit(run(repository))


@app.command()
def sign(
    key: Annotated[Path, typer.Option("--key", "-k", help="A private key in PEM form: P-256, P-384 or P-521, not encrypted.")],
    models: Annotated[list[str] | None, typer.Argument(help="Names of models; all by default.")] = None,
    repository: WritableOption = DEFAULT_REPOSITORY,
) -> None:
    """Sign the bundles, releases and routes of a model repository.

    Services with the public key in MODEL_SIGNATURE_KEY load only signed bundles. Signing again replaces the signature.
    """
    from splitserve.cli.sign import run

    raise typer.Exit(run(repository, key, models or []))


@app.command()
def matrix(
    repository: RepositoryOption = DEFAULT_REPOSITORY,
    image: Annotated[
        list[str] | None, typer.Option(help="Load the bundles in this image instead of here; may be given several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As tables in Markdown.")] = False,
    trusted_module: TrustedModulesOption = None,
    allow_environment_mismatch: EnvironmentMismatchOption = False,
    allow_unsafe_pickle: UnsafePickleOption = False,
    runtime: Annotated[Literal["auto", "sklearn", "onnx"], typer.Option(help="As PREPROCESS_RUNTIME.")] = "auto",
    signature_key: Annotated[
        str,
        typer.Option(
            envvar="MODEL_SIGNATURE_KEY",
            help="A public key in PEM form: refuse bundles that are not signed with its private key.",
        ),
    ] = "",
    docker: Annotated[str, typer.Option(envvar="DOCKER", help="The program that runs images.")] = "docker",
) -> None:
    """Show which releases can serve, and which pairs could become a release.

    Loads every bundle of the repository and replays the golden samples of bundles and releases, in this environment or in the
    images of services. Exits 1 if the newest release of a model or that of its route is refused, or a model has no release.
    """
    from splitserve.checks.examination import Allowed
    from splitserve.cli.matrix import run

    allowed = Allowed(
        trusted_modules=tuple(trusted_module or ()),
        environment_mismatch=allow_environment_mismatch,
        unsafe_pickle=allow_unsafe_pickle,
        runtime=runtime,
    )
    form: Literal["text", "json", "markdown"] = "json" if as_json else "markdown" if as_markdown else "text"
    raise typer.Exit(run(repository, image or [], form=form, allowed=allowed, signature_key=signature_key, docker=docker))


@app.command()
def index(repository: FolderOption = DEFAULT_REPOSITORY) -> None:
    """Write the index of a model repository, index.json.

    Services with an http:// or https:// model repository read it: write it again after every change of the repository.
    """
    from splitserve.cli.index import run

    raise typer.Exit(run(_folder(repository)))


@app.command()
def infer(
    model: ModelArgument,
    file: Annotated[
        Path | None, typer.Argument(help="Rows: .json, .jsonl, .csv, an image, or - for JSON on standard input.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="The rows themselves, as JSON.")] = None,
    url: ClientUrlOption = GRPC_URL,
    version: Annotated[str, typer.Option(help='A pair, "K.M"; the server\'s choice by default.')] = "",
    timeout_s: Annotated[float, typer.Option(help="Seconds that the call may take.")] = 30.0,
    output: Annotated[
        Literal["table", "json", "jsonl", "csv"], typer.Option("--output", "-o", help="How to print it.")
    ] = "table",
    encoding: Annotated[str, typer.Option(help="Of a .csv file; by default UTF-8, or UTF-16 if it begins with its mark.")] = "",
    no_header: Annotated[bool, typer.Option("--no-header", help="The first line of a .csv file is a row.")] = False,
) -> None:
    """Send rows and print the answer.

    JSON is a list of records by column name, or of rows; one record; one a line; an object with a list in "instances"; or the
    body of a V2 request. CSV is read as pandas reads it: empty cells, NA, null and the like are missing values.
    """
    from splitserve.cli.infer import run

    raise typer.Exit(
        run(
            model,
            file,
            rows=rows,
            url=url,
            version=version,
            timeout_s=timeout_s,
            output=output,
            encoding=encoding,
            has_header=not no_header,
        )
    )


@app.command()
def batch(
    model: Annotated[str, typer.Argument(help="Name of the model, or NAME@K.M for a pair.")],
    input: Annotated[
        str, typer.Argument(help="Parquet, CSV, JSON lines, Arrow, or a folder or glob of them or of pictures: a path or a URL.")
    ],
    output: Annotated[str, typer.Argument(help="A file with a suffix (.parquet, .csv, .jsonl, .arrow), or a folder.")],
    repository: RepositoryOption = DEFAULT_REPOSITORY,
    map: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=INPUT: read an input from a column of another name; *=INPUT: from all other columns."),
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Columns to copy to the output, or all; with commas.")] = None,
    to: Annotated[str, typer.Option(help="Format of a folder's files: parquet, csv, jsonl or arrow.")] = "",
    max_errors: Annotated[str, typer.Option(help="Stop with status 3 after so many bad rows: N or P%.")] = "10%",
    limit: Annotated[int | None, typer.Option(help="Score the first N rows only.")] = None,
    sample: Annotated[str, typer.Option(help="Score a share of the rows, e.g. 1%.")] = "100%",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show the plan and an estimate; write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with an equal run that has begun.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of another run.")] = False,
    engine: Annotated[str, typer.Option(help="Where shards are scored: local, ray, spark or dask.")] = "local",
    url: Annotated[
        str, typer.Option("--url", "-u", help="A running system that answers, in place of the repository's release.")
    ] = "",
    workers: Annotated[int, typer.Option(help="Processes; 0: one a core.")] = 0,
    encoding: Annotated[str, typer.Option(help="Of text.")] = "utf-8",
    delimiter: Annotated[
        str, typer.Option(help="Between the cells of CSV, e.g. ';' or tab; by the file's suffix if empty.")
    ] = "",
    escape_formulas: Annotated[
        bool, typer.Option("--escape-formulas", help="In CSV, write a quote before text that a spreadsheet would run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as JSON.")] = False,
    trusted_module: TrustedModulesOption = None,
    allow_environment_mismatch: EnvironmentMismatchOption = False,
    allow_unsafe_pickle: UnsafePickleOption = False,
    signature_key: Annotated[
        str, typer.Option(envvar="MODEL_SIGNATURE_KEY", help="A public key in PEM form: the release must be signed.")
    ] = "",
) -> None:
    """Score files and tables with a release, in processes of this machine or by an engine; docs/batch.md.

    Bad rows go to an errors file beside the output. A run that was stopped goes on where it was.
    Exit status: 0 done, 1 input, release or output cannot be used, 2 wrong options, 3 too many bad rows, 4 the system
    of --url is gone, 130 interrupted.
    """
    from splitserve.checks.examination import Allowed
    from splitserve.cli.batch import Arguments, run

    allowed = Allowed(
        trusted_modules=tuple(trusted_module or ()),
        environment_mismatch=allow_environment_mismatch,
        unsafe_pickle=allow_unsafe_pickle,
    )
    arguments = Arguments(
        model=model,
        input=input,
        output=output,
        repository=repository,
        map=map or [],
        keep=keep or [],
        to=to,
        limit=limit,
        sample=sample,
        max_errors=max_errors,
        encoding=encoding,
        delimiter=delimiter,
        engine=engine,
        url=url,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        escape_formulas=escape_formulas,
        dry_run=dry_run,
        as_json=as_json,
        signature_key=signature_key,
    )
    raise typer.Exit(run(arguments, allowed))


jobs_app = typer.Typer(help="Inferences that are answered later.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(jobs_app, name="jobs")

JobsFolderOption = Annotated[Path, typer.Option("--dir", envvar="JOBS_DIR", help="Folder of the jobs service.")]


@jobs_app.command("submit")
def submit_job(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    file: Annotated[Path | None, typer.Argument(help="Rows: .json, .csv, an image, or - for JSON on standard input.")] = None,
    rows: Annotated[str | None, typer.Option(help="The rows themselves, as JSON.")] = None,
    url: ClientUrlOption = GRPC_URL,
    version: Annotated[str, typer.Option(help='A pair, "K.M"; the one that serves now by default.')] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the answer and print it.")] = False,
    wait_s: Annotated[float | None, typer.Option(help="Wait for so many seconds at most; the job goes on.")] = None,
    key: Annotated[str, typer.Option(help="Idempotency key: the same one with the same rows gives the same job.")] = "",
    priority: Annotated[int, typer.Option(help="Among jobs: 1, the highest, to 9.", show_default="5")] = 0,
    timeout_s: Annotated[float, typer.Option(help="Seconds that an attempt may take; 0: the service's default.")] = 0.0,
    expires_s: Annotated[float, typer.Option(help="Seconds that the job may be queued; 0: any time.")] = 0.0,
    webhook: Annotated[str, typer.Option(help="https URL that is told when the job has ended.")] = "",
) -> None:
    """Submit rows as a job, and print its id, or with --wait its answer."""
    from splitserve.cli.jobs import submit

    options = {
        "idempotency_key": key,
        "priority": priority,
        "job_timeout_s": timeout_s,
        "expires_s": expires_s,
        "webhook": webhook,
    }
    is_awaited = wait or wait_s is not None
    raise typer.Exit(
        submit(model, file, rows=rows, url=url, version=version, options=options, is_awaited=is_awaited, wait_s=wait_s)
    )


@jobs_app.command("list")
def list_jobs(
    url: ClientUrlOption = GRPC_URL,
    model: Annotated[str, typer.Option(help="Only jobs for this model.")] = "",
    status: Annotated[str, typer.Option(help="Only jobs that are queued, running, succeeded, failed or cancelled.")] = "",
    limit: Annotated[int, typer.Option(help="How many.")] = 50,
) -> None:
    """List jobs, the newest first."""
    from splitserve.cli.jobs import list_jobs as run

    raise typer.Exit(run(url, model=model, status=status, limit=limit))


JobArgument = Annotated[str, typer.Argument(help="The id of a job.")]


@jobs_app.command("show")
def show_job(
    job: JobArgument,
    url: ClientUrlOption = GRPC_URL,
    wait_s: Annotated[float, typer.Option(help="Seconds to wait for its end.")] = 0.0,
) -> None:
    """Show a job as JSON."""
    from splitserve.cli.jobs import show

    raise typer.Exit(show(job, url, wait_s=wait_s))


@jobs_app.command("result")
def job_result(
    job: JobArgument,
    url: ClientUrlOption = GRPC_URL,
    wait_s: Annotated[float | None, typer.Option(help="Seconds to wait for its end; by default as long as it takes.")] = None,
) -> None:
    """Print the answer of a job as a table."""
    from splitserve.cli.jobs import result

    raise typer.Exit(result(job, url, wait_s=wait_s))


@jobs_app.command("cancel")
def cancel_jobs(
    jobs: Annotated[list[str], typer.Argument(help="Ids of jobs.")],
    url: ClientUrlOption = GRPC_URL,
) -> None:
    """Cancel jobs that have not ended."""
    from splitserve.cli.jobs import cancel

    raise typer.Exit(cancel(jobs, url))


@jobs_app.command("backup")
def backup_jobs(
    to: Annotated[Path, typer.Argument(help="A folder that is empty or does not exist.")],
    folder: JobsFolderOption = Path("./jobs"),
) -> None:
    """Copy the folder of a jobs service, also while it runs."""
    from splitserve.cli.jobs import backup

    raise typer.Exit(backup(folder, to))


@jobs_app.command("restore")
def restore_jobs(
    source: Annotated[Path, typer.Argument(help="A backup.")],
    folder: JobsFolderOption = Path("./jobs"),
) -> None:
    """Put a backup in the place of the folder of a jobs service that is stopped."""
    from splitserve.cli.jobs import restore

    raise typer.Exit(restore(folder, source))


@app.command()
def health(url: ClientUrlOption = GRPC_URL) -> None:
    """Show which models are ready, and why others are not.

    Exits 1 if none is ready.
    """
    from splitserve.cli.health import run

    raise typer.Exit(run(url))


@app.command()
def top(
    url: Annotated[
        list[str] | None,
        typer.Option("--url", "-u", help="An admin listener: http://host:port, host:port or a port; may be given several times."),
    ] = None,
    admin_port: Annotated[str, typer.Option(help="As splitserve up --admin-port, on this machine.")] = "",
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600.0)] = 2.0,
    timeout_s: Annotated[float, typer.Option(help="Seconds that a listener may take to answer.", min=0.1, max=3600.0)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look for one interval, print what was seen, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON; without --once a line for each look.")] = False,
    token_file: Annotated[
        str, typer.Option(envvar="SPLITSERVE_ADMIN_TOKEN_FILE", help="File with the token of the listeners.")
    ] = "",
    ca_file: Annotated[
        str, typer.Option(envvar="SPLITSERVE_ADMIN_CA_FILE", help="PEM file of their certificate authority: they have TLS.")
    ] = "",
    cert_file: Annotated[str, typer.Option(envvar="SPLITSERVE_ADMIN_CERT_FILE", help="PEM file of a client's certificate.")] = "",
    key_file: Annotated[str, typer.Option(envvar="SPLITSERVE_ADMIN_KEY_FILE", help="PEM file of its private key.")] = "",
) -> None:
    """Show what a running system does: stages, releases, rates, latencies, queues, errors.

    Reads the admin listeners of its services, by default those of this machine. q or Ctrl-C ends it. In a pipe it prints
    plain text. Exits 1 if no listener answers.
    """
    from splitserve.cli.top import Credentials, run

    credentials = Credentials(token_file, ca_file, cert_file, key_file)
    raise typer.Exit(
        run(
            url or [],
            admin_port=admin_port,
            interval_s=interval,
            timeout_s=timeout_s,
            is_once=once,
            is_json=as_json,
            credentials=credentials,
        )
    )


@app.command()
def verify(
    url: Annotated[str, typer.Argument(help="The system: http://host:port, or grpc://host:port or host:port.")],
    models: Annotated[list[str] | None, typer.Argument(help="Names of models; all of the repository by default.")] = None,
    repository: RepositoryOption = DEFAULT_REPOSITORY,
    version: Annotated[str, typer.Option(help='A pair, "K.M"; by default all that are ready, and those that must be.')] = "",
    timeout_s: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 30.0,
) -> None:
    """Send the golden rows of releases through a running system.

    Compares the answers with those that the releases have recorded. Exits 1 and shows the worst difference if one differs.
    """
    from splitserve.cli.verify import run

    raise typer.Exit(run(url, models or [], where=repository, version=version, timeout_s=timeout_s))


@app.command()
def reload(
    models: Annotated[list[str] | None, typer.Argument(help="Names of models; all by default.")] = None,
    url: UrlOption = GRPC_URL,
) -> None:
    """Poll the model repository now.

    Services poll about every second by default. This needs ALLOW_REPOSITORY_CONTROL=true at each of them.
    """
    from splitserve.cli.reload import run

    raise typer.Exit(run(models or [], url))


pipeline_app = typer.Typer(help="Training pipelines (docs/training.md).", no_args_is_help=True)
app.add_typer(pipeline_app, name="pipeline")


@pipeline_app.command("new")
def pipeline_new(
    folder: Annotated[Path, typer.Argument(help="A new folder; its name is the pipeline's, and a Python package's.")],
    template: Annotated[str, typer.Option(help="Which example to copy.")] = "tables",
) -> None:
    """Copy an example pipeline into a new folder.

    It runs by python -m NAME run, from the folder above.
    """
    from splitserve.cli.pipeline import run

    run(folder, template)
