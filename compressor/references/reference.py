"""From a name in a pipeline file to the object it names; the only place that imports by name."""

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from compressor.errors import CompressorError, HostError, InputError, did_you_mean
from compressor.references import source_code
from compressor.references.files_read import watch
from compressor.references.source_code import CallFault

_NAME = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")
_directory: ContextVar[Path | None] = ContextVar("directory", default=None)


def check_name(name: str) -> str:
    """Return `name` if it has the form `module:attribute`. Raises ValueError otherwise."""
    if not _NAME.fullmatch(name):
        msg = f"must be module:attribute, such as digits:teacher, got {name!r}"
        raise ValueError(msg)
    return name


class Reference(BaseModel):
    """A callable named `module:attribute`, with the keyword arguments it is called with.

    Every other key of the YAML mapping is an argument. An argument whose name ends in `_dir`, `_file` or `_path` is a
    path, relative to the pipeline file.
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    factory: Annotated[str, AfterValidator(check_name)] = Field(json_schema_extra={"pattern": _NAME.pattern})
    """The callable as `module:attribute`: a module beside the pipeline file, or an installed one."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The keyword arguments, paths as `Path`."""
        extra = self.model_extra or {}
        return {
            name: Path(value) if is_path(name) and isinstance(value, str) else value for name, value in extra.items()
        }

    def without(self, argument: str) -> "Reference":
        """Return this reference without one of its arguments."""
        kept = {name: value for name, value in (self.model_extra or {}).items() if name != argument}
        return Reference(factory=self.factory, **kept)

    def strip(self, is_left_out: Callable[[str], bool]) -> "Reference":
        """Return this reference without some of its arguments, and of those of references among its arguments."""
        return Reference.model_validate(_strip(self.model_dump(), is_left_out))

    def call(self) -> Any:
        """Import the callable and call it with the arguments.

        Raises InputError if it cannot be imported, does not take the arguments, or raises an error itself; HostError
        if it needs a package that is not installed.
        """
        called = load(self.factory)
        if not callable(called):
            msg = f"{self.factory} must be callable, got {type(called).__name__}"
            raise InputError(msg)
        with suppress(ValueError):  # a callable written in C may have no signature to compare with
            signature = inspect.signature(called)
            try:
                signature.bind(**self.arguments)
            except TypeError as error:
                msg = f"{self.factory}{signature} does not fit the arguments {dict(self.arguments)!r}: {error}"
                raise InputError(msg) from error
        with _user_code(self.factory, self.factory.partition(":")[0]):
            return called(**self.arguments)


def _strip(value: Any, is_left_out: Callable[[str], bool]) -> Any:
    """Copy the plain form of a reference, or of a part of it, without the arguments that are left out."""
    if isinstance(value, Mapping):
        return {
            name: _strip(part, is_left_out)
            for name, part in value.items()
            if not ("factory" in value and is_left_out(name))
        }
    if isinstance(value, list | tuple):
        return [_strip(part, is_left_out) for part in value]
    return value


def find_references(setting: Any) -> Iterator[Reference]:
    """Every reference in a setting, however deep: in records, lists and mappings."""
    if isinstance(setting, Reference):
        yield setting
    elif isinstance(setting, BaseModel):
        for _, part in setting:
            yield from find_references(part)
    elif isinstance(setting, list | tuple):
        for part in setting:
            yield from find_references(part)
    elif isinstance(setting, Mapping):
        yield from find_references(list(setting.values()))


def is_path(argument: str) -> bool:
    """Whether an argument of this name holds a path."""
    return argument.endswith(("_dir", "_file", "_path"))


@contextmanager
def prefer_modules_in(directory: Path) -> Iterator[None]:
    """Look modules up in `directory` first, as `python directory/script.py` does, until the block is left.

    Modules loaded from there are then forgotten, so that two pipelines in one process may name different modules
    alike. Within a block for the same directory this does nothing.
    """
    directory = Path(os.path.realpath(directory))
    if _directory.get() == directory:
        yield
        return
    loaded_before = set(sys.modules)
    entry = str(directory)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    token = _directory.set(directory)
    try:
        with watch(directory):
            yield
    finally:
        _directory.reset(token)
        with suppress(ValueError):
            sys.path.remove(entry)
        _forget(directory, loaded_before)


def load(name: str) -> Any:
    """Import the object named `module:attribute`.

    Raises InputError if there is no such module or attribute, or if importing it raises an error; HostError if it
    needs a package that is not installed.
    """
    module_name, _, attribute = name.partition(":")
    _refuse_foreign(module_name)
    with _user_code(f"importing {module_name}", module_name):
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and f"{module_name}.".startswith(f"{error.name}."):
                raise InputError(_no_module(module_name)) from error
            raise
        for part in attribute.split("."):
            if not hasattr(found, part):
                msg = f"{name} must exist, but {module_name} has no {part!r}{did_you_mean(part, dir(found))}"
                raise InputError(msg)
            found = getattr(found, part)
    return found


def source_files(name: str) -> tuple[Path, ...]:
    """Files whose bytes decide what `module:attribute` does, found without importing it, in order of module name.

    For a module beside the pipeline file: its own and every module beside it that it imports, however indirectly. For
    an installed module: every `.py` file of its top-level package. Raises InputError if there is no such module.
    """
    module, _, _ = name.partition(":")
    if source_code.find(module) is None:
        raise InputError(_no_module(module))
    package = source_code.source_file(module.partition(".")[0])
    if _local_modules(module) or package is None or package.name != "__init__.py":
        return _files(module)
    return tuple(sorted(package.parent.rglob("*.py")))


def call_faults(reference: Reference) -> tuple[CallFault, ...]:
    """List what is wrong with calling `reference`, as far as the source shows it; nothing is imported."""
    module, _, attribute = reference.factory.partition(":")
    if source_code.find(module) is None:
        return (CallFault(_no_module(module)),)
    return source_code.call_faults(module, attribute, list(reference.arguments))


def _no_module(module: str) -> str:
    directory = _directory.get()
    names = [file.stem for file in directory.glob("*.py")] if directory else []
    hint = did_you_mean(module, names)
    return f"there is no module {module!r} in {directory or 'the current directory'} or among the installed ones{hint}"


def _local_modules(module: str) -> Mapping[str, Path]:
    directory = _directory.get()
    return source_code.local_modules(module, directory) if directory else {}


def _files(module: str) -> tuple[Path, ...]:
    own = source_code.source_file(module)
    return tuple(file for _, file in sorted(_local_modules(module).items())) or ((own,) if own else ())


def _refuse_foreign(module: str) -> None:
    """Raise InputError if a module that lies beside the pipeline file was already imported from elsewhere."""
    for name, file in _local_modules(module).items():
        loaded = sys.modules.get(name)
        if loaded is not None and _file(loaded) != os.path.realpath(file):
            msg = (
                f"{name} must be {file}, but a module of that name is already imported from {_file(loaded)}; rename it"
            )
            raise InputError(msg)


def _forget(directory: Path, loaded_before: set[str]) -> None:
    """Remove the modules that lie in `directory` from the imported ones, except those of `loaded_before`."""
    tops = {name.partition(".")[0] for name in set(sys.modules) - loaded_before} - loaded_before
    local = {name for name in tops if _lies_in(sys.modules.get(name), directory)}
    for name in [name for name in sys.modules if name.partition(".")[0] in local]:
        del sys.modules[name]


def _lies_in(module: ModuleType | None, directory: Path) -> bool:
    if module is None:
        return False
    places = list(getattr(module, "__path__", [])) or [getattr(module, "__file__", None)]
    return any(Path(place).parent == directory for place in places if place)


def _file(module: ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if file else None


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn an error that came through a file beside the pipeline file into an InputError naming the line.

    Our own errors pass, and so do those that no file of the user's had a part in.
    """
    try:
        yield
    except (CompressorError, MemoryError):
        raise
    except Exception as error:
        directory = _directory.get()
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if directory and Path(frame.filename).is_relative_to(directory)]
        own = [frame for frame in own if "site-packages" not in frame.filename]
        if not own or "allocate memory" in str(error):
            raise
        msg = f"{own[-1].filename}:{own[-1].lineno} raised {type(error).__name__}: {error}"
        raise InputError(msg) from error


@contextmanager
def foreign_errors(what: str, module: str) -> Iterator[None]:
    """Turn what the code of an installed `module` of somebody else raises into an InputError that says where.

    Our own errors pass, and so do those of code beside the pipeline file, which `user_errors` names.
    """
    if module.partition(".")[0] == __name__.partition(".")[0] or _local_modules(module):
        yield
        return
    with _user_code(what, module):
        yield


@contextmanager
def _user_code(what: str, module: str) -> Iterator[None]:
    """Turn whatever the code of `module` raises into an InputError that says where, a missing package into a HostError.

    Our own errors pass.
    """
    try:
        yield
    except (CompressorError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            msg = f"{what} needs the module {error.name!r}, which must be installed where compressor is, but is not"
            raise HostError(msg) from error
        description = f"{type(error).__name__}: {error}".removesuffix(": ")
        msg = f"{what} raised {description} ({_line(error, module)})"
        raise InputError(msg) from error


def _line(error: BaseException, module: str) -> str:
    """The last line of the user's own files that `error` came through, as `file:line`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    own = set(map(str, _files(module)))
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if frame.filename in own), frames[-1])
    return f"{frame.filename}:{frame.lineno}"
