"""The layers of a module, named by path: what they give in a dry run, and their outputs while the module runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn

from compressor.errors import InputError, did_you_mean
from compressor.models.outputs import first_tensor, run_on_examples
from compressor.task import Inputs

Shape: TypeAlias = tuple[int, ...]

_GIVE_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)
# Compared by identity: subclasses such as torchvision's LayerNorm2d keep the channels in dimension 1.
_GIVE_CHANNELS_LAST = {
    nn.Linear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.LSTM,
    nn.GRU,
    nn.RNN,
}


@dataclass(frozen=True)
class LayerOutput:
    """What a layer gave when it first ran: the first tensor, if it gave several."""

    path: str
    kind: str
    """Name of its class."""
    shape: Shape
    parameters: int
    """Its own and those of the layers below it."""
    channel_dimension: int = 1
    """The dimension of `shape` that holds the channels: 1 in maps (N, C, H, W), 2 in tokens (N, L, D)."""


def layer_outputs(module: nn.Module, example_inputs: Inputs) -> tuple[LayerOutput, ...]:
    """List the layers below `module` that give a tensor, in the order in which they first do so.

    `module` runs once, in evaluation mode and without gradient, and is left as it was. A layer comes after those
    below it: it is done after them. Convolutions, pooling and batch normalization give their channels in dimension 1,
    linear layers and layer normalization in the last. Any other layer is taken to keep the channels of the last output
    before it with equally many dimensions: they lie in the dimension of that length. Without such an output, 3-D is
    taken for tokens (N, L, D).
    Raises InputError if `module` does not run on `example_inputs`.
    """
    return _outputs(module, _dry_run(module, example_inputs))


def output_channels(module: nn.Module, example_inputs: Inputs) -> dict[str, int]:
    """Channels that each layer with a weight of two or more dimensions gives, by path, in the order of the run.

    So of convolutions, linear layers and embeddings, but not of normalization, which keeps the channels it gets. Runs
    `module` as `layer_outputs` does; a layer that is not called is left out.
    """
    return {
        output.path: output.shape[output.channel_dimension]
        for output in layer_outputs(module, example_inputs)
        if _has_a_matrix(module.get_submodule(output.path)) and output.channel_dimension < len(output.shape)
    }


def check_fires(module: nn.Module, paths: Sequence[str], example_inputs: Inputs) -> tuple[LayerOutput, ...]:
    """Return what the layers at `paths` give in a dry run, in the order of `paths`.

    Raises InputError naming the first path that is no layer, is never called, or gives no tensor.
    """
    calls = _dry_run(module, example_inputs)
    outputs = {output.path: output for output in _outputs(module, calls)}
    for path in paths:
        if path in outputs:
            continue
        if path not in layer_paths(module):
            raise InputError(_no_layer(path, module))
        found = "it gives none" if path in dict(calls) else "it is never called"
        msg = (
            f"layer {path!r} of {type(module).__name__} must give a tensor, but {found}; "
            "`compress layers` lists those that do"
        )
        raise InputError(msg)
    return tuple(outputs[path] for path in paths)


@contextmanager
def capture_outputs(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While the block is open, every run of `module` puts the outputs of the layers at `paths` in the mapping it gives.

    An output is the first tensor that the layer gave, with its gradient, and a copy: a later layer may change its input
    in place. Of a layer that runs twice, the last output is kept. One that does not run, or gives no tensor, has no
    key: `check_fires` refuses it beforehand. The wrapper of a distributed module has other paths: pass what it wraps.
    """
    outputs: dict[str, Tensor] = {}

    def keep(path: str, output: Tensor | None) -> None:
        if output is not None:
            outputs[path] = output.clone()

    with _watch(module, paths, keep):
        yield outputs


def layer_paths(module: nn.Module) -> tuple[str, ...]:
    """Dotted paths of all layers below `module`, in the order of `named_modules`; a shared layer has several."""
    return tuple(path for path, _ in module.named_modules(remove_duplicate=False) if path)


def shared_parameters(module: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """Names of the parameters that several layers have, each with all its names; one layer under two names is one."""
    names: dict[int, list[str]] = {}
    for path, layer in module.named_modules():
        for name, parameter in layer.named_parameters(path, recurse=False):
            names.setdefault(id(parameter), []).append(name)
    return {name: tuple(alike) for alike in names.values() if len(alike) > 1 for name in alike}


def paths_matching(module: nn.Module, pattern: str) -> tuple[str, ...]:
    """Paths of the layers that `pattern` names, in the order of `named_modules`.

    A path names itself. Between two dots, `*`, `?` and `[1-3]` mean what they do in file names; `**` between two dots
    stands for any number of names, and at the end for at least one. Raises InputError if there is no such layer, or if
    `**` does not stand alone.
    """
    found = matching(layer_paths(module), pattern)
    if not found:
        raise InputError(_no_layer(pattern, module))
    return found


def matching(paths: Sequence[str], pattern: str) -> tuple[str, ...]:
    """Those of `paths` that `pattern` names, as in `paths_matching`; it may be none.

    Raises InputError if `**` does not stand alone.
    """
    if pattern in paths:
        return (pattern,)
    names = pattern.split(".")
    if any("**" in name and name != "**" for name in names):
        msg = f"`**` must stand alone between two dots, as in 'encoder.**.norm', got {pattern!r}"
        raise InputError(msg)
    return tuple(path for path in paths if _matches(path.split("."), names))


def is_within(path: str, parents: Iterable[str]) -> bool:
    """Whether the layer at `path` is one of `parents` or lies below one; the empty path is the whole module."""
    return any(not parent or f"{path}.".startswith(f"{parent}.") for parent in parents)


def pair_paths(student: nn.Module, teacher: nn.Module, layers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Pair the layers that each pattern of `layers` names in `student` with those its value names in `teacher`.

    The first is paired with the first, and so on. Several student layers may have one teacher layer. Raises InputError
    if a pattern names nothing, two patterns of a pair name unequally many layers, or a student layer is named twice.
    """
    pairs: dict[str, str] = {}
    for student_pattern, teacher_pattern in layers.items():
        ours = _paths_of("student", student, student_pattern)
        theirs = _paths_of("teacher", teacher, teacher_pattern)
        if len(ours) != len(theirs):
            msg = (
                f"{student_pattern!r} and {teacher_pattern!r} must name equally many layers, but the student has "
                f"{len(ours)}, {', '.join(ours)}, and the teacher {len(theirs)}, {', '.join(theirs)}"
            )
            raise InputError(msg)
        for path, teacher_path in zip(ours, theirs, strict=True):
            if path in pairs:
                msg = (
                    f"a student layer must have one teacher layer, but {path!r} has {pairs[path]!r} and, by "
                    f"{student_pattern!r}, {teacher_path!r}; let each layer be named by one pattern"
                )
                raise InputError(msg)
            pairs[path] = teacher_path
    return tuple(pairs.items())


def _paths_of(role: str, module: nn.Module, pattern: str) -> tuple[str, ...]:
    try:
        return paths_matching(module, pattern)
    except InputError as error:
        msg = f"the {role}: {error}"
        raise InputError(msg) from error


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    head, *rest = pattern
    if head == "**" and rest:
        return any(_matches(names[skipped:], rest) for skipped in range(len(names) + 1))
    if head == "**":
        return bool(names)
    return bool(names) and fnmatchcase(names[0], head) and _matches(names[1:], rest)


def _no_layer(pattern: str, module: nn.Module) -> str:
    hint = did_you_mean(pattern, layer_paths(module))
    return f"{type(module).__name__} must have a layer {pattern!r}, but has none{hint}; `compress layers` lists them"


def _dry_run(module: nn.Module, example_inputs: Inputs) -> list[tuple[str, Shape | None]]:
    """Path and shape of each output of each layer, in the order of the run; None for an output without a tensor."""
    calls: list[tuple[str, Shape | None]] = []

    def keep(path: str, output: Tensor | None) -> None:
        calls.append((path, None if output is None else tuple(output.shape)))

    with _evaluating(module), _watch(module, layer_paths(module), keep):
        run_on_examples(module, example_inputs, type(module).__name__)
    return calls


def _outputs(module: nn.Module, calls: Sequence[tuple[str, Shape | None]]) -> tuple[LayerOutput, ...]:
    outputs: dict[str, LayerOutput] = {}
    before: dict[int, tuple[int, int]] = {}  # channel dimension and channels of the last output of each rank
    for path, shape in calls:
        if shape is None:
            continue
        layer, dimension, rank = module.get_submodule(path), 1, len(shape)
        if rank > 2:
            dimension = _channel_dimension(layer, shape, *before.get(rank, (2 if rank == 3 else 1, 0)))
            before[rank] = dimension, shape[dimension]
        if path not in outputs:
            parameters = sum(parameter.numel() for parameter in layer.parameters())
            outputs[path] = LayerOutput(path, type(layer).__name__, shape, parameters, dimension)
    return tuple(outputs.values())


def _channel_dimension(layer: nn.Module, shape: Shape, dimension_before: int, channels_before: int) -> int:
    last = len(shape) - 1
    if isinstance(layer, _GIVE_CHANNELS_FIRST):
        return 1
    if type(layer) in _GIVE_CHANNELS_LAST:
        return last
    if shape[1] != shape[last] and channels_before in (shape[1], shape[last]):
        return 1 if shape[1] == channels_before else last
    return dimension_before


@contextmanager
def _watch(module: nn.Module, paths: Sequence[str], keep: Callable[[str, Tensor | None], None]) -> Iterator[None]:
    """Give `keep` each path with the first tensor of each output, until the block is left."""

    def hook(path: str, _layer: nn.Module, _inputs: object, output: object) -> None:
        keep(path, first_tensor(output))

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(module.get_submodule(path).register_forward_hook(partial(hook, path)))
        yield


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    # The flags alone: a module may do more in train() and eval(), such as merge its weights, which nothing would undo.
    flags = [(layer, layer.training) for layer in module.modules()]
    try:
        for layer, _ in flags:
            layer.training = False
        yield
    finally:
        for layer, training in flags:
            layer.training = training


def _has_a_matrix(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2
