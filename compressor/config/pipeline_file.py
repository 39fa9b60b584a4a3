"""A pipeline file: YAML → typed settings; all problems at once, each with its file, line and column."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue
from pydantic.json_schema import models_json_schema

from compressor.config import yaml_source
from compressor.config.chain import NamedStage, find_stage, read_stages
from compressor.config.installed_stages import stage_names
from compressor.config.validation import all_problems, join_path, read_mapping, show, validate
from compressor.config.yaml_source import KeyPath, Node, Place
from compressor.errors import ConfigError, Problem
from compressor.references.reference import Reference, call_faults, find_references, is_path, prefer_modules_in
from compressor.verdicts.gate import Gate

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")


@final
@dataclass(frozen=True)
class Pipeline:
    """What is to be run. `directory` is that of the pipeline file: the code that references name lies in it."""

    name: str
    model: Reference
    task: Reference
    stages: tuple[NamedStage, ...]
    directory: Path
    seed: int = 0
    gate: Gate | None = None
    overrides: tuple[str, ...] = ()
    """The `--set` arguments, as given."""

    @property
    def references(self) -> tuple[Reference, ...]:
        """What the settings of stages name, such as a student."""
        return tuple(find_references([planned.stage for planned in self.stages]))

    @property
    def settings(self) -> dict[str, Any]:
        """All settings as JSON values, defaults included; paths are relative to `directory`."""
        settings = {
            "name": self.name,
            "seed": self.seed,
            "model": self.model.model_dump(mode="json"),
            "task": self.task.model_dump(mode="json"),
            "stages": [{"stage": one.name, **one.stage.model_dump(mode="json")} for one in self.stages],
            "gate": None if self.gate is None else self.gate.model_dump(mode="json", exclude_none=True),
        }
        relative: dict[str, Any] = _with_relative_paths(settings, self.directory)
        return relative


def _check_pipeline_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        msg = f"must be up to 100 letters, digits, '.', '_' and '-', the first a letter or digit, got {name!r}"
        raise ValueError(msg)
    return name


class _File(BaseModel):
    """Keys of a pipeline file; each stage is validated by the class that its `stage` key names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, title="Pipeline", use_attribute_docstrings=True)

    name: Annotated[str, AfterValidator(_check_pipeline_name)] = Field(json_schema_extra={"pattern": _NAME.pattern})
    """Name of the pipeline and of its run directory."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of everything random."""
    model: Reference
    """Builds the large model, a `torch.nn.Module`; `weights_file` names its weights."""
    task: Reference
    """Builds the `compressor.Task`: data splits, loss, metrics, example inputs."""
    stages: list[dict[str, JsonValue]] = Field(min_length=1)
    """The stages in order, each with the key `stage` and its settings."""
    gate: Gate | None = None
    """Limits that the result must keep; exit code 3 if it does not."""


def load(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read the pipeline file `path`, changed by `overrides` such as `stages.2.pruning_ratio=0.7`.

    Imports the classes of the stages that the file names, never its model or task. Raises ConfigError with every
    problem found, in the order of the file; HostError if two installed packages offer stages of one name.
    """
    root, problems = _read(path, overrides)
    directory = Path(os.path.realpath(path.parent))
    with prefer_modules_in(directory):
        root, path_problems = _with_absolute_paths(root, directory)
        file, file_problems = validate(_File, root)
        stages, stage_problems = read_stages(root.keys.get("stages", Node((), root.place)), ("stages",))
        checks = [*path_problems, *file_problems, *stage_problems, *_reference_problems(root)]
    problems = all_problems(problems, checks)
    if file is None or problems:
        raise ConfigError(problems)
    return Pipeline(
        name=file.name,
        model=file.model,
        task=file.task,
        stages=stages,
        directory=directory,
        seed=file.seed,
        gate=file.gate,
        overrides=tuple(overrides),
    )


def json_schema() -> dict[str, Any]:
    """JSON Schema of a pipeline file, draft 7, with the settings of every installed stage.

    Editors check a file against it as it is typed; it leaves open what only `load` can see: paths, order, user code.
    """
    installed = stage_names()
    classes = {name: find_stage(name, installed) for name in sorted(installed)}
    models: list[type[BaseModel]] = [_File, *classes.values()]
    refs, schema = models_json_schema([(model, "validation") for model in models], ref_template="#/definitions/{model}")
    definitions = schema["$defs"]
    targets = {name: refs[stage_class, "validation"]["$ref"] for name, stage_class in classes.items()}
    for target in targets.values():
        definitions[target.rpartition("/")[2]]["properties"]["stage"] = {"type": "string"}
    file = definitions.pop(_File.__name__)
    file["properties"]["stages"]["items"] = {
        "type": "object",
        "required": ["stage"],
        "properties": {"stage": {"anyOf": [{"enum": list(classes)}, {"type": "string", "pattern": ":"}]}},
        "allOf": [
            {"if": {"properties": {"stage": {"const": name}}, "required": ["stage"]}, "then": {"$ref": target}}
            for name, target in targets.items()
        ],
    }
    draft_7: dict[str, Any] = _draft_7({**file, "definitions": definitions})
    return {"$schema": "http://json-schema.org/draft-07/schema#", **draft_7}


def _draft_7(schema: Any) -> Any:
    """Write a list of fixed length as draft 7 does."""
    if isinstance(schema, dict):
        return {"items" if key == "prefixItems" else key: _draft_7(value) for key, value in schema.items()}
    return [_draft_7(value) for value in schema] if isinstance(schema, list) else schema


def _read(path: Path, overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """Raises ConfigError if there is no mapping to look into."""
    root, problems = read_mapping(path)
    for text in overrides:
        try:
            root = _override(root, text)
        except ConfigError as error:
            problems += error.problems
    return root, problems


def _override(root: Node, text: str) -> Node:
    """Return `root` with the value that `text`, a `path=value`, gives. Raises ConfigError."""
    place = Place(text, 1, 1)
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError([place.problem("must be path=value, such as seed=1")])
    node, problems = yaml_source.parse(value, text)
    if node is None or problems:
        raise ConfigError(problems)
    return root.replace_at(_steps(root, path, place), node)


def _steps(root: Node, path: str, place: Place) -> KeyPath:
    """Split `a.0.b` into keys and, where `root` has a list, indices.

    Raises ConfigError if it leads through a scalar or past a list.
    """
    taken: list[str | int] = []
    node = root
    for step in path.split("."):
        name = join_path(tuple(taken))
        if isinstance(node.value, tuple):
            known = {str(index): index for index in node.children}
            if step not in known:
                listed = ", ".join(f"{index} {_label(entry)}".strip() for index, entry in node.children.items())
                count = len(known)
                what = "stage" if name == "stages" else "entry" if count == 1 else "entrie"
                has = f"there {'is' if count == 1 else 'are'} {count} {what}{'' if count == 1 else 's'}"
                wanted = f"must be a number from 0 to {count - 1}" if known else "can have no number"
                told = f"{has}: {listed}" if known else has
                raise ConfigError([place.problem(f"the place in {name} {wanted}, got {step!r}; {told}")])
            taken.append(known[step])
        elif isinstance(node.value, Mapping):
            taken.append(step)
        else:
            raise ConfigError([place.problem(f"{name} is {show(node.plain())}, so it has no {step!r}")])
        node = node.children.get(taken[-1], Node({}, place))
    return tuple(taken)


def _label(entry: Node) -> str:
    stage = entry.keys.get("stage")
    return f"({stage.value})" if stage and isinstance(stage.value, str) else ""


def _references(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
    """Every mapping below the root that names a factory."""
    for step, child in node.children.items():
        if "factory" in child.keys:
            yield (*path, step), child
        yield from _references(child, (*path, step))


def _with_absolute_paths(root: Node, directory: Path) -> tuple[Node, list[Problem]]:
    """Make the path arguments of references absolute: those in the file start at `directory`, others at the current."""
    problems: list[Problem] = []
    for path, reference in _references(root):
        for name, argument in reference.keys.items():
            if not is_path(name) or argument.value is None:
                continue
            if not isinstance(argument.value, str):
                message = f"{join_path((*path, name))} must be a path, got {show(argument.plain())}"
                problems.append(argument.place.problem(message))
                continue
            in_file = isinstance(argument.place.source, Path)
            absolute = _absolute((directory if in_file else Path.cwd()) / argument.value)
            if reason := _missing(absolute, name):
                option = join_path((*path, name))
                hint = f"; another can be given with --set {option}=…" if in_file else ""
                problems.append(argument.place.problem(f"{option} must exist, but {absolute} {reason}{hint}"))
            root = root.replace_at((*path, name), replace(argument, value=str(absolute)))
    return root, problems


def _absolute(path: Path) -> Path:
    """`path` from the root with its links as they are: reports show it, and where links lead is of one machine alone.

    They are followed where a `..` behind one leads elsewhere.
    """
    written, real = Path(os.path.abspath(path)), Path(os.path.realpath(path))  # noqa: PTH100  # resolve follows links
    return written if os.path.realpath(written) == str(real) else real


def _missing(path: Path, name: str) -> str:
    """Why there is no such file or directory as the argument `name` asks for; empty if there is."""
    try:
        path.stat()
    except OSError as error:
        return f"does not: {error.strerror}"
    if name.endswith("_dir") and not path.is_dir():
        return "is no directory"
    return "is no file" if name.endswith("_file") and not path.is_file() else ""


def _with_relative_paths(settings: Any, directory: Path) -> Any:
    if isinstance(settings, list):
        return [_with_relative_paths(value, directory) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        name: Path(os.path.relpath(value, directory)).as_posix()
        if "factory" in settings and is_path(name) and isinstance(value, str)
        else _with_relative_paths(value, directory)
        for name, value in settings.items()
    }


def _reference_problems(root: Node) -> Iterator[Problem]:
    """What the source of the user's factories shows to be wrong with calling them; nothing is imported."""
    outer: set[KeyPath] = set()
    for path, node in _references(root):
        reference, problems = validate(Reference, node, path)
        if any(path[:length] in outer for length in range(len(path))):
            yield from problems  # the schema of the file says nothing of the arguments of a reference
        outer.add(path)
        if reference is None:
            continue  # the schema of the file tells why
        # a model's weights are loaded after its factory has built it
        called = reference if path == ("task",) else reference.without("weights_file")
        for fault in call_faults(called):
            given = node.keys.get(fault.argument or "factory")
            place = (given.key_place if given and fault.argument else None) or node.keys["factory"].place
            option = f"--set {join_path((*path, fault.argument or ''))}=…"
            hint = f"; give it beside `factory` or with {option}" if fault.argument and not given else ""
            yield place.problem(f"{fault.message}{hint}")
