"""The stages of a pipeline file: each found by its name, its settings validated, each fit for the one before it."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeAlias, Union, final, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from compressor.config.installed_stages import stage_names
from compressor.config.validation import join_path, show, validate
from compressor.config.yaml_source import KeyPath, Node, Place
from compressor.errors import CompressorError, ConfigError, Problem, did_you_mean
from compressor.references.reference import check_name, is_path, load

if TYPE_CHECKING:  # needs torch, which is imported only for a file that names stages
    from compressor.stage import Stage

_StageClass: TypeAlias = "type[Stage[Any, Any]]"


@final
@dataclass(frozen=True)
class NamedStage:
    """A stage under the name by which the pipeline calls it."""

    name: str
    stage: "Stage[Any, Any]"


@dataclass(frozen=True)
class _Link:
    """A stage of the file and the types of the artifacts that it takes and gives."""

    name: str
    place: Place
    stage_class: _StageClass
    takes: tuple[type, ...]
    gives: tuple[type, ...]


def read_stages(stages: Node, where: KeyPath) -> tuple[tuple[NamedStage, ...], list[Problem]]:
    """Return the stages of a list of mappings, those at fault left out, and all that is wrong.

    `where` is the path of the list in its file. What is no list of mappings is left to the schema of the file. Raises
    HostError if two installed packages offer stages of one name.
    """
    installed = stage_names()
    planned: list[NamedStage] = []
    problems: list[Problem] = []
    links: list[_Link | None] = []
    for index, entry in stages.children.items():
        if not isinstance(entry.value, Mapping):
            continue
        try:
            link = _link(entry, (*where, index), installed)
        except ConfigError as error:
            problems += error.problems
            links.append(None)
            continue
        links.append(link)
        stage, faults = validate(link.stage_class, entry.without("stage"), (*where, index))
        problems += faults
        if stage is not None:
            planned.append(NamedStage(link.name, stage))
    return tuple(planned), [*problems, *_order_problems(links)]


def find_stage(name: str, installed: Mapping[str, str]) -> _StageClass:
    """Import the stage called `name`: one of `installed`, classes by name, or a class as `module:attribute`.

    Raises ValueError for an unknown name or a class that is no stage, InputError or HostError if it cannot be imported.
    """
    if ":" not in name and name not in installed:
        known = f"; known are {', '.join(sorted(installed))}, or module:attribute"
        msg = f"unknown stage {show(name)}{did_you_mean(name, installed) or known}"
        raise ValueError(msg)
    found = load(check_name(installed.get(name, name)))
    if not (isinstance(found, type) and issubclass(found, load("compressor.stage:Stage"))):
        kind = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        msg = f"{name} must be a subclass of compressor.stage.Stage, got {kind}"
        raise ValueError(msg)
    if inspect.isabstract(found):
        msg = f"{name} must define apply"
        raise ValueError(msg)
    fields: Mapping[str, FieldInfo] = found.model_fields  # type: ignore[attr-defined]  # a stage is a pydantic model
    files = [key for key, field in fields.items() if is_path(key) or field.annotation is Path]
    if files:
        msg = (
            f"{name} must take files through a setting of type Reference, whose arguments are paths that the store "
            f"follows, but it has {', '.join(files)}"
        )
        raise ValueError(msg)
    return found


def _link(entry: Node, where: KeyPath, installed: Mapping[str, str]) -> _Link:
    """Raises ConfigError."""
    name = entry.keys.get("stage")
    if name is None:
        raise ConfigError([entry.place.problem(f"{join_path(where)} needs the key 'stage'")])
    if not isinstance(name.value, str):
        raise ConfigError([name.place.problem(f"{join_path(where)}.stage must be text, got {show(name.plain())}")])
    try:
        stage_class = find_stage(name.value, installed)
        takes, gives = _artifacts(stage_class)
    except (ValueError, CompressorError) as error:
        raise ConfigError([name.place.problem(str(error))]) from error
    return _Link(name.value, name.place, stage_class, takes, gives)


def _artifacts(stage_class: _StageClass) -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Types that `apply` takes and gives. Raises ValueError if its annotations do not tell."""
    try:
        hints = get_type_hints(stage_class.apply)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        msg = f"the annotations of {stage_class.__name__}.apply must be types that its module imports, but: {error}"
        raise ValueError(msg) from error
    takes, gives = (_members(hints.get(name)) for name in ("model", "return"))
    artifacts = get_args(load("compressor.models.artifact:Artifact"))
    if not takes or not gives or not {*takes, *gives} <= {*artifacts}:
        msg = f"{stage_class.__name__}.apply must be annotated like apply(self, model: TorchModel, …) -> TorchModel, "
        msg += f"with {' or '.join(one.__name__ for one in artifacts)}"
        raise ValueError(msg)
    return takes, gives


def _members(hint: object) -> tuple[type, ...]:
    """The classes of a union, or the one class; none for anything else."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(member for member in members if isinstance(member, type))


def _order_problems(links: Sequence[_Link | None]) -> Iterator[Problem]:
    """Check that each stage takes whatever the one before it gives; an unknown stage may give anything."""
    if not any(links):
        return
    given: tuple[type, ...] | None = (load("compressor.models.artifact:TorchModel"),)
    giver = "the model factory"
    entered: list[tuple[str, tuple[type, ...]]] = []
    for link in links:
        if link is None:
            given = None
            continue
        if given is not None and not _fits(given, link.takes):
            earlier = next((name for name, artifacts in reversed(entered) if _fits(artifacts, link.takes)), None)
            advice = f"; move it before {earlier}" if earlier else ""
            yield link.place.problem(
                f"{link.name} takes {_names(link.takes)}, but {giver} gives {_names(given)}{advice}"
            )
        if given is not None:
            entered.append((link.name, given))
        given, giver = link.gives, link.name


def _fits(given: Sequence[type], taken: Sequence[type]) -> bool:
    return all(any(issubclass(one, other) for other in taken) for one in given)


def _names(types: Sequence[type]) -> str:
    return " or ".join(sorted(one.__name__ for one in types))
