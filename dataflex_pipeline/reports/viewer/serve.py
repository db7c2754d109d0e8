"""The viewer of a run: Embedding Atlas in a browser of this machine, over the run's joined table.

The page is the front end that comes in the wheel of ``embedding-atlas``. It asks for its data in SQL; the
server here answers from an in-memory DuckDB over the table's file, in bounded memory: the tool's own server
would hold the whole pool in pandas and in DuckDB. Four things keep others out: the server listens on this
machine's 127.0.0.1 alone; its address holds a random word; a request that names another host or comes from
another site's page is refused (a rebound domain name, a foreign page); and the page may fetch nothing from
elsewhere (a content security policy).
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.reports.joined import Joined
from dataflex_pipeline.reports.query import literal
from dataflex_pipeline.reports.viewer.app import make_app
from dataflex_pipeline.reports.viewer.colours import ROWS
from dataflex_pipeline.reports.viewer.page import properties

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

HOST = "127.0.0.1"
PORT = 5055
TOOL = "embedding-atlas"
KNOWN = re.compile(r"0\.26\.")
"""Releases of the tool whose front end asks for its data as `viewer_app` answers."""
MEMORY = "2GB"
"""What DuckDB may hold before it writes to the temporary folder."""


def front_end() -> Path:
    """Return the folder of the tool's page.

    Raises:
        UserError: the tool is not installed, or is a release of another protocol.
    """
    try:
        found = version(TOOL)
    except PackageNotFoundError:
        found = None
    spec = find_spec("embedding_atlas")
    if found is None or spec is None or spec.origin is None:
        raise UserError(
            "dataflex view needs embedding-atlas, which is not installed.",
            "It is the page that shows the rows, and comes as an extra.",
            "Install it: pip install 'dataflex-pipeline[view]'.",
        )
    if not KNOWN.match(found):
        raise UserError(
            f"embedding-atlas is {found} here.",
            "Its page asks for its data in a way of its own, and this version knows that of 0.26.",
            "Install that: pip install 'dataflex-pipeline[view]'.",
        )
    return Path(spec.origin).parent / "static"


def serve(joined: Joined, run: str, port: int, ready: Callable[[str, int], object]) -> None:
    """Serve the viewer until it is interrupted.

    Args:
        joined: the run's table. run: its name. port: to listen on; a free one where that is taken.
        ready: told the address, and the port.

    Raises:
        UserError: the tool is not installed.
    """
    static = front_end()
    import uvicorn

    word = secrets.token_urlsafe(12)
    # uvicorn raises the KeyboardInterrupt again once it has shut down.
    with (
        listening(port) as listener,
        database(joined.path) as connection,
        contextlib.suppress(KeyboardInterrupt),
    ):
        app = make_app(connection, static, word, properties(joined, run))
        settings = uvicorn.Config(
            app, log_level="error", access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=1
        )
        taken = listener.getsockname()[1]
        ready(f"http://{HOST}:{taken}/{word}/", taken)
        uvicorn.Server(settings).run(sockets=[listener])


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """Yield a socket that listens on this machine alone, at a port or, where that is taken, at a free one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            listener.bind((HOST, 0))
        listener.listen()
        yield listener


@contextlib.contextmanager
def database(path: Path) -> Iterator[DuckDBPyConnection]:
    """Yield an in-memory database whose one table is a file; a query reaches nothing else."""
    import duckdb

    with (
        tempfile.TemporaryDirectory(prefix="dataflex-") as spill,
        duckdb.connect(":memory:") as connection,
    ):
        # Under a name of our own: `*`, `?` and `[` in a path make a pattern, for which it lists folders.
        named = Path(spill) / "rows.parquet"
        named.symlink_to(path.resolve())
        rows = f"read_parquet({literal(named)}, hive_partitioning = false)"
        connection.execute(f"create view {ROWS} as from {rows}")
        for setting in (
            f"memory_limit = '{MEMORY}'",
            f"temp_directory = {literal(spill)}",
            "autoinstall_known_extensions = false",
            "autoload_known_extensions = false",
            "enable_progress_bar = false",
            f"allowed_paths = [{literal(named)}]",
            f"allowed_directories = [{literal(spill)}]",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            connection.execute(f"set {setting}")
        yield connection
