"""Which linear layers may make and read the heads or hidden units of a transformer, by their order and sizes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor, nn

from compressor.models.layers import is_within
from compressor.pruning.groups import run
from compressor.task import Inputs


@dataclass(frozen=True)
class Call:
    """A linear layer, and how large what it read was: root mean square."""

    path: str
    layer: nn.Linear
    magnitude: float
    source: tuple[int, int]
    """Where in memory its input lies, and how many numbers it has: equal for layers that read the same."""


Window: TypeAlias = tuple[Call, ...]


def linear_calls(module: nn.Module, example_inputs: Inputs) -> dict[str, Call]:
    """Linear layers by path, in the order of their first run."""
    calls: dict[str, Call] = {}
    alive: list[Tensor] = []  # so that no memory is used twice

    def keep(path: str, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        if path not in calls:
            alive.append(inputs[0])
            magnitude = max(float(inputs[0].square().mean().sqrt()), 1e-12)
            calls[path] = Call(path, layer, magnitude, (inputs[0].data_ptr(), inputs[0].numel()))

    with ExitStack() as hooks:
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear):
                hook = layer.register_forward_pre_hook(lambda layer, inputs, path=path: keep(path, layer, inputs))
                hooks.enter_context(hook)
        run(module, example_inputs)
    return calls


def attention_windows(calls: Mapping[str, Call]) -> Iterator[Window]:
    """Runs of linear layers that may be query, key, value and output, whose sizes fit: longest first."""
    layers = list(calls.values())
    for length in (4, 3, 2):
        for start in range(len(layers) - length + 1):
            *makers, reader = layers[start : start + length]
            made, read = sorted(call.layer.out_features for call in makers), reader.layer.in_features
            separate = length == 4 and made[0] == made[1] and made[2] == read and read % made[0] == 0
            sources = [call.source for call in makers]
            # keys and values read the same; the output reads neither that nor what the queries read
            if reader.source in sources or (length > 2 and len(set(sources)) == length - 1):
                continue
            if separate or (length == 3 and made == [read, 2 * read]) or (length == 2 and made == [3 * read]):
                yield (*makers, reader)


def feed_forward_windows(calls: Mapping[str, Call]) -> Iterator[Window]:
    """Runs of linear layers that may be the two of a feed-forward layer, or the three of a gated one: longest first."""
    layers = list(calls.values())
    for length in (3, 2):
        for start in range(len(layers) - length + 1):
            *makers, reader = layers[start : start + length]
            made, read = {call.layer.out_features for call in makers}, reader.layer.in_features
            if len({call.source for call in makers}) > 1 or reader.source == makers[0].source:
                continue
            if made == {read} or (length == 2 and made == {2 * read}):
                yield (*makers, reader)


@dataclass(frozen=True)
class Guess:
    """Layers that may make and read the units of one group."""

    root: str
    """The smallest module that holds them and runs as a whole."""
    window: Window
    counts: tuple[int, ...]
    """How many units there may be: most first."""
    heads: bool
    """Whether the units are heads, not hidden units."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths, in the order in which they run."""
        return tuple(call.path for call in self.window)

    @property
    def is_self_attention(self) -> bool:
        """Whether queries, keys and values are made from the same."""
        return self.heads and len({call.source for call in self.window[:-1]}) == 1


def depth(guess: Guess) -> int:
    """To sort the innermost modules first."""
    return -len(guess.root.split(".")) if guess.root else 0


def guess_at(module: nn.Module, window: Window, *, heads: bool) -> Guess:
    """What `window` may be: heads in as many counts as attributes allow, or single hidden units."""
    root = _root(module, [call.path for call in window])
    width = window[-1].layer.in_features
    if not heads:
        return Guess(root, window, (width,), heads)
    narrowest = min(width, *(call.layer.out_features for call in window[:-1]))
    numbers = {value for _, name, value in attributes(module, root) if "head" in name.lower() and value > 0}
    numbers = numbers or {value for _, _, value in attributes(module, root) if value > 0}
    # an attribute counts the heads, or tells how wide each is
    counts = {count for value in numbers for count in (value, narrowest // value) if narrowest % value == 0}
    return Guess(root, window, tuple(sorted((c for c in counts if 1 < c < narrowest), reverse=True)), heads)


def _root(module: nn.Module, paths: Sequence[str]) -> str:
    """The innermost module above all `paths` that has a forward of its own."""
    parts = [path.split(".")[:-1] for path in paths]
    shared: list[str] = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    while shared and isinstance(module.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict):
        shared.pop()
    return ".".join(shared)


def attributes(module: nn.Module, root: str) -> list[tuple[str, str, int]]:
    """Integers that modules other than torch's own, at or below `root`, keep: path, name and value."""
    return [
        (path, name, value)
        for path, layer in own_modules(module, root)
        for name, value in vars(layer).items()
        if type(value) is int
    ]


def counts_heads(module: nn.Module, root: str) -> bool:
    """Whether an attribute at or below `root` names heads."""
    return any("head" in name.lower() for _, name, _ in attributes(module, root))


def own_modules(module: nn.Module, root: str) -> list[tuple[str, nn.Module]]:
    """Modules at or below `root` whose class is not torch's own."""
    below = module.get_submodule(root).named_modules(prefix=root)
    return [(path, layer) for path, layer in below if not type(layer).__module__.startswith("torch.nn.")]


def relative(guess: Guess) -> Guess:
    """Return `guess` with the paths that its layers have below its root."""
    cut = len(guess.root) + 1 if guess.root else 0
    return replace(guess, root="", window=tuple(replace(call, path=call.path[cut:]) for call in guess.window))


def is_protected(guess: Guess, protect: Sequence[str]) -> bool:
    """Whether a layer of `guess` lies at or below a path in `protect`."""
    return any(is_within(layer, protect) for layer in guess.layers)
