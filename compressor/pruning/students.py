"""Students made from a model: with fewer layers, with fewer channels, or born again with fresh weights."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compressor.errors import InputError, StageError
from compressor.models.artifact import TorchModel
from compressor.models.edits import Edit, apply_edit_in_place, apply_edits, structural_edits
from compressor.models.layers import paths_matching
from compressor.models.outputs import run_on_examples
from compressor.pruning.allocation import multiples_of, uniform
from compressor.pruning.channels import prunable_groups, prune_channels
from compressor.pruning.conv1d import with_linears
from compressor.pruning.criteria import magnitude
from compressor.task import Inputs
from compressor.text.figures import list_names


def layers_kept(layers: int, *, depth: int) -> tuple[int, ...]:
    """Return the positions of `depth` of `layers` layers, evenly spaced, the first and the last among them.

    12 layers to 6 are 0, 2, 4, 7, 9, 11, as in DistilBERT (Sanh et al. 2019, arXiv 1910.01108). 1 <= `depth` <=
    `layers`; a depth of 1 keeps the first.
    """
    gaps = depth - 1
    # integers, halves upwards: the same layers on every machine
    return tuple((2 * position * (layers - 1) + gaps) // (2 * gaps) for position in range(depth)) if gaps else (0,)


def shallower(model: TorchModel, example_inputs: Inputs, *, depth: Mapping[str, int]) -> TorchModel:
    """Return a copy of `model` with fewer layers, which keep their weights; the model itself is not changed.

    `depth` says how many layers, evenly spaced, each stack keeps: an `nn.Sequential` or `nn.ModuleList`, by its path.
    The empty path is the model itself; a path may be a pattern, as `paths_matching` takes it: `encoder.*.blocks`.

    Raises InputError if a path matches nothing or no stack, if two give one stack different depths, if a depth is not
    in 1 to layers - 1, or if the shorter model does not run on `example_inputs` or gives outputs of another shape.
    """
    depths = _depths(model.module, depth)
    # from the inside out: an outer stack renames what lies in it
    paths = sorted(depths, key=lambda path: len(path.split(".")) if path else 0, reverse=True)
    edits = tuple(Edit(path=path, children=_children_kept(model.module, path, depths[path])) for path in paths)
    shorter = apply_edits(model.module, edits)
    shape, wanted = _output_shape(shorter, example_inputs, paths), model.predict(example_inputs).shape
    if shape != wanted:
        msg = f"{_with_fewer_layers(paths)} outputs must keep the shape {tuple(wanted)}, got {tuple(shape)}"
        raise InputError(msg)
    return model.with_module(shorter, *edits)


def narrower(
    model: TorchModel,
    example_inputs: Inputs,
    *,
    width: float,
    round_to: int = 8,
    protect: Sequence[str] = (),
    log: Callable[[str], None] = lambda _line: None,
) -> TorchModel:
    """Return a copy of `model` that keeps a share `width`, in (0, 1), of the channels of each group of coupled layers.

    The channels of largest magnitude keep their weights; their numbers are multiples of `round_to`. `protect` and `log`
    are those of `prunable_groups`. Raises InputError for another `width`, or a pattern of `protect` that matches
    nothing, and StageError if the channels cannot be removed, as `prunable_groups` and `prune_channels` say.
    """
    if not 0 < width < 1:
        msg = f"width must be in (0, 1), the share of channels to keep, got {width}"
        raise InputError(msg)
    model = with_linears(model)
    groups = prunable_groups(model.module, example_inputs, protect=protect, log=log)
    scores = {group.path: magnitude(model.module, group, order=2) for group in groups}
    chosen = uniform(groups, scores, pruning_ratio=1 - width, step_of=multiples_of(round_to))
    pruned = prune_channels(model.module, example_inputs, groups, chosen).module
    return model.with_module(pruned, *structural_edits(model.module, pruned))


def reborn(model: TorchModel, *, seed: int) -> TorchModel:
    """Return the architecture of `model` with fresh weights, as born-again networks start (arXiv 1805.04770).

    The factory initialises the weights, statistics of BatchNorm included; submodules that were resized since do it
    themselves, by their `reset_parameters`. Equal seeds give equal weights. Raises StageError if a resized submodule
    has no `reset_parameters`, InputError if the factory gives the same weights whatever the seed.
    """
    module = TorchModel.build(model.factory, seed=seed).module
    initial = copy.deepcopy(module.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for edit in model.edits:
            apply_edit_in_place(module, edit, seed=int(torch.randint(2**31, ())))
            if edit.shapes:
                _reset_in_place(module.get_submodule(edit.path), edit.path)
    other = TorchModel.build(model.factory, seed=seed + 1).module.state_dict()
    if all(torch.equal(tensor, other[name]) for name, tensor in initial.items()):
        msg = f"{model.factory.factory} must give other weights for another seed to be born again, but gives the same"
        raise InputError(msg)
    return TorchModel(module, model.factory, model.edits)


def _reset_in_place(submodule: nn.Module, path: str) -> None:
    reset = getattr(submodule, "reset_parameters", None)
    if reset is None:
        msg = (
            f"a resized submodule must have reset_parameters to get fresh weights, but {path} "
            f"({type(submodule).__name__}) has none; write one, or start from a model that was not cut"
        )
        raise StageError(msg)
    reset()


def _depths(module: nn.Module, depth: Mapping[str, int]) -> dict[str, int]:
    """Depth by the path of each stack."""
    if not depth:
        msg = "depth must name at least one stack"
        raise InputError(msg)
    depths: dict[str, int] = {}
    for pattern, kept in depth.items():
        for path in paths_matching(module, pattern) if pattern else ("",):
            _check_depth(module.get_submodule(path), path, kept)
            if depths.setdefault(path, kept) != kept:
                msg = f"depth must give one number for {path}, got {depths[path]} and {kept} ({pattern!r})"
                raise InputError(msg)
    return depths


def _check_depth(stack: nn.Module, path: str, depth: int) -> None:
    if not isinstance(stack, nn.Sequential | nn.ModuleList):
        msg = f"depth must name an nn.Sequential or nn.ModuleList, but {path} is a {type(stack).__name__}"
        raise InputError(msg)
    if not 1 <= depth < len(stack):
        msg = f"depth of {path!r} must be at least 1 and less than its {len(stack)} layers, got {depth}"
        raise InputError(msg)


def _children_kept(module: nn.Module, path: str, depth: int) -> tuple[str, ...]:
    names = list(module.get_submodule(path)._modules)
    return tuple(names[position] for position in layers_kept(len(names), depth=depth))


def _with_fewer_layers(paths: list[str]) -> str:
    return f"with fewer layers in {list_names([path or 'the model itself' for path in paths])}"


def _output_shape(module: nn.Module, example_inputs: Inputs, paths: list[str]) -> torch.Size:
    name = f"{type(module).__name__} {_with_fewer_layers(paths)}"
    advice = "give these stacks another depth, or leave them whole"
    outputs = run_on_examples(module, example_inputs, name, advice=advice)
    assert isinstance(outputs, Tensor)  # as the whole model gives
    return outputs.shape
