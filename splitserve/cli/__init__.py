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
UrlOption = Annotated[str, typer.Option("--url", "-u", help="Address of the proxy's gRPC face.")]


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
) -> None:
    """Start all services on this machine.

    Waits until they are ready, prints example calls, follows their logs, and stops them on Ctrl-C.
    """
    from splitserve.cli.up import Ports, run

    ports = Ports(http=http_port, grpc=grpc_port, preprocess=preprocess_port, predict=predict_port)
    raise typer.Exit(run(repository, host=host, ports=ports, is_fused=fused))


@app.command()
def serve(
    service: Annotated[Literal["proxy", "preprocess", "predict", "fused"], typer.Argument(help="Which service.")],
) -> None:
    """Run one service in the foreground.

    Its settings are environment variables; docs/settings.md lists them.
    """
    from splitserve.cli.serve import run

    run(service)


@app.command()
def publish(
    name: Annotated[str, typer.Argument(help="What clients call the model.")],
    data: Annotated[Path, typer.Option("--data", "-d", help="Sample rows: .csv (with a header), .npy or .npz.")],
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
    time_limit: Annotated[
        float, typer.Option(help="Seconds that converting and comparing may take, with --pipeline or --transformer.")
    ] = 600.0,
) -> None:
    """Publish a model, or half of one, to a model repository."""
    from splitserve.cli.publish import run

    run(
        name,
        data,
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
        time_limit_s=time_limit,
    )


@app.command()
def release(
    model: ModelArgument,
    pair: Annotated[str, typer.Argument(help="The pair, K.M; with --withdraw the sequence number of a release.")],
    repository: WritableOption = DEFAULT_REPOSITORY,
    rows: Annotated[Path | None, typer.Option(help="More rows to prove it on: .csv, .npy or .npz.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Record the release; without it nothing is written.")] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take a release back.")] = False,
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
    """List the releases of a model: sequence, pair, when, how it was proven, what serves now."""
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
    file: Annotated[Path | None, typer.Argument(help="Rows: .json, .csv, an image, or - for JSON on standard input.")] = None,
    rows: Annotated[str | None, typer.Option(help="The rows themselves, as JSON.")] = None,
    url: UrlOption = GRPC_URL,
    version: Annotated[str, typer.Option(help='A pair, "K.M"; the server\'s choice by default.')] = "",
    timeout_s: Annotated[float, typer.Option(help="Seconds that the call may take.")] = 30.0,
) -> None:
    """Send rows and print the answer as a table.

    JSON is a list of records by column name, or of rows, or an object with such a list in "instances".
    """
    from splitserve.cli.infer import run

    raise typer.Exit(run(model, file, rows=rows, url=url, version=version, timeout_s=timeout_s))


@app.command()
def health(url: UrlOption = GRPC_URL) -> None:
    """Show which models are ready, and why others are not.

    Exits 1 if none is ready.
    """
    from splitserve.cli.health import run

    raise typer.Exit(run(url))


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
