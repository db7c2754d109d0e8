"""Rows of JSON arrays and of JSON Lines, as streams; errors name the line and the column."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import ijson

from dataflex_pipeline.data.settings import NumberedRow, Row
from dataflex_pipeline.data.sources.compressed import (
    NOTHING_WRITTEN,
    empty_file,
    key_twice,
    not_an_object,
    not_utf8,
    open_data,
    skip_bom,
)
from dataflex_pipeline.data.sources.half_pairs import HalfPairs, put_back
from dataflex_pipeline.data.sources.json_bounds import (
    LARGEST_ROW,
    BoundsError,
    JsonBounds,
    beyond,
    bounded_lines,
    check_bounds,
)
from dataflex_pipeline.errors import DataError

_BLOCK_BYTES = 65536


class _Object(dict[str, Any]):
    """An object of a JSON array that notices a key given twice."""

    __slots__ = ()

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            _TWICE.append(key)
        super().__setitem__(key, value)


_TWICE: list[str] = []
"""Keys that stood twice in one object; the parser must not be left by an exception from within."""


def read_json(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a JSON array of objects, by element; a ``.json`` file of JSON Lines as such."""
    with open_data(path) as stream:
        offset = skip_bom(stream, path)
        first, blanks = _first_byte(stream)
        line, second = (stream.readline(LARGEST_ROW), _first_byte(stream)[0]) if first == b"{" else (b"", b"")
    if not first:
        raise empty_file(path)
    if first == b"[":
        yield from enumerate(_read_array(path), 1)
    elif first != b"{":
        place = _line_and_column(path, offset + blanks)
        raise _malformed(path, *place, "it starts neither with [ nor with {")
    elif _is_object(first + line) or second == b"{":
        yield from read_jsonl(path)
    else:
        raise DataError(
            f"{path} holds one JSON object at its top level.",
            "Rows are read from an array of objects ([{...}, {...}]) or from one object per line.",
            "Store the list of rows itself as the file's top level.",
        )


def _first_byte(stream: io.BufferedReader) -> tuple[bytes, int]:
    """Move behind the next byte that is not white space; return it (nothing at the end) and how many were."""
    blanks = 0
    while block := stream.peek(_BLOCK_BYTES):
        found = len(block) - len(block.lstrip())
        stream.read(found)
        blanks += found
        if found < len(block):
            return stream.read(1), blanks
    return b"", blanks


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class _Bounded:
    """The bytes of an array's file, looked through before the parser gets them."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream, self._bounds, self.halves = stream, JsonBounds(outside=1), HalfPairs()

    def read(self, size: int) -> bytes:
        """Return the text of about so many bytes.

        Raises:
            BoundsError: a row is beyond a bound.
        """
        while block := self._stream.read(size):
            self._bounds.see(block)
            if text := self.halves.marked(block):
                return text
        return self.halves.marked(b"")


class _NumberTooLongError(Exception):
    """The fast way of the parser cannot hold a number: an integer of 64 bits or more, a float like 1e400."""


def _read_array(path: Path) -> Iterator[Row]:
    number = 0
    try:
        for row in _items(path):
            yield row
            number += 1
    except _NumberTooLongError:
        yield from islice(map(_with_floats, _items(path, any_number=True)), number, None)


def _with_floats(value: Any) -> Any:
    """Return a parsed value with floats in place of decimals."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, list):
        return [_with_floats(each) for each in value]
    if isinstance(value, dict):
        return {key: _with_floats(each) for key, each in value.items()}
    return value


def _items(path: Path, *, any_number: bool = False) -> Iterator[Row]:
    """Yield the items of a JSON array.

    Args:
        path: the file.
        any_number: parse numbers of any length, floats as decimals; it is slower.
    """
    with open_data(path) as stream:
        skip_bom(stream, path)
        bounded = _Bounded(stream)
        items = ijson.items(
            bounded, "item", use_float=not any_number, buf_size=_BLOCK_BYTES, map_type=_Object
        )
        number = 0
        _TWICE.clear()
        while True:
            try:
                value = next(items)
            except StopIteration:
                return
            except BoundsError as error:
                raise beyond(path, f", behind item {number}", error) from error
            except (ijson.JSONError, UnicodeDecodeError) as error:
                if "overflow" in str(error) and not any_number:
                    raise _NumberTooLongError from error
                raise _array_error(path, error) from error
            number += 1
            if _TWICE:
                raise key_twice(path, "", _TWICE[0])
            if not isinstance(value, dict):
                raise not_an_object(path, f"item {number}", value)
            yield put_back(value) if bounded.halves.found else value


def _array_error(path: Path, error: Exception) -> DataError:
    failing = _failing_byte(path)
    line, column = _line_and_column(path, failing)
    if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
        return not_utf8(path, line)
    reason = "the file ends too early" if failing is None else "unexpected text"
    if failing is not None and _at(path, failing - 1).lstrip(b"-,:[ ").startswith((b"NaN", b"Inf")):
        reason = "JSON has no NaN and no Infinity; write null, or one object per line"
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
    with open_data(path) as stream:
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


def _at(path: Path, offset: int) -> bytes:
    """Return a few bytes of a file."""
    with open_data(path) as stream:
        while offset > 0:
            offset -= len(stream.read(min(_BLOCK_BYTES, offset)))
        return stream.read(8)


def _line_and_column(path: Path, offset: int | None) -> tuple[int, int]:
    """Return line and column (from 1, in bytes) of a byte; None stands for the end of the file."""
    line, last_break, position = 1, -1, 0
    with open_data(path) as stream:
        while offset is None or position < offset:
            block = stream.read(_BLOCK_BYTES if offset is None else min(_BLOCK_BYTES, offset - position))
            if not block:
                break
            if b"\n" in block:
                line += block.count(b"\n")
                last_break = position + block.rindex(b"\n")
            position += len(block)
    return line, position - last_break


class _KeyTwiceError(Exception):
    """An object of a line has one key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwiceError(next(key for key in keys if keys.count(key) > 1))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_jsonl(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a file with one JSON object per line; an array is read as `read_json` reads it.

    Blank lines are passed over and counted.
    """
    with open_data(path) as stream:
        skip_bom(stream, path)
        is_array = _first_byte(stream)[0] == b"["
    if is_array:
        yield from enumerate(_read_array(path), 1)
        return
    with open_data(path) as stream:
        skip_bom(stream, path)
        for number, line in enumerate(bounded_lines(stream, path), 1):
            if line.strip():
                yield number, _parse_line(path, number, line)


def _parse_line(path: Path, number: int, line: bytes) -> Row:
    try:
        check_bounds(line)
        value = _DECODER.decode(line.decode("utf-8"))
    except BoundsError as error:
        raise beyond(path, f", line {number}", error) from error
    except UnicodeDecodeError as error:
        raise not_utf8(path, number) from error
    except json.JSONDecodeError as error:
        raise _malformed(path, number, error.colno, error.msg) from error
    except _KeyTwiceError as error:
        raise key_twice(path, f", line {number}", str(error)) from error
    if not isinstance(value, dict):
        raise not_an_object(path, f"line {number}", value)
    return value
