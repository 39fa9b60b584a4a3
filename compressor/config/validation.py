"""A YAML mapping against a pydantic model: every fault at once, each with its place."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, PydanticUserError, ValidationError
from pydantic_core import ErrorDetails

from compressor.config import yaml_source
from compressor.config.yaml_source import KeyPath, Node, Plain
from compressor.errors import ConfigError, Problem, closest, did_you_mean

_YAML_WORDS = {
    None: "a mapping",  # "an object"
    "dictionary": "a mapping",
    "array": "a list",
    "tuple": "a list",
    "integer": "an integer",
    "string": "text",
}
"""What YAML calls the types that pydantic asks for."""

Model = TypeVar("Model", bound=BaseModel)


def read_mapping(path: Path) -> tuple[Node, list[Problem]]:
    """Read a YAML file that must be a mapping, and its problems. Raises ConfigError if there is none to look into."""
    root, found = yaml_source.read(path)
    problems = list(found)
    if root is not None and not isinstance(root.value, Mapping):
        problems.append(root.place.problem(f"the file must be a mapping, got {show(root.plain())}"))
        root = None
    if root is None:
        raise ConfigError(problems)
    return root, problems


def validate(model: type[Model], node: Node, where: KeyPath = ()) -> tuple[Model | None, list[Problem]]:
    """Return the settings that the mapping `node` describes, or all that is wrong with them.

    `where` is the path of `node` in its file, for the messages.
    """
    try:
        # JSON is the input in which strict settings still take a list for a tuple and text for a path.
        return model.model_validate_json(json.dumps(node.plain())), []
    except ValidationError as error:
        return None, list(_problems(model, node, where, error.errors(include_url=False)))
    except PydanticUserError as error:
        return None, [node.place.problem(f"{model.__name__} must be a complete pydantic model, but: {error}")]


def all_problems(read: Sequence[Problem], found: Iterable[Problem]) -> list[Problem]:
    """The problems of reading a file and those `found` in what was read, from top to bottom, then those of `--set`.

    Of several at one place, those of reading are the cause of the others, and told alone.
    """
    told = {(problem.line, problem.column) for problem in read}
    rest = [problem for problem in found if problem.line is None or (problem.line, problem.column) not in told]
    return sorted(
        dict.fromkeys([*read, *rest]),
        key=lambda problem: (problem.line is None, problem.line or 0, problem.column or 0),
    )


def show(value: Plain) -> str:
    """`value` as it stands in a message, long ones cut."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def join_path(path: KeyPath) -> str:
    """`path` as `--set` takes it."""
    return ".".join(map(str, path))


def _problems(model: type[BaseModel], node: Node, where: KeyPath, errors: Sequence[ErrorDetails]) -> Iterator[Problem]:
    unmet: dict[KeyPath, list[ErrorDetails]] = defaultdict(list)
    misspelt: set[tuple[KeyPath, str | None]] = set()
    for error in errors:
        *parents, last = error["loc"] or ("",)
        path, found = node.at(tuple(parents))
        if error["type"] == "extra_forbidden":
            known = _known_keys(model, path)
            misspelt.add((path, closest(str(last), known)))
            listed = f"; known are {', '.join(known)}" if known else ""
            message = f"unknown key {show(str(last))}{_in(where + path)}{did_you_mean(str(last), known) or listed}"
            child = found.children[last]
            yield (child.key_place or child.place).problem(message)
        elif error["type"] != "missing":
            unmet[node.at(tuple(error["loc"]))[0]].append(error)
    for error in errors:
        *parents, last = error["loc"] or ("",)
        path, found = node.at(tuple(parents))
        if error["type"] == "missing" and (path, last) not in misspelt:
            yield found.place.problem(f"{join_path(where + path) or 'the file'} needs the key {last!r}")
    paths = [node.at(tuple(error["loc"]))[0] for error in errors]
    for path, reasons in unmet.items():
        if any(other != path and other[: len(path)] == path for other in paths):
            continue  # where one of several types is asked for, the value is of another one, and at fault further down
        _, found = node.at(path)
        yield found.place.problem(_unmet(join_path(where + path), found.plain(), reasons))


def _unmet(name: str, value: Plain, errors: Sequence[ErrorDetails]) -> str:
    """One message for all that a value must be and is not: several where a setting may be one of several types."""
    rules = [str(error["ctx"]["error"]) for error in errors if error["type"] in ("value_error", "assertion_error")]
    needs = [_say_need(error) for error in errors if "error" not in error.get("ctx", {})]
    choices = [choice for error in errors for choice in _choices(error)]
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    found = [f"{name} {' or '.join(dict.fromkeys(needs))}, got {show(value)}{hint}"] if needs else []
    return "; ".join([*found, *(f"{name}{' ' if rule.startswith('must ') else ': '}{rule}" for rule in rules)])


def _say_need(error: ErrorDetails) -> str:
    need = re.sub(r"^\w+ should ", "must ", error["msg"])
    need = re.sub(r" after validation, not \d+$", "", need)
    return re.sub(r"an object|a valid (\w+)", lambda match: _YAML_WORDS.get(match[1], f"a {match[1]}"), need)


def _choices(error: ErrorDetails) -> list[str]:
    if error["type"] not in ("literal_error", "enum"):
        return []
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])


def _in(path: KeyPath) -> str:
    return f" in {join_path(path)}" if path else ""


def _known_keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Fields of the models that may stand at `path` below `model`."""
    models = {model}
    for step in path:
        fields = [found.model_fields[step].annotation for found in models if step in found.model_fields]
        # a step that is no field is an index, or a key of a mapping whose values are these models
        models = {inner for annotation in fields for inner in _models_in(annotation)} if fields else models
    return sorted(name for found in models for name in found.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
