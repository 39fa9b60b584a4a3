"""What a run will do: one content key per step, over everything that changes its model, and what the store holds."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.config.installed_stages import stage_names
from compressor.config.pipeline_file import Pipeline
from compressor.records.environment import versions
from compressor.references.files_read import code_read, data_read, is_installed
from compressor.references.reference import Reference, is_path, source_files
from compressor.references.source_code import code_digest
from compressor.run.data_files import changed, sign, tree
from compressor.run.store import Store, content_key, differences
from compressor.stage import Stage
from compressor.task import Samples, Task, fingerprint
from compressor.text.figures import list_names

BASELINE = "baseline"
"""Name of the step that gives a model which comes with its weights."""
LAST_RUN = "last_run"
_CODE_READ = "code_read"


@dataclass(frozen=True)
class Step:
    """A model to obtain: by a stage from the model before it or, without a stage, from the model's factory."""

    name: str
    stage: Stage[Any, Any] | None
    key: str
    parts: Mapping[str, Any]
    """What the key is a hash of."""

    @property
    def gives_model(self) -> bool:
        """Whether another model leaves than entered."""
        return self.stage is None or not self.stage.keeps_model


@dataclass(frozen=True)
class Forecast:
    """Whether a run would take a step from the store; `reasons` says why not."""

    name: str
    reused: bool
    reasons: tuple[str, ...]


def forecast(pipeline: Pipeline, store: Store, *, device: str) -> tuple[Forecast, ...]:
    """Say for each step whether a run would reuse it, if the data is what the last run in this directory saw.

    Neither the user's code is run nor data decoded: the last run noted the fingerprints of its data, and which files it
    read. One that has changed since makes every step one to run.
    """
    last = store.recall(LAST_RUN)
    if last is None:
        return tuple(
            Forecast(step.name, False, ("no earlier run",))
            for step in list_steps(pipeline, store, data={}, device=device)
        )
    moved = changed(last.get("files", {}))
    forecasts = []
    for position, step in enumerate(list_steps(pipeline, store, data=last["data"], device=device)):
        if moved:
            forecasts.append(Forecast(step.name, False, (f"data changed: {list_names(moved, most=3)}",)))
        elif store.peek(step.key) is not None:
            forecasts.append(Forecast(step.name, True, ()))
        elif position < len(last["parts"]):
            reasons = differences(last["parts"][position], step.parts)
            forecasts.append(Forecast(step.name, False, reasons or ("its result is not in the store",)))
        else:
            forecasts.append(Forecast(step.name, False, ("not in the last run",)))
    return tuple(forecasts)


def assumption(store: Store) -> str:
    """What a forecast takes for granted, in words; empty if there was no run."""
    last = store.recall(LAST_RUN)
    if last is None:
        return ""
    files = len(last.get("files", {}))
    seen = f"the {files:,} files and directories that it read there are as they were" if files else "it read no file"
    return (
        f"This takes the data to be what the last run saw: {seen}. What the task's code gets otherwise, from a net, "
        "a clock or a library that reads files without Python, is not known before the run reads it."
    )


def remember(pipeline: Pipeline, store: Store, data: Mapping[str, str], chain: Sequence[Step]) -> None:
    """Note what a run is about to do and the data files that its task has read, for the forecast of the next."""
    files = sign(_data_files(pipeline, store))
    store.remember(LAST_RUN, {"data": dict(data), "parts": [dict(step.parts) for step in chain], "files": files})


def _data_files(pipeline: Pipeline, store: Store) -> set[Path]:
    """What was read, and all that lies in the directories which the task is given; not code, nor results of runs."""
    root = Path(os.path.realpath(pipeline.directory))
    given = [path for name, path in pipeline.task.arguments.items() if is_path(name) and isinstance(path, Path)]
    found = data_read(root).union(*(tree(path) for path in given))
    code = {root, *(file.parent for file in code_read(root))}
    runs = Path(os.path.realpath(store.root))
    own = {
        path for path in found if (whole := Path(os.path.realpath(path))).is_relative_to(runs) or whole in runs.parents
    }
    return {*(found - code - own), *given}


def data_fingerprints(task: Task) -> dict[str, str]:
    """Fingerprint of each split by name, and of what else the task says in data."""
    axes = [{str(axis): name for axis, name in axes.items()} for axes in task.dynamic_axes or ()]
    said = {"labels": list(task.labels), "preprocessing": dict(task.preprocessing), "dynamic_axes": axes}
    examples = Samples(task.example_inputs, torch.zeros(len(task.example_inputs[0])))
    return {
        **task.fingerprints,
        "example_inputs": fingerprint(examples),
        "description": content_key(said),
    }


def note_code(pipeline: Pipeline, store: Store) -> None:
    """Keep what the code was that runs in this directory have read, by any means: the first content of each file.

    It must be kept before a result that may depend on it.
    """
    noted = _noted(store)
    found = {_place(file, pipeline.directory): file for file in code_read(Path(os.path.realpath(pipeline.directory)))}
    new = {place: digest for place, file in found.items() if place not in noted and (digest := _digest(file))}
    if new:
        store.remember(_CODE_READ, {**noted, **new})


def _changed_code(pipeline: Pipeline, store: Store) -> dict[str, str]:
    """Code that the imports of the source do not show, of other content than when a run first read it.

    Only what changed since counts in a key, so that a file which a run reads late does not make the next one repeat it.
    """
    noted = _noted(store)
    names = [pipeline.model.factory, pipeline.task.factory, *(reference.factory for reference in pipeline.references)]
    names += [planned.name for planned in pipeline.stages if ":" in planned.name]
    seen = {_place(file, pipeline.directory) for name in names for file in source_files(name)}
    now = {place: _digest(pipeline.directory / place) for place in sorted(noted.keys() - seen)}
    return {place: digest for place, digest in now.items() if digest != noted[place]}


def _noted(store: Store) -> dict[str, str]:
    noted = store.recall(_CODE_READ)
    return noted if isinstance(noted, dict) else {}


def _place(file: Path, directory: Path) -> str:
    """Path from the directory of the pipeline file, if it lies there: the whole may be moved."""
    whole, root = os.path.realpath(file), os.path.realpath(directory)
    return os.path.relpath(whole, root) if Path(whole).is_relative_to(root) else whole


def _digest(file: Path) -> str:
    """What a source file does; empty if it is not there."""
    return code_digest(file) if file.is_file() else ""


def list_steps(pipeline: Pipeline, store: Store, *, data: Mapping[str, str], device: str) -> tuple[Step, ...]:
    """List the steps of a pipeline in order; the first gives the baseline.

    `data` are the fingerprints of the splits: they stand for the directories that the task reads. User code is hashed
    from its files and never imported; `store` knows what else earlier runs have read as code.
    """
    shared = {
        "other code": _changed_code(pipeline, store),
        "seed": pipeline.seed,
        "device": device,
        "libraries": versions(),
        "task": _reference_parts(pipeline.task, directories=False),
        "data": dict(data),
    }
    before: dict[str, Any] = {"model": _reference_parts(pipeline.model)}
    chain: list[Step] = []
    if not pipeline.stages[0].stage.makes_baseline:
        parts = {"stage": BASELINE, **before, **shared}
        chain.append(Step(BASELINE, None, content_key(parts), parts))
    for planned in pipeline.stages:
        if chain:
            before = {"input": chain[-1].key}
        parts = {"stage": planned.name, **_stage_parts(planned.name, planned.stage), **before, **shared}
        chain.append(Step(planned.name, planned.stage, content_key(parts), parts))
    return tuple(chain)


def _stage_parts(name: str, stage: Stage[Any, Any]) -> dict[str, Any]:
    target = name if ":" in name else stage_names()[name]
    return {"version": type(stage).version, "settings": _settings(stage), "code": _code(target)}


def _settings(stage: Stage[Any, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = _content(stage.model_dump(mode="json"), directories=True)
    return settings


def _content(value: Any, *, directories: bool) -> Any:
    """Copy a setting with each reference in it, however deep, replaced by its parts."""
    if isinstance(value, Mapping):
        if "factory" in value:
            return _reference_parts(Reference.model_validate(value), directories=directories)
        return {name: _content(part, directories=directories) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_content(part, directories=directories) for part in value]
    return value


def _reference_parts(reference: Reference, *, directories: bool = True) -> dict[str, Any]:
    paths = {name: path for name, path in reference.arguments.items() if is_path(name) and isinstance(path, Path)}
    others = {name: value for name, value in reference.arguments.items() if name not in paths}
    return {
        "factory": reference.factory,
        "arguments": _content(others, directories=directories),
        "code": _code(reference.factory),
        "files": {name: _tree_hash(path) for name, path in paths.items() if directories or path.is_file()},
    }


def _code(name: str) -> str:
    return content_key({"files": [_code_hash(file) for file in source_files(name)]})


def _code_hash(file: Path) -> str:
    """Of a file of the user's what it does, of an installed one its bytes: a library is large and seldom edited."""
    return _file_hash(file) if is_installed(file) else code_digest(file)


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tree_hash(path: Path) -> dict[str, str]:
    files: Iterator[Path] = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else iter([path])
    return {str(file.relative_to(path.parent)): _file_hash(file) for file in sorted(files)}
