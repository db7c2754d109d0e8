"""Contracts of the user's own classes: what one declares, held to what its base class promises.

Every function of an extension is called with the arguments of its base class, by position. That it can be is
told from its signature, before anything is computed; what it returned is looked at where it is used.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dataflex_pipeline.api import Feature, Method
from dataflex_pipeline.config.redaction import HIDDEN, is_secret_name
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.store.fingerprint import canonical

SHOWN = 60
"""Characters of a value that an error shows."""


def broken(owner: object, what: str, wrong: str, expected: str) -> ConfigError:
    """Return the error for a class of the user's own that does not do what its base class promises.

    Args:
        owner: the class, or an object of it.
        what: the function or attribute, such as ``score()``.
        wrong: what it does instead, as the end of a sentence.
        expected: what it has to do, as a sentence.
    """
    kind = owner if isinstance(owner, type) else type(owner)
    place = place_of(kind)
    return ConfigError(
        f"{what} of the {_noun(kind)} {kind.__name__} ({place}) {wrong}.",
        expected,
        f"Correct {what} in {place}; docs/extending.md says what is expected.",
    )


def _noun(kind: type) -> str:
    return "method" if issubclass(kind, Method) else "feature" if issubclass(kind, Feature) else "rewarder"


def place_of(kind: type) -> str:
    """Return the file that a class was read from, or the name of its module."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return kind.__module__ if file is None else str(file)


def is_own(kind: type) -> bool:
    """Whether a class is none that comes with the package."""
    return not kind.__module__.startswith("dataflex_pipeline.")


def shown(value: object) -> str:
    """Return a value for an error: its text where that is short, else its type."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 (the user's own __repr__ may raise anything)
        text = ""
    if text and len(text) <= SHOWN and " at 0x" not in text:
        return text
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def verb(what: str) -> str:
    """Return the verb for the value of an attribute, or of a function."""
    return "returns" if what.endswith("()") else "is"


# ------------------------------------------------------------------ functions


def check_functions(kind: type, base: type, apart: Collection[str] = ()) -> None:
    """Check that every function of a base class can be called as the program calls it.

    Args:
        kind: the class. base: what it inherits from.
        apart: functions that only the class itself calls.

    Raises:
        ConfigError: one is something else, takes other arguments, is async or a generator.
    """
    for name, expected in vars(base).items():
        if (name.startswith("_") and name not in ("__init__", "__enter__", "__exit__")) or name in apart:
            continue
        found = inspect.getattr_static(kind, name)
        if inspect.isfunction(expected) and found is not expected:
            _check_function(kind, name, found, expected)
        elif isinstance(expected, property) and inspect.isroutine(found):
            raise broken(kind, name, "is a function", f"It is a value, or a function with @property: {name}.")


def missing_functions(kind: type) -> ConfigError:
    """Return the error for a class without functions that its base class leaves to it."""
    names = ", ".join(f"{name}()" for name in sorted(getattr(kind, "__abstractmethods__", ())))
    return broken(kind, names, "is missing", f"{kind.__name__} cannot be used without {names}.")


def _check_function(kind: type, name: str, found: Any, expected: Any) -> None:
    arguments = _arguments(expected)
    call = f"{name}({', '.join(arguments)})"
    called = f"The program calls {call}, and goes on with what it returns."
    bound = found.__get__(object(), kind) if hasattr(found, "__get__") else found
    if isinstance(found, property) or not callable(bound):
        raise broken(kind, f"{name}()", f"is no function, but {shown(found)}", called)
    kept = wrong_kind(bound)
    if kept is not None:
        missing = ": @contextmanager is missing above it" if name == "open" else ""
        raise broken(kind, f"{name}()", f"is {kept}{missing}", called)
    check_call(kind, f"{name}()", bound, arguments, call)


def _arguments(function: Any) -> list[str]:
    """Return the names of a method's arguments, as many as it is called with."""
    arguments: list[str] = []
    for name, each in list(inspect.signature(function).parameters.items())[1:]:
        several = each.kind is each.VAR_POSITIONAL  # of __exit__
        arguments += ["kind", name, "traceback"] if several else [name]
    return arguments


def wrong_kind(function: Any) -> str | None:
    """Return what a function is whose call does not run it to its end; None for any other."""
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return "an async function, which nothing waits for"
    return "a generator (it has a yield)" if inspect.isgeneratorfunction(function) else None


def wrong_call(function: Any, arguments: Sequence[str]) -> str | None:
    """Return why a function cannot be called with some arguments, by position; None where it can.

    Args:
        function: it. arguments: their names.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function in C says nothing
        return None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return f"takes {signature}: {error}"
    return None


def check_call(owner: object, what: str, function: Any, arguments: Sequence[str], call: str) -> None:
    """Check that a function takes the arguments that it is called with, by position.

    Args:
        owner: the class that it is of. what: how an error names it. function: itself.
        arguments: their names. call: as the program calls it.

    Raises:
        ConfigError: it takes others.
    """
    wrong = wrong_call(function, arguments)
    if wrong is not None:
        raise broken(owner, what, wrong, f"The program calls {call}.")


# ------------------------------------------------------------------ attributes


def check_text(kind: type, *names: str) -> None:
    """Check that attributes are text that says something."""
    for name in names:
        value = inspect.getattr_static(kind, name, None)
        if not isinstance(value, str) or not value.strip():
            wrong = "is missing" if value is None else f"is {shown(value)}"
            raise broken(kind, name, wrong, f"It is a text: {name} = '...'.")


def check_flags(owner: object, *names: str) -> None:
    """Check that attributes are true or false; of a class, those that are no properties."""
    for name in names:
        value = inspect.getattr_static(owner, name) if isinstance(owner, type) else getattr(owner, name)
        if not isinstance(value, bool | property):
            raise broken(owner, name, f"is {shown(value)}", "It is True or False.")


def check_version(kind: type) -> None:
    """Check that the version is a whole number."""
    value = inspect.getattr_static(kind, "version")
    if not isinstance(value, int) or isinstance(value, bool):
        raise broken(kind, "version", f"is {shown(value)}", "It is a whole number, raised with the numbers.")


def check_names(owner: object, name: str, values: Any) -> None:
    """Check that a value is a sequence of names."""
    if not isinstance(values, list | tuple) or not all(isinstance(each, str) for each in values):
        names = "It is a tuple of names, such as ('one',)."
        raise broken(owner, name, f"{verb(name)} {shown(values)}", names)
    twice = {each for each in values if values.count(each) > 1}
    if twice:
        raise broken(owner, name, f"names {', '.join(sorted(twice))} twice", "Each name stands there once.")


# ------------------------------------------------------------------ parameters


def check_params(kind: type, base: type[BaseModel], name: str = "Params", *, defaults: bool = False) -> None:
    """Check a class of parameters: what it inherits from, its annotations and the defaults.

    Args:
        kind: the class that it stands in. base: what it has to inherit from.
        name: of the attribute.
        defaults: whether every parameter needs a default.

    Raises:
        ConfigError: it cannot be used.
    """
    params = inspect.getattr_static(kind, name, None)
    if not (isinstance(params, type) and issubclass(params, base)):
        wrong = f"is {shown(params)}" if not isinstance(params, type) else "inherits from something else"
        inherits = f"It is a class that inherits from {base.__module__}.{base.__qualname__}."
        raise broken(kind, name, wrong, inherits)
    try:
        params.model_rebuild()
    except Exception as error:  # pydantic's own, or whatever an annotation raises
        said = str(error).partition("\n")[0]
        wrong = f"has an annotation that means nothing: {said}"
        raise broken(kind, name, wrong, "Import the types that the annotations name.") from error
    lacking = [field for field, info in params.model_fields.items() if info.is_required()]
    if lacking and defaults:
        every = "Every parameter has one, so that the method can be used and listed without setting any."
        raise broken(kind, f"{name}.{lacking[0]}", "has no default", every)
    _check_defaults(kind, name, params)


def _check_defaults(kind: type, name: str, params: type[BaseModel]) -> None:
    values = dict(_defaults(params.model_fields))
    try:
        params(**values)
    except ValidationError as error:
        for problem in error.errors():
            field = problem["loc"][0] if problem["loc"] else None
            if field in values:
                given = HIDDEN if is_secret_name(str(field)) else shown(values[str(field)])
                raise broken(
                    kind, f"{name}.{field}", f"has the default {given}", f"{problem['msg']}."
                ) from error


def _defaults(fields: Mapping[str, FieldInfo]) -> Iterator[tuple[str, Any]]:
    for name, info in fields.items():
        if not (info.is_required() or info.alias or info.default_factory_takes_validated_data):
            yield name, info.get_default(call_default_factory=True)


def check_plain(owner: object, params: Any, base: type[BaseModel], called: str = "Params") -> None:
    """Check that an object has parameters of its class, whose values a fingerprint can hold.

    Raises:
        ConfigError: it has not, or one of them has no stable text.
    """
    if not isinstance(params, base):
        said = "A class with an __init__ of its own calls super().__init__ with what it was given."
        raise broken(owner, "__init__()", "leaves self.params unset", said)
    for name in type(params).model_fields:
        stable = "Parameters are kept beside the scores: text, numbers, true or false, lists and mappings."
        try:
            canonical(params.model_dump(mode="json", include={name}))
        except (TypeError, ValueError) as error:
            value = HIDDEN if is_secret_name(name) else shown(getattr(params, name))
            wrong = f"is {value}, which cannot be written down ({str(error).splitlines()[0]})"
            raise broken(owner, f"{called}.{name}", wrong, stable) from error
