"""The web application of the viewer: the tool's page, and the answers to what it asks.

metadata.json   where the data is, and which charts the page begins with
query           one reading SQL statement: its rows as an Arrow stream or JSON
selection       the rows of a filter as a file: CSV, JSON, JSON lines or Parquet
cache/NAME      what the page keeps (its layout), until the server ends
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow as pa

from dataflex_pipeline.reports.viewer.colours import Colours
from dataflex_pipeline.reports.viewer.page import TABLE

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAMES = ("127.0.0.1", "localhost")
"""What a browser of this machine may call the server by; the port differs behind a forwarded one."""
BLOCK = 16384
"""Rows per block of an answer."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def make_app(
    connection: DuckDBPyConnection, static: Path, word: str, properties: Mapping[str, Any]
) -> Starlette:
    """Return the application.

    Args:
        connection: the database. static: the folder of the page.
        word: the first part of every path; requests without it find nothing.
        properties: what the page is told about the table.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    kept: dict[str, Any] = {}
    colours = Colours(connection)

    async def metadata(request: Request) -> Response:
        return JSONResponse({"props": properties, "database": {"type": "rest"}})

    async def no_icon(request: Request) -> Response:
        return Response(status_code=204)

    async def cache(request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "POST":
            kept[name] = await request.json()
            return JSONResponse({})
        return JSONResponse(kept[name]) if name in kept else Response(status_code=204)

    data = [
        Route("/metadata.json", metadata),
        Route("/query", _answering(connection, partial(_rows, colours)), methods=["GET", "POST"]),
        Route("/selection", _answering(connection, _file), methods=["POST"]),
        Route("/cache/{name}", cache, methods=["GET", "POST"]),
    ]
    page = [Mount("/data", routes=data), Mount("/", StaticFiles(directory=static, html=True))]
    guards = [Middleware(_Guard), Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES))]
    return Starlette(
        routes=[Route("/favicon.ico", no_icon), Mount(f"/{word}", routes=page)], middleware=guards
    )


class _Guard:
    """Refuses what another site's page asks for, and puts the protecting headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        given = Headers(scope=scope)
        origin = given.get("origin")
        if origin is not None and urlsplit(origin).netloc != given.get("host"):
            await PlainTextResponse("asked from another site", 403)(scope, receive, sending)
        else:
            await self.app(scope, receive, sending)


def _answering(
    connection: DuckDBPyConnection, answer: Callable[[DuckDBPyConnection, Mapping[str, Any]], Response]
) -> Callable[[Request], Any]:
    """Return the endpoint that answers from the database in a thread of its own; a failure is its message."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse

    def attempt(asked: Mapping[str, Any]) -> Response:
        import duckdb

        try:
            return answer(connection.cursor(), asked)
        except (duckdb.Error, pa.ArrowInvalid, ValueError, KeyError) as error:
            return JSONResponse({"error": str(error)}, 500)

    async def endpoint(request: Request) -> Response:
        text = request.query_params["query"] if request.method == "GET" else await request.body()
        return await run_in_threadpool(attempt, json.loads(text))

    return endpoint


def _reader(cursor: DuckDBPyConnection, sql: str) -> pa.RecordBatchReader:
    """Start a query.

    Raises:
        ValueError: it is not one reading statement.
    """
    import duckdb

    statements = cursor.extract_statements(sql)
    readable = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
    if len(statements) != 1 or statements[0].type not in readable:
        raise ValueError(f"A run is only read, by one statement that selects, and not by: {sql[:200]}")
    return cursor.sql(statements[0].query).to_arrow_reader(BLOCK)


def _rows(colours: Colours, cursor: DuckDBPyConnection, asked: Mapping[str, Any]) -> Response:
    from starlette.responses import JSONResponse, StreamingResponse

    if asked["type"] == "exec" and colours.change(asked["sql"]):
        return JSONResponse({})
    reader = _reader(cursor, asked["sql"])
    if asked["type"] == "arrow":
        return StreamingResponse(_stream(reader, cursor), media_type="application/vnd.apache.arrow.stream")
    with closing(cursor):
        lines = reader.read_all().to_pylist()
    return JSONResponse({} if asked["type"] == "exec" else json.loads(json.dumps(lines, default=str)))


def _stream(reader: pa.RecordBatchReader, cursor: DuckDBPyConnection) -> Iterator[bytes]:
    """Yield an answer as an Arrow stream, a block at a time; the cursor lives as long."""
    sink = io.BytesIO()
    with closing(cursor), pa.ipc.new_stream(sink, reader.schema) as writer:
        for block in reader:
            writer.write_batch(block)
            yield sink.getvalue()
            sink.seek(0)
            sink.truncate()
    yield sink.getvalue()


def _file(cursor: DuckDBPyConnection, asked: Mapping[str, Any]) -> Response:
    """Return the rows of a filter as a file, written on the disk first."""
    from starlette.background import BackgroundTask
    from starlette.responses import FileResponse

    predicate = asked.get("predicate")
    where = "" if predicate is None else f" where {predicate}"
    own = "columns(lambda name: not starts_with(name, '__'))"
    reader = _reader(cursor, f"select {own} from {TABLE}{where}")  # noqa: S608 (one reading statement)
    with tempfile.NamedTemporaryFile(prefix="dataflex-", delete=False) as stream:
        path = Path(stream.name)
    try:
        with closing(cursor):
            _WRITERS[asked["format"]](reader, path)
    except BaseException:
        path.unlink()
        raise
    return FileResponse(path, media_type="application/octet-stream", background=BackgroundTask(path.unlink))


def _parquet(reader: pa.RecordBatchReader, path: Path) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, reader.schema, compression="zstd") as writer:
        for block in reader:
            writer.write_batch(block)


def _csv(reader: pa.RecordBatchReader, path: Path) -> None:
    from pyarrow import csv

    with csv.CSVWriter(path, reader.schema) as writer:
        for block in reader:
            writer.write_batch(block)


def _jsonl(reader: pa.RecordBatchReader, path: Path) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for block in reader:
            stream.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in block.to_pylist())


def _json(reader: pa.RecordBatchReader, path: Path) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write("[")
        between = ""
        for block in reader:
            for each in block.to_pylist():
                stream.write(between + json.dumps(each, ensure_ascii=False))
                between = ",\n"
        stream.write("]\n")


_WRITERS = {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl, "json": _json}
