"""The MLflow store: where it is, how to connect to it, and its errors in one line.

The store is `sqlite:///<root>/mlflow.db` unless `MLFLOW_TRACKING_URI` names another. `<root>` is `DVC_ROOT` if DVC sets
it, so that queued and temporary experiments write to the same store as the working tree.
"""

import logging
import os
import re
import shlex
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote

from filelock import FileLock

# Read by mlflow when it is imported: no progress bars for files of a few kB.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES

from pipeline.errors import UserError
from pipeline.files import whole_file
from pipeline.tracking.views import KIND_TAG, set_views

EXPERIMENT = "gpt2-pipeline"
USER_VARIABLE, PASSWORD_VARIABLE = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
ARTIFACT_URIS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""The tables and columns in which MLflow keeps where files are, as absolute URIs."""


def root() -> Path:
    """Return the folder of the project: DVC's root, or the current folder outside of DVC."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def embedded_uri() -> str:
    """Return the URI of the store that is used unless `MLFLOW_TRACKING_URI` names another."""
    path = str(root() / "mlflow.db")
    if "?" not in path:
        return f"sqlite:///{path}"
    # SQLAlchemy would take what follows for options. With the driver's name, MLflow does not make the escaped folder.
    return f"sqlite+pysqlite:///{path.replace('?', '%3F')}"


def artifacts_uri() -> str:
    """Return the URI of the folder in which the embedded store keeps its files."""
    return (root() / "mlartifacts").as_uri()


def store_lock() -> FileLock:
    """Return the lock to hold while aliases move, and while the store is created: two processes doing that crash."""
    return FileLock(root() / "mlflow.db.lock")


def store_uri() -> str:
    """Return the URI of the tracking store in use.

    A server's user and password move from it to MLflow's variables for them: MLflow prints the URI after every run.
    Raises `UserError` if there is a user without a password, which has no such place.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri()
    server = re.fullmatch(r"(https?://)([^/]*)@(.*)", uri, re.DOTALL)
    if server is None:
        return uri
    user, _, password = server[2].partition(":")
    if not user or not password:
        raise UserError(
            f"MLFLOW_TRACKING_URI: {without_password(uri)} has a user without a password, or the reverse; "
            "give both, or a token in MLFLOW_TRACKING_TOKEN"
        )
    own = {USER_VARIABLE: unquote(user), PASSWORD_VARIABLE: unquote(password)}
    os.environ.update(own, MLFLOW_TRACKING_URI=server[1] + server[3])
    return os.environ["MLFLOW_TRACKING_URI"]


def connect(*, create: bool = True) -> MlflowClient:
    """Return a client of the tracking store. A missing embedded store is created, unless `create` is false.

    Raises `UserError` if the store cannot be reached, does not exist, belongs to another MLflow, or is in a folder that
    MLflow cannot name.
    """
    # The second logs the traceback of every error that it raises.
    quiet = {
        "alembic": logging.WARNING,
        "mlflow.store.db.utils": logging.CRITICAL,
        "mlflow.system_metrics": logging.WARNING,
    }
    for noisy, level in quiet.items():
        logging.getLogger(noisy).setLevel(level)
    uri = store_uri()
    is_embedded = uri == embedded_uri()
    if is_embedded and unquote(str(root())) != str(root()):
        raise UserError(
            f"{root()}: MLflow takes a % before two digits for an escape; rename the folder, "
            "or set MLFLOW_TRACKING_URI to a store elsewhere"
        )
    database = root() / "mlflow.db"
    if not create and is_embedded and not database.exists():
        raise UserError(
            f"{database}: there is no tracking store here; go to the folder of the project, "
            "or set MLFLOW_TRACKING_URI to its store"
        )
    try:
        with store_lock(), answering_soon():
            if is_embedded and not database.exists():
                _create(database)
            _check_schema(uri)
            mlflow.set_tracking_uri(uri)
            client = MlflowClient(uri)
            experiments = client.search_experiments(view_type=ViewType.ALL)
            if is_embedded:
                _find_artifacts_again(experiments)
    # ImportError: the driver of the database that the URI names is not installed.
    except (MlflowException, ImportError) as error:
        raise UserError(
            f"tracking store {without_password(uri)} cannot be used ({_reason(error)}); {_advice(uri, error)}"
        ) from error
    return client


def _create(database: Path) -> None:
    """Create an empty store, whole or not at all: MLflow cannot open one whose creation was cut off."""
    with tempfile.TemporaryDirectory() as folder, whole_file(database) as partial:
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        shutil.copyfile(Path(folder) / "mlflow.db", partial)


@cache
def _check_schema(uri: str) -> None:
    """Raise `UserError` if a database has the schema of another MLflow.

    MLflow would migrate an older one without a word, and there is no way back. Raises `MlflowException` if the database
    does not answer; MLflow would try for minutes.
    """
    if uri.partition(":")[0].partition("+")[0] not in DATABASE_ENGINES:
        return
    # Imported here: a client of a server need not have SQLAlchemy.
    from mlflow.store.db import utils
    from sqlalchemy.exc import SQLAlchemyError

    try:
        engine = utils.create_sqlalchemy_engine(uri)  # type: ignore[no-untyped-call]
        if engine.dialect.name == "sqlite" and not Path(engine.url.database or "").exists():
            return  # MLflow creates it.
        found = utils._get_schema_version(engine)  # type: ignore[no-untyped-call]
        engine.dispose()
    except SQLAlchemyError as error:
        raise MlflowException(str(error)) from error
    newest = utils._get_latest_schema_revision()  # type: ignore[no-untyped-call]
    if found in (None, newest):
        return
    place, own = f"tracking store {without_password(uri)}", f"MLflow {mlflow.__version__}"
    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if not any(migrations.glob(f"{found}_*.py")):
        raise UserError(
            f"{place}: a newer MLflow than {own} made it (schema {found}); run mlflow server of that version for it, "
            "and set MLFLOW_TRACKING_URI to the server, or to another store"
        )
    target = shlex.quote(uri) if uri == embedded_uri() else '"$MLFLOW_TRACKING_URI"'
    raise UserError(
        f"{place}: an older MLflow than {own} made it (schema {found}, not {newest}); copy it first, because an older "
        f"MLflow cannot read it afterwards, and run: mlflow db upgrade {target}"
    )


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn an error of MLflow (a full disk, a server that is gone) into a one-line `UserError`."""
    try:
        yield
    except MlflowException as error:
        raise UserError(
            f"MLflow, tracking store {without_password(store_uri())}: {_reason(error)}; "
            "run the command again once that is fixed"
        ) from error


def without_password(text: str) -> str:
    """Return the text without the users and passwords of the URIs in it, also of those that have them as parameters."""
    return re.sub(r"([?&;](?:user|\w*password)=)[^&;\s]*", r"\1...", re.sub(r"//\S*@", "//", text))


def _reason(error: BaseException) -> str:
    """Return one line that says what went wrong: what the database or the system says, else the error's first line."""
    inner: BaseException | None = error
    while inner is not None:
        # SQLAlchemy wraps it in lines of SQL and advice, and requests in the attempts to connect.
        if (original := getattr(inner, "orig", None)) is not None:
            return without_password(str(original))
        if isinstance(inner, OSError) and inner.strerror:
            return without_password(str(inner))
        inner = inner.__cause__ or inner.__context__
    line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if missing := re.match(r"API request to endpoint (\S+) failed with error code 404", line):
        return f"the server has no {missing[1]}: it is older than MLflow 3, or MLFLOW_TRACKING_URI lacks its path"
    return without_password(line)


def _advice(uri: str, error: BaseException) -> str:
    """Return what to do about a store that cannot be used."""
    if uri == embedded_uri():
        return "if it is damaged, move it away, and python -m pipeline restore records in a new one what out/ holds"
    if isinstance(error, MlflowException) and error.get_http_status_code() == HTTPStatus.UNAUTHORIZED:  # type: ignore[no-untyped-call]
        return f"set {USER_VARIABLE} and {PASSWORD_VARIABLE}, or MLFLOW_TRACKING_TOKEN"
    return "set MLFLOW_TRACKING_URI to another, or unset it for the embedded store"


def _find_artifacts_again(experiments: Iterable[Experiment]) -> None:
    """Let the embedded store look for its files in the project's folder, if that was moved, renamed or copied.

    MLflow keeps absolute URIs: it would read and write in the old folder, which it makes again.
    """
    here, own = artifacts_uri(), artifacts_uri().rpartition("/")[2]
    locations = {experiment.artifact_location for experiment in experiments}
    moved = [place for place in locations if place.startswith("file:") and place.endswith(f"/{own}") and place != here]
    if not moved:
        return
    with closing(sqlite3.connect(root() / "mlflow.db")) as database, database:
        for table, column in ARTIFACT_URIS:
            for old in moved:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                    (here, len(old) + 1, len(old) + 1, f"{old}/"),
                )


@contextmanager
def answering_soon() -> Iterator[None]:
    """Give up on an unreachable server within seconds, unless the user has set limits; MLflow tries for minutes."""
    # It warns of every repetition.
    connections = logging.getLogger("urllib3.connectionpool")
    level = connections.level
    connections.setLevel(logging.ERROR)
    try:
        with unless_set({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}):
            yield
    finally:
        connections.setLevel(level)


@contextmanager
def unless_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment that the user has not set, for as long as the block runs."""
    own = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]


def experiment_id(client: MlflowClient) -> str:
    """Return the id of the experiment of all runs (`MLFLOW_EXPERIMENT_NAME` or `EXPERIMENT`); create it if missing."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    with store_lock():
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            embedded = mlflow.get_tracking_uri() == embedded_uri()
            location = artifacts_uri() if embedded else None
            made = str(client.create_experiment(name, artifact_location=location))
            set_views(client, made)
            return made
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment {name!r} is deleted; run mlflow experiments restore -x {experiment.experiment_id}, "
            "or set MLFLOW_EXPERIMENT_NAME to another"
        )
    if KIND_TAG not in experiment.tags:
        # The store is of a time before these views, or the experiment of another program.
        set_views(client, experiment.experiment_id)
    return str(experiment.experiment_id)
