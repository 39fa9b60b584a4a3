"""Attention heads and feed-forward units of transformers: guessed from layers and names, kept if numbers prove them."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from compressor.errors import StageError
from compressor.models.layers import is_within
from compressor.models.outputs import FORWARD_ERRORS, first_tensor, relative_error
from compressor.pruning.groups import Group, Member, Size, Units, check_equal, check_free, run, silence, without
from compressor.pruning.guesses import (
    Guess,
    attention_windows,
    attributes,
    counts_heads,
    depth,
    feed_forward_windows,
    guess_at,
    is_protected,
    linear_calls,
    own_modules,
    relative,
)
from compressor.pruning.kept import Kept
from compressor.system.copying import copy_module
from compressor.task import Inputs

TOLERANCE = 1e-4
"""Relative error above which two outputs are taken to differ; float32 sums in another order differ by about 1e-6."""

_MOST_ATTRIBUTES = 8
"""Beyond this many integers that may depend on the units, trying every subset of them would take minutes."""

_MOST_SURPRISES = 3
"""How many attributes may do other than their names say."""

_MULTIHEAD = "nn.MultiheadAttention takes the size of a head from the width of its input; write it with nn.Linear"

_UNFOLLOWED = "its linear layers do not run as query, key, value and output one after the other, or not with its sizes"

_WIDTH_WORDS = ("intermediate", "inner", "ffn", "mlp", "hidden_features", "hidden_dim", "ff")


@dataclass(frozen=True)
class TransformerUnits:
    """What can leave a transformer, and what of it keeps its heads or hidden units."""

    groups: tuple[Group, ...]
    kept: Kept


def transformer_groups(module: nn.Module, example_inputs: Inputs, *, protect: Sequence[str] = ()) -> tuple[Group, ...]:
    """Groups of `transformer_units`, in the order in which they run; empty for a module without attention."""
    return transformer_units(module, example_inputs, protect=protect).groups


def transformer_units(module: nn.Module, example_inputs: Inputs, *, protect: Sequence[str] = ()) -> TransformerUnits:
    """Find the attention heads and the hidden units of feed-forward layers that can leave `module`.

    Linear layers that run one after the other and whose sizes fit are taken for the query, key, value (one layer each,
    or fused, in either order of rows) and output of attention, or for a feed-forward layer, gated or not. Then the
    module that holds them runs alone, with random weights, on what it gets when `module` runs on `example_inputs`: once
    without some units, and once with these silenced. Equal outputs prove the guess. Integer attributes may have to
    follow; those whose names say so are tried first. With grouped queries, a unit is a key-value head with all its
    queries.

    Layers at or below the paths in `protect` are left alone. Attention that cannot lose heads by its nature, that goes
    wrong without one whatever attributes follow, and layers whose weights cannot be cut, are listed in `kept`.
    """
    module = copy_module(module).eval()
    calls = linear_calls(module, example_inputs)
    heads = [guess_at(module, window, heads=True) for window in attention_windows(calls)]
    heads = [guess for guess in heads if guess.counts]
    multihead = [path for path, layer in module.named_modules() if isinstance(layer, nn.MultiheadAttention)]
    if not heads and not multihead and not _modules_with_heads(module, (), ()):
        return TransformerUnits((), {})
    hidden = [guess_at(module, window, heads=False) for window in feed_forward_windows(calls)]
    # innermost first: a window across two layers only looks like one if neither layer has explained its own
    guesses = [*sorted(heads, key=depth), *sorted(hidden, key=depth)]
    found = _proven(module, [guess for guess in guesses if not is_protected(guess, protect)], example_inputs)
    groups, faults = _hold_together(module, found.groups, example_inputs)
    order = {path: place for place, path in enumerate(calls)}
    known = {**found.kept, **faults, **dict.fromkeys(multihead, _MULTIHEAD)}
    unseen = _modules_with_heads(module, groups, (*protect, *known))
    kept = {path: reason for path, reason in {**known, **unseen}.items() if not is_within(path, protect)}
    return TransformerUnits(tuple(sorted(groups, key=lambda group: order[group.path])), kept)


def _proven(module: nn.Module, guesses: Sequence[Guess], example_inputs: Inputs) -> TransformerUnits:
    """Groups of the guesses that prove right; no layer is in two. Self-attention that fails is kept."""
    inputs = _inputs_of(module, {guess.root for guess in guesses}, example_inputs)
    groups: list[Group] = []
    kept: dict[str, str] = {}
    solved: dict[object, _Answer | None] = {}
    for guess in guesses:
        taken = {member.path for group in groups for member in group.members}
        if taken.isdisjoint(guess.layers) and not any(is_within(layer, kept) for layer in guess.layers):
            group = _prove(module, guess, inputs[guess.root], solved)
            if group is None and guess.is_self_attention and counts_heads(module, guess.root):
                kept[guess.root] = _stale(module, guess)
            groups.extend([group] if group else [])
    return TransformerUnits(tuple(groups), kept)


def _hold_together(
    module: nn.Module, groups: Sequence[Group], example_inputs: Inputs
) -> tuple[Sequence[Group], Mapping[str, str]]:
    """Those of `groups` that the whole module can lose, all together; why the others cannot, by path."""
    faults: dict[str, str] = {}

    def check(some: Sequence[Group]) -> None:
        removal = {group.path: (group.units // 2,) for group in some if group.units > 1}
        check_equal(without(module, some, removal), silence(module, some, removal), example_inputs)

    def keep_those_that(holds: Callable[[Group], None], some: Sequence[Group]) -> list[Group]:
        for group in some:
            try:
                holds(group)
            except StageError as error:
                faults[group.path] = str(error)
        return [group for group in some if group.path not in faults]

    free = keep_those_that(partial(check_free, module), groups)
    try:
        check(free)
    except StageError as error:
        alone = keep_those_that(lambda group: check([group]), free)
        try:
            check(alone)
        except StageError:
            return (), {**faults, **{group.path: str(error) for group in alone}}
        return alone, faults
    return free, faults


_Captured: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def _inputs_of(module: nn.Module, paths: set[str], example_inputs: Inputs) -> dict[str, _Captured]:
    """What the modules at `paths` get at their first run: a copy, as it was before that run."""
    captured: dict[str, _Captured] = {}

    def keep(path: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if path not in captured:
            captured[path] = copy.deepcopy((arguments, keywords))

    with ExitStack() as hooks:
        for path in paths:
            layer = module.get_submodule(path)
            hook = layer.register_forward_pre_hook(
                lambda _, arguments, keywords, path=path: keep(path, arguments, keywords), with_kwargs=True
            )
            hooks.enter_context(hook)
        run(module, example_inputs)
    return captured


@dataclass(frozen=True)
class _Answer:
    """How the units of a module lie in its tensors; mostly the same in others of its class."""

    units: int
    parts_first: bool
    sizes: tuple[tuple[str, str], ...]
    tensors: bool


def _prove(module: nn.Module, guess: Guess, inputs: _Captured, solved: dict[object, _Answer | None]) -> Group | None:
    """The group of `guess` if an arrangement of it proves right, None if it is no such group; notes it in `solved`."""
    root = module.get_submodule(guess.root)
    local = relative(guess)
    shapes = tuple((call.layer.in_features, call.layer.out_features) for call in local.window)
    kind = (local.layers, shapes, tuple(type(layer) for layer in root.modules()))
    if kind in solved and solved[kind] is None:
        return None
    trial, known = _randomize(root, local), solved.get(kind)
    for answer in chain([known] if known else [], _answers(root, local)):
        group = _group(root, local, answer)
        # what proved right in a module of the same classes and sizes needs no more than a look
        trials = _trials(group.units)[answer is known :]
        if all(_proves(trial, group, removed, inputs, local.layers[-1]) for removed in trials):
            solved[kind] = answer
            return _place(group, guess.root)
    solved[kind] = None
    return None


def _stale(module: nn.Module, guess: Guess) -> str:
    names = ", ".join(f"{name}={value}" for _, name, value in attributes(module, guess.root))
    return (
        f"whichever attributes of {type(module.get_submodule(guess.root)).__name__} follow ({names}), it does not run "
        "without a head or gives other numbers than with the head silent; let it reshape with its own num_heads and "
        "head_dim, not with sizes of its input, of a configuration or of another layer"
    )


def _answers(root: nn.Module, guess: Guess) -> Iterator[_Answer]:
    """All arrangements to try: those of most units first, and among these the ones that names suggest."""
    read = guess.window[-1].layer.in_features
    fused = any(call.layer.out_features > read for call in guess.window[:-1])
    for units in guess.counts:
        candidates = _candidates(root, guess, units)
        named = {(path, name) for path, name, value in candidates if _is_named(name, value, units, heads=guess.heads)}
        keys = [(path, name) for path, name, _ in candidates]
        subsets = chain.from_iterable(combinations(keys, size) for size in range(len(keys) + 1))
        # the attributes that are cut are as near as can be to those whose names say that they count units
        ordered = sorted(subsets, key=lambda subset: len(named.symmetric_difference(subset)))
        ordered = [subset for subset in ordered if len(named.symmetric_difference(subset)) <= _MOST_SURPRISES]
        for tensors in (True, False) if guess.heads and _tensors(root, units) else (False,):
            for sizes in ordered:
                for parts_first in (True, False) if fused else (False,):
                    yield _Answer(units, parts_first, sizes, tensors)


def _candidates(root: nn.Module, guess: Guess, units: int) -> list[tuple[str, str, int]]:
    *makers, reader = (call.layer for call in guess.window)
    widths = {reader.in_features, *(layer.out_features for layer in makers)}
    per_unit = reader.in_features // min(layer.out_features for layer in makers) or 1
    totals = {*widths, units, units * per_unit} if guess.heads else widths
    found = [attribute for attribute in attributes(root, "") if attribute[2] in totals]
    return sorted(found, key=lambda attribute: not _is_named(attribute[1], attribute[2], units, heads=guess.heads))[
        :_MOST_ATTRIBUTES
    ]


def _is_named(name: str, value: int, units: int, *, heads: bool) -> bool:
    """Whether `name` says that the attribute counts units, or the channels of all of them."""
    if not heads:
        return any(word in name.lower() for word in _WIDTH_WORDS)
    is_size = any(word in name.lower() for word in ("dim", "size"))
    return "head" in name.lower() and (value > units if is_size else True)


def _tensors(root: nn.Module, units: int) -> list[tuple[str, str, int]]:
    """Tensors outside torch's own layers with one axis as long as there are units, such as a bias for each head."""
    return [
        (path, name, tensor.shape.index(units))
        for path, layer in own_modules(root, "")
        for name, tensor in chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False))
        if list(tensor.shape).count(units) == 1
    ]


def _group(root: nn.Module, guess: Guess, answer: _Answer) -> Group:
    *makers, reader = guess.window
    units, read = answer.units, reader.layer.in_features
    members: list[Member] = []
    sizes = [Size(reader.path, "in_features", read // units)]
    for call in makers:
        made = call.layer.out_features
        index = _rows(made, units, parts=max(1, made // read) if answer.parts_first else 1)
        names = ("weight",) if call.layer.bias is None else ("weight", "bias")
        members.extend(Member(call.path, name, 0, index) for name in names)
        sizes.append(Size(call.path, "out_features", made // units))
    members.append(Member(reader.path, "weight", 1, _rows(read, units, parts=1), reads=True))
    if answer.tensors:
        alone = _rows(units, units, parts=1)
        members.extend(Member(path, name, dim, alone) for path, name, dim in _tensors(root, units))
    sizes.extend(Size(p, name, getattr(root.get_submodule(p), name) // units) for p, name in answer.sizes)
    return Group(
        path=makers[0].path,
        units=units,
        members=tuple(members),
        sizes=tuple(sizes),
        kind="heads" if guess.heads else "channels",
        channels_per_unit=read // units,
    )


def _rows(length: int, units: int, *, parts: int) -> tuple[tuple[int, ...], ...]:
    """Positions of each unit among `length` that lie [part, unit, channel]; with one part, a block for each unit."""
    positions = torch.arange(length).view(parts, units, -1).transpose(0, 1).flatten(1)
    return tuple(tuple(row) for row in positions.tolist())


def _trials(units: int) -> tuple[Units, ...]:
    """Two sets of units to remove: one from the middle, and about half of them, without a pattern."""
    shuffled = torch.randperm(units, generator=torch.Generator().manual_seed(units)).tolist()
    return (units // 2,), tuple(sorted(shuffled[: max(1, (units - 1) // 2)]))


def _randomize(root: nn.Module, guess: Guess) -> nn.Module:
    """Copy `root` with random weights that make the layers' outputs about 2 in size.

    With those of a fresh model attention is close to a plain mean, and a wrong regrouping of queries and keys would
    change outputs by less than rounding does. What holds for these weights by structure holds for all.
    """
    trial = copy_module(root)
    generator = torch.Generator().manual_seed(0)
    for call in guess.window:
        layer = trial.get_submodule(call.path)
        for name, parameter in layer.named_parameters(recurse=False):
            scale = 1.0 if name == "bias" else 2.0 / (call.magnitude * parameter.shape[1] ** 0.5)
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return trial


def _proves(root: nn.Module, group: Group, removed: Units, inputs: _Captured, reader: str) -> bool:
    removal = {group.path: tuple(removed)}
    try:
        cut = _run_alone(without(root, [group], removal), inputs, reader)
    except FORWARD_ERRORS:
        return False  # sizes that do not follow show first as shapes that do not fit
    silent = _run_alone(silence(root, [group], removal), inputs, reader)
    return all(relative_error(*pair) <= TOLERANCE for pair in zip(cut, silent, strict=True))


def _run_alone(root: nn.Module, inputs: _Captured, reader: str) -> tuple[Tensor, Tensor]:
    """What the layer at `reader` gives, which a residual may hide later, and the first tensor that `root` gives."""
    given: list[Tensor] = []
    arguments, keywords = copy.deepcopy(inputs)  # a cache of keys and values would grow with every run
    with root.get_submodule(reader).register_forward_hook(lambda *call: given.append(call[2])), torch.no_grad():
        outputs = root(*arguments, **keywords)
    first = first_tensor(outputs)
    if first is None:
        msg = f"{type(root).__name__} must give a tensor, got {type(outputs).__name__}"
        raise TypeError(msg)
    return given[0], first


def _place(group: Group, root: str) -> Group:
    """Return `group`, found in the module at `root`, with the paths that the whole module has."""

    def path(local: str) -> str:
        return ".".join(filter(None, (root, local)))

    return replace(
        group,
        path=path(group.path),
        members=tuple(replace(member, path=path(member.path)) for member in group.members),
        sizes=tuple(replace(size, path=path(size.path)) for size in group.sizes),
    )


def _modules_with_heads(module: nn.Module, groups: Sequence[Group], protect: Sequence[str]) -> dict[str, str]:
    """Innermost modules that count heads and hold linear layers, and in which no heads were found."""
    found = [group.path for group in groups if group.kind == "heads"]
    headed = [
        path
        for path, layer in own_modules(module, "")
        if any(type(value) is int and _is_named(name, value, 0, heads=True) for name, value in vars(layer).items())
        and not is_within(path, protect)
        and not any(is_within(known, [path]) for known in (*found, *protect))
        and sum(isinstance(below, nn.Linear) for below in layer.modules()) > 1
    ]
    inner = [path for path in headed if not any(other.startswith(f"{path}.") for other in headed)]
    return dict.fromkeys(inner, _UNFOLLOWED)
