"""A YAML file as plain values that know their place; whatever is not plain YAML 1.2 data is a problem."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, final

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)
from ruamel.yaml.reader import ReaderError

from compressor.errors import ConfigError, Problem
from compressor.references.files_read import pause

MAX_BYTES = 256_000
MAX_DEPTH = 40
MAX_NODES = 20_000
"""Values in a file, each use of an alias counted like a copy."""

Scalar: TypeAlias = str | int | float | bool | None
Plain: TypeAlias = Scalar | list["Plain"] | dict[str, "Plain"]
KeyPath: TypeAlias = tuple[str | int, ...]

_CONFLICT_MARKER = re.compile(r"^(<{7}|>{7})( |$)", re.MULTILINE)
# The core schema, YAML 1.2.2 section 10.3.2: `no` and `1_000` are text, `1e-3` is a number.
_CONSTANTS: Mapping[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@final
@dataclass(frozen=True)
class Place:
    """Where a value stands: in a file, or in a `--set` argument, which is then the `source` itself."""

    source: Path | str
    line: int
    column: int

    def problem(self, message: str) -> Problem:
        """Return the problem that `message` describes, here."""
        if isinstance(self.source, str):
            return Problem(f"--set {self.source!r}: {message}")
        return Problem(message, self.source, self.line, self.column)


@final
@dataclass(frozen=True)
class Node:
    """A value and its place; `key_place` is the place of the key, for the value of a mapping."""

    value: Scalar | tuple["Node", ...] | Mapping[str, "Node"]
    place: Place
    key_place: Place | None = None

    @property
    def keys(self) -> Mapping[str, "Node"]:
        """The values of a mapping by key; empty for anything else."""
        return self.value if isinstance(self.value, Mapping) else {}

    @property
    def children(self) -> Mapping[str | int, "Node"]:
        """The values of a mapping by key, those of a list by index; empty for a scalar."""
        entries: Iterable[tuple[str | int, Node]]
        entries = enumerate(self.value) if isinstance(self.value, tuple) else self.keys.items()
        return dict(entries)

    def plain(self) -> Plain:
        """The value as plain Python data."""
        if isinstance(self.value, Mapping):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value

    def at(self, path: KeyPath) -> tuple[KeyPath, "Node"]:
        """Follow `path`, leaving out each step that does not exist; return the steps taken and the node reached."""
        node, taken = self, []
        for step in path:
            if step in node.children:
                node = node.children[step]
                taken.append(step)
        return tuple(taken), node

    def without(self, key: str) -> "Node":
        """Return this mapping without one of its keys."""
        return replace(self, value={name: node for name, node in self.keys.items() if name != key})

    def replace_at(self, path: KeyPath, node: "Node") -> "Node":
        """Return this tree with `node` at `path`, adding the mappings on the way that are missing.

        Raises LookupError if `path` goes through a scalar or past the end of a list.
        """
        if not path:
            return node
        step, rest = path[0], path[1:]
        if isinstance(self.value, tuple) and isinstance(step, int) and step < len(self.value):
            entries = (entry.replace_at(rest, node) if i == step else entry for i, entry in enumerate(self.value))
            return replace(self, value=tuple(entries))
        if isinstance(self.value, Mapping) and isinstance(step, str):
            old = self.value.get(step) or Node({}, node.place, node.place)
            new = replace(old.replace_at(rest, node), key_place=old.key_place)
            return replace(self, value={**self.value, step: new})
        raise LookupError(step)


def read(file: Path) -> tuple[Node | None, tuple[Problem, ...]]:
    """Read the one document of `file` and all its problems; no node if the file cannot be read to its end."""
    try:
        with pause(), file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        reason = {FileNotFoundError: "no such file", IsADirectoryError: "is a directory, not a file"}
        return None, (Problem(reason.get(type(error), f"cannot be read: {error.strerror}"), file),)
    if len(content) > MAX_BYTES:
        return None, (Problem(f"must be at most {MAX_BYTES // 1000} kB", file),)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        return None, (_place(file, before).problem(f"must be UTF-8 text, got byte 0x{content[error.start]:02x}"),)
    if marker := _CONFLICT_MARKER.search(text):
        message = f"merge-conflict marker {marker[1]!r}; resolve the conflict first"
        return None, (_place(file, text[: marker.start()]).problem(message),)
    return parse(text, file)


def parse(text: str, source: Path | str) -> tuple[Node | None, tuple[Problem, ...]]:
    """Read the one document of `text` and all its problems; no node if the text cannot be read to its end."""
    composer = _Composer(_events(text, source), source)
    try:
        root = composer.document()
    except ConfigError as error:
        return None, (*composer.problems, *error.problems)
    return root, tuple(composer.problems)


def _place(source: Path | str, before: str) -> Place:
    return Place(source, before.count("\n") + 1, len(before) - before.rfind("\n"))


def _events(text: str, source: Path | str) -> Iterator[Event]:
    """Parse lazily, so that a reader who stops at a limit has not paid for the rest."""
    try:
        yield from YAML(typ="safe", pure=True).parse(text)
    except ReaderError as error:
        message = f"a character that YAML does not allow, code point {error.character:#x}"
        raise ConfigError([_place(source, text[: error.position]).problem(message)]) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        hint = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        message = ", ".join(str(part) for part in (error.context, error.problem) if part) + hint
        raise ConfigError([Place(source, mark.line + 1, mark.column + 1).problem(message)]) from error
    except (YAMLError, ValueError, OverflowError) as error:
        # ruamel.yaml hands an escape such as "\UFFFFFFFF" to chr()
        raise ConfigError([Place(source, 1, 1).problem(f"must be YAML, but: {error}")]) from error


@final
class _Composer:
    """The events of one document, turned into nodes; what is wrong gathers in `problems`.

    Methods raise ConfigError where reading cannot go on.
    """

    def __init__(self, events: Iterator[Event], source: Path | str) -> None:
        self.problems: list[Problem] = []
        self._events = events
        self._source = source
        self._count = 0
        self._anchors: dict[str, Node | None] = {}  # None while its node is being read

    def document(self) -> Node:
        root = None
        for event in self._events:
            if not isinstance(event, DocumentStartEvent):
                continue
            if root is not None:
                raise ConfigError([self._place(event).problem("must be one document, got a second one")])
            if event.version not in (None, (1, 2)):
                self.problems.append(self._place(event).problem("must be YAML 1.2; remove the %YAML line"))
            root = self._node(next(self._events), 1)
        if root is None:
            raise ConfigError([Place(self._source, 1, 1).problem("must hold a value, got nothing")])
        return root

    def _place(self, event: Event) -> Place:
        return Place(self._source, event.start_mark.line + 1, event.start_mark.column + 1)

    def _node(self, event: Event, depth: int) -> Node:
        place = self._place(event)
        self._enter(place, 1, depth)
        if isinstance(event, AliasEvent):
            return self._alias(event.anchor, place, depth)
        assert isinstance(event, ScalarEvent | CollectionStartEvent)  # all that a parser gives where a value begins
        if event.tag is not None:
            self.problems.append(place.problem(f"tags are not allowed, got {event.tag!r}; write the plain value"))
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, ScalarEvent):
            node = Node(self._scalar(event, place), place)
        elif isinstance(event, MappingStartEvent):
            node = Node(self._mapping(depth), place)
        else:
            node = Node(tuple(self._node(entry, depth + 1) for entry in self._until(SequenceEndEvent)), place)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _enter(self, place: Place, count: int, depth: int) -> None:
        self._count += count
        if self._count > MAX_NODES:
            raise ConfigError([place.problem(f"must hold at most {MAX_NODES} values, aliases expanded")])
        if depth > MAX_DEPTH:
            raise ConfigError([place.problem(f"must be nested at most {MAX_DEPTH} deep, aliases expanded")])

    def _until(self, end: type[Event]) -> Iterator[Event]:
        for event in self._events:
            if isinstance(event, end):
                return
            yield event

    def _alias(self, anchor: str, place: Place, depth: int) -> Node:
        if anchor not in self._anchors:
            raise ConfigError([place.problem(f"alias *{anchor} has no anchor &{anchor} before it")])
        node = self._anchors[anchor]
        if node is None:
            raise ConfigError([place.problem(f"alias *{anchor} contains itself")])
        self._enter(place, _size(node) - 1, depth + _height(node) - 1)
        return replace(node, place=place)

    def _scalar(self, event: ScalarEvent, place: Place) -> Scalar:
        text: str = event.value
        try:
            text.encode()
            if "\0" in text:
                msg = "text must not hold the character NUL"
                raise ValueError(msg)
            return _resolve(text) if event.style is None else text
        except UnicodeEncodeError:
            self.problems.append(place.problem("text must be Unicode, got half of a surrogate pair"))
        except ValueError as error:
            self.problems.append(place.problem(str(error)))
        return None

    def _mapping(self, depth: int) -> Mapping[str, Node]:
        entries: dict[str, Node] = {}
        for key_event in self._until(MappingEndEvent):
            key = self._node(key_event, depth + 1)
            event = next(self._events)
            value = self._node(event, depth + 1)
            if not isinstance(key.value, str):
                self.problems.append(key.place.problem("a key must be text; put it in quotes"))
            elif key.value in entries:
                first = (entries[key.value].key_place or key.place).line
                self.problems.append(key.place.problem(f"duplicate key {key.value!r}, first given on line {first}"))
            else:
                # the parser places a value left empty at the next token
                is_empty = isinstance(event, ScalarEvent) and event.style is None and event.value == ""
                place = key.place if is_empty else value.place
                entries[key.value] = replace(value, place=place, key_place=key.place)
        return entries


def _resolve(text: str) -> Scalar:
    """Value of an unquoted scalar. Raises ValueError for a number that is not finite or needs more than 64 bits."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        if len(text) > 64 or not -(2**63) <= int(text, base) < 2**63:
            msg = f"an integer must fit in 64 bits, got {text[:64]}"
            raise ValueError(msg)
        return int(text, base)
    number = float(text) if _FLOAT.fullmatch(text) else None
    if _NOT_FINITE.fullmatch(text) or (number is not None and not math.isfinite(number)):
        msg = f"a number must be finite, got {text[:64]}"
        raise ValueError(msg)
    return text if number is None else number


def _size(node: Node) -> int:
    return 1 + len(node.keys) + sum(map(_size, node.children.values()))


def _height(node: Node) -> int:
    return 1 + max(map(_height, node.children.values()), default=0)
