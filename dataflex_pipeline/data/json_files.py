"""Rows of JSON arrays and of JSON Lines, as streams; errors name the line and the column."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import ijson

from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.text_files import NOTHING_WRITTEN, empty_file, not_an_object, not_utf8, skip_bom
from dataflex_pipeline.errors import DataError

_BLOCK_BYTES = 65536


def read_json(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array of objects; a ``.json`` file of JSON Lines is read as such."""
    with path.open("rb") as stream:
        offset = skip_bom(stream, path)
        block = stream.read(_BLOCK_BYTES)
    start = block.lstrip()
    if not start:
        raise empty_file(path)
    if start.startswith(b"["):
        yield from _read_array(path)
    elif start.startswith(b"{") and _is_object(start.splitlines()[0]):
        yield from read_jsonl(path)
    elif start.startswith(b"{"):
        raise DataError(
            f"{path} holds one JSON object at its top level.",
            "Rows are read from an array of objects ([{...}, {...}]) or from one object per line.",
            "Store the list of rows itself as the file's top level.",
        )
    else:
        place = _line_and_column(path, offset + len(block) - len(start))
        raise _malformed(path, *place, "it starts neither with [ nor with {")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read_array(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        skip_bom(stream, path)
        items = ijson.items(stream, "item", use_float=True, buf_size=_BLOCK_BYTES)
        number = 0
        while True:
            try:
                value = next(items)
            except StopIteration:
                return
            except (ijson.JSONError, UnicodeDecodeError) as error:
                raise _array_error(path, error) from error
            number += 1
            if not isinstance(value, dict):
                raise not_an_object(path, f"item {number}", value)
            yield value


def _array_error(path: Path, error: Exception) -> DataError:
    failing = _failing_byte(path)
    line, column = _line_and_column(path, path.stat().st_size if failing is None else failing)
    if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
        return not_utf8(path, line)
    reason = "the file ends too early" if failing is None else "unexpected text"
    return _malformed(path, line, column, reason)


def _malformed(path: Path, line: int, column: int, reason: str) -> DataError:
    return DataError(
        f"{path}, line {line}, column {column}: not valid JSON ({reason}).",
        "The file has to be a JSON array of objects, or one JSON object per line.",
        f"Repair that place. {NOTHING_WRITTEN}",
    )


def _failing_byte(path: Path) -> int | None:
    """Return the offset at which the JSON parser gives up; None if only at the end of the file.

    The parser does not say where it is, so the file is fed to it again: by blocks to find the failing
    one, then that one byte by byte.
    """
    block = _feed(path, _BLOCK_BYTES, until=None)
    return None if block is None else _feed(path, 1, until=block)


def _feed(path: Path, step: int, until: int | None) -> int | None:
    """Parse by blocks up to byte ``until``, then in steps; return the offset of the failing piece."""
    events = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events)
    with path.open("rb") as stream:
        offset = skip_bom(stream, path)
        while True:
            blocks = until is not None and offset < until
            piece = stream.read(min(_BLOCK_BYTES, until - offset) if blocks and until else step)
            if not piece:
                return None
            try:
                parser.send(piece)
            except (ijson.JSONError, UnicodeDecodeError):
                return offset
            del events[:]
            offset += len(piece)


def _line_and_column(path: Path, offset: int) -> tuple[int, int]:
    """Return line and column (from 1, in bytes) of a byte."""
    line, last_break, position = 1, -1, 0
    with path.open("rb") as stream:
        while position < offset:
            block = stream.read(min(_BLOCK_BYTES, offset - position))
            if not block:
                break
            if b"\n" in block:
                line += block.count(b"\n")
                last_break = position + block.rindex(b"\n")
            position += len(block)
    return line, offset - last_break


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object per line; blank lines are allowed."""
    with path.open("rb") as stream:
        skip_bom(stream, path)
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _parse_line(path, number, line)


def _parse_line(path: Path, number: int, line: bytes) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, number) from error
    except json.JSONDecodeError as error:
        raise _malformed(path, number, error.colno, error.msg) from error
    except RecursionError as error:
        raise _malformed(path, number, 1, "nested too deeply") from error
    if not isinstance(value, dict):
        raise not_an_object(path, f"line {number}", value)
    return value
