"""What Python source says without being imported: where a module lies, what it imports, how a callable is called."""

import ast
import hashlib
import sys
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias, final

from compressor.errors import closest, did_you_mean

_MAX_REEXPORTS = 8  # `from .model import teacher` is followed this often, so that a circle ends

_Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_Bindings: TypeAlias = Mapping[str, list[ast.AST]]


@final
@dataclass(frozen=True)
class CallFault:
    """Why a call cannot work; `argument` is the one at fault, given or not, None if the callable itself is."""

    message: str
    argument: str | None = None


@dataclass(frozen=True)
class _Signature:
    """The keyword arguments of a callable; `takes_any` if it has a `**` parameter."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_any: bool


def find(module: str) -> ModuleSpec | None:
    """Find a dotted module as an import would, but import no parent package; None if there is none."""
    first, *rest = module.split(".")
    spec = next((spec for finder in sys.meta_path if (spec := finder.find_spec(first, None))), None)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # under its full name a folder without __init__.py asks for its parent among the imported modules
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec


def source_file(module: str) -> Path | None:
    """The `.py` file of a module; None if there is no such module or it has none."""
    spec = find(module)
    return Path(spec.origin) if spec and spec.has_location and spec.origin and spec.origin.endswith(".py") else None


def local_modules(module: str, directory: Path) -> dict[str, Path]:
    """File of each module that importing `module` runs and that lies beside it in `directory`, by dotted name.

    Imports are followed wherever they stand in the source, parent packages included. Imports made through `importlib`
    are not seen: `files_read` sees them when they happen. Empty if `module` itself does not lie in `directory`.
    """
    files: dict[str, Path] = {}
    is_local: dict[str, bool] = {}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        first = name.partition(".")[0]
        if first not in is_local:
            is_local[first] = _lies_in(find(first), directory)
        if not is_local[first]:
            continue
        for prefix in accumulate(name.split("."), "{}.{}".format):
            spec = None if prefix in seen else find(prefix)
            seen.add(prefix)
            if spec and spec.has_location and spec.origin:
                files[prefix] = Path(spec.origin)
                waiting.extend(_find_imports(files[prefix], _package(prefix, spec)))
    return files


def summary(module: str, attribute: str) -> str:
    """First line of the docstring of a class or function; empty if it has none or its source is not found."""
    found = _definition(module, attribute)
    return (ast.get_docstring(found[1]) or "").partition("\n")[0] if found else ""


def call_faults(module: str, attribute: str, arguments: Collection[str]) -> tuple[CallFault, ...]:
    """List what the source shows to be wrong with calling `module:attribute` with keyword `arguments`.

    What the source leaves open is no fault: names made at run time, decorated callables, inherited constructors.
    """
    first, *rest = attribute.split(".")
    file = source_file(module)
    if file is None:
        return ()
    try:
        tree = _parse(file)
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL byte
        return (CallFault(f"{file} must be Python, but: {error}"),)
    bindings = _bindings(tree)
    if first not in bindings and not _is_dynamic(tree, bindings) and find(f"{module}.{first}") is None:
        return (CallFault(f"{file} has no {first!r}{did_you_mean(first, bindings)}"),)
    found = None if rest else _definition(module, first)
    if found is None or found[1].decorator_list:
        return ()
    parameters = _parameters(found[1])
    place = f"{module}:{attribute} ({found[0].name}:{found[1].lineno})"
    return tuple(_argument_faults(place, parameters, arguments)) if parameters else ()


def _lies_in(spec: ModuleSpec | None, directory: Path) -> bool:
    """Whether a top-level module is an entry of `directory`."""
    if spec is None:
        return False
    places = spec.submodule_search_locations or ([spec.origin] if spec.has_location and spec.origin else [])
    return any(Path(place).parent == directory for place in places)


def _package(module: str, spec: ModuleSpec) -> str:
    """The package that a relative import in `module` starts from."""
    return module if spec.submodule_search_locations is not None else module.rpartition(".")[0]


def code_digest(file: Path) -> str:
    """SHA-256 of what a source file does: its syntax tree, without comments, docstrings and layout.

    Bare strings do nothing, so none counts. A file that is no Python counts with every byte.
    """
    content = file.read_bytes()
    try:
        tree = _parse_bytes(content, file) if file.suffix == ".py" else None
    except (SyntaxError, ValueError, RecursionError):
        tree = None
    if tree is None:
        return hashlib.sha256(content).hexdigest()
    for node in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                setattr(node, block, [one for one in statements if not _is_bare_string(one)])
    return hashlib.sha256(ast.dump(tree).encode("utf-8", "surrogatepass")).hexdigest()


def _is_bare_string(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Constant(value=str() | bytes())):
            return True
    return False


def _parse(file: Path) -> ast.Module:
    return _parse_bytes(file.read_bytes(), file)


def _parse_bytes(content: bytes, file: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import shows them, if there is one
        return ast.parse(content, str(file))


def _find_imports(file: Path, package: str) -> Iterator[str]:
    """Dotted names that a source file may import; some of them name attributes, not modules."""
    try:
        tree = _parse(file) if file.suffix == ".py" else ast.Module([], [])
    except (SyntaxError, ValueError):
        return  # the import will say so
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (base := _absolute(node, package)):
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that `from … import` names; empty if its dots go past the top-level package."""
    if node.level == 0:
        return node.module or ""
    parents = package.split(".") if package else []
    kept = parents[: len(parents) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])]) if kept else ""


def _definition(module: str, name: str, hops: int = _MAX_REEXPORTS) -> tuple[Path, _Definition] | None:
    """Find where `name` is defined, through imports; None unless one `def` or `class` alone binds it."""
    spec, file = find(module), source_file(module)
    if spec is None or file is None or hops == 0:
        return None
    try:
        bound = _bindings(_parse(file)).get(name, [])
    except (SyntaxError, ValueError):
        return None
    match bound:
        case [ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() as node]:
            return file, node
        case [ast.ImportFrom() as node]:
            original = next(alias.name for alias in node.names if name == (alias.asname or alias.name))
            return _definition(_absolute(node, _package(module, spec)), original, hops - 1)
    return None


def _bindings(tree: ast.Module) -> _Bindings:
    """The statements or names that bind each name of a module; `*` for a star import."""
    bound: dict[str, list[ast.AST]] = defaultdict(list)
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _Definition):
            bound[node.name].append(node)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                bound[alias.asname or alias.name.partition(".")[0]].append(node)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound[node.id].append(node)
        waiting.extend(ast.iter_child_nodes(node))
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Global):
            for name in inner.names:
                bound[name].append(inner)
    return bound


def _is_dynamic(tree: ast.Module, bindings: _Bindings) -> bool:
    """Whether the module may have names that its source does not show."""
    makers = {"globals", "locals", "vars", "exec", "eval", "setattr"}
    return (
        "*" in bindings
        or "__getattr__" in bindings
        or any(
            (isinstance(node, ast.Name) and node.id in makers)
            or (isinstance(node, ast.Attribute) and node.attr == "modules")
            for node in ast.walk(tree)
        )
    )


def _parameters(node: _Definition) -> _Signature | None:
    """What a call of the function or class takes; None where its own source does not tell."""
    if isinstance(node, ast.ClassDef):
        makers = [item for item in node.body if isinstance(item, _Definition) and item.name in ("__init__", "__new__")]
        match makers:
            case [ast.FunctionDef(name="__init__", decorator_list=[]) as init] if not node.keywords:
                return _parameters_of(init.args, bound=1)
        return None
    return _parameters_of(node.args, bound=0)


def _parameters_of(arguments: ast.arguments, *, bound: int) -> _Signature | None:
    if len(arguments.posonlyargs) > bound:
        return None
    positional = [parameter.arg for parameter in (*arguments.posonlyargs, *arguments.args)]
    needed = positional[bound : len(positional) - len(arguments.defaults)]
    keywords = {
        parameter.arg: default for parameter, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    }
    return _Signature(
        names=(*positional[bound:], *keywords),
        required=(*needed, *(name for name, default in keywords.items() if default is None)),
        takes_any=arguments.kwarg is not None,
    )


def _argument_faults(place: str, parameters: _Signature, given: Collection[str]) -> Iterator[CallFault]:
    names = parameters.names
    unknown = [] if parameters.takes_any else [argument for argument in given if argument not in names]
    for argument in unknown:
        takes = f"; it takes {', '.join(names) or 'none'}"
        yield CallFault(f"{place} has no argument {argument!r}{did_you_mean(argument, names) or takes}", argument)
    meant = {closest(argument, names) for argument in unknown}
    for name in parameters.required:
        if name not in given and name not in meant:
            yield CallFault(f"{place} needs the argument {name!r}", name)
