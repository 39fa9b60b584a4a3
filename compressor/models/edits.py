"""Structural edits: sizes, kept layers and replaced submodules; listed between two modules, or made on a copy."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, NonNegativeInt
from torch import nn

from compressor.errors import InputError, StageError
from compressor.models.module_factory import build_module
from compressor.references.reference import Reference
from compressor.system.copying import copy_module


class Edit(BaseModel):
    """What a structural change made of one submodule: another one, its class, the children that it kept, its sizes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    replacement: Reference | None = None
    """What builds the submodule that stands in its place now."""
    linear: bool = False
    """Whether a Hugging Face `Conv1D` became an `nn.Linear` with the same weights."""
    children: tuple[str, ...] | None = None
    """Names, before the edit, of the children that an `nn.Sequential` or `nn.ModuleList` keeps; then they count from 0.

    Later edits name submodules as this one leaves them.
    """
    attributes: Mapping[str, int | tuple[int, ...]] = {}
    shapes: Mapping[str, tuple[NonNegativeInt, ...]] = {}


def structural_edits(before: nn.Module, after: nn.Module) -> tuple[Edit, ...]:
    """List the sizes by which `after` differs from `before`, a module with the same submodules.

    Linear layers may stand in place of Hugging Face's `Conv1D`.

    Raises StageError if a submodule was added, removed or replaced by another class, or if a buffer that is not saved
    was resized.
    """
    old, new = dict(before.named_modules()), dict(after.named_modules())
    linears = tuple(
        Edit(path=path, linear=True)
        for path, module in new.items()
        if isinstance(module, nn.Linear) and path in old and is_conv1d(old[path])
    )
    if linears:
        old = dict(apply_edits(before, linears).named_modules())
    if {path: type(module) for path, module in old.items()} != {path: type(module) for path, module in new.items()}:
        msg = "sizes can be compared only of modules with the same submodules"
        raise StageError(msg)
    edits = list(linears)
    for path, module in new.items():
        attributes = {name: size for name, size in _sizes(module).items() if _sizes(old[path]).get(name) != size}
        shapes = {name: shape for name, shape in _shapes(module).items() if _shapes(old[path]).get(name) != shape}
        unsaved = shapes.keys() & module._non_persistent_buffers_set
        if unsaved:
            msg = f"a buffer that changes its size must be saved, but {path}.{min(unsaved)} has persistent=False"
            raise StageError(msg)
        if attributes or shapes:
            edits.append(Edit(path=path, attributes=attributes, shapes=shapes))
    return tuple(edits)


def apply_edits(module: nn.Module, edits: tuple[Edit, ...]) -> nn.Module:
    """Return a copy of `module` changed by `edits`, in order; resized tensors hold zeros until weights are loaded.

    Raises InputError if an edit does not fit the module.
    """
    edited = copy_module(module)
    for edit in edits:
        apply_edit_in_place(edited, edit)
    return edited


def apply_edit_in_place(module: nn.Module, edit: Edit, *, seed: int = 0) -> None:
    """Change `module` by `edit`; resized tensors hold zeros, a replacement is built from `seed`.

    Raises InputError if the edit does not fit.
    """
    try:
        submodule = module.get_submodule(edit.path)
    except AttributeError as error:
        msg = f"an edit must name a submodule of {type(module).__name__}, got {edit.path!r}: {error}"
        raise InputError(msg) from error
    if edit.replacement is not None:
        submodule = _replace_in_place(module, edit.path, build_module(edit.replacement, seed=seed))
    if edit.linear:
        submodule = _become_linear_in_place(module, edit.path)
    if edit.children is not None:
        _keep_children_in_place(submodule, edit.path, edit.children)
    sizes = _sizes(submodule)
    for name, size in edit.attributes.items():
        if name not in sizes:
            msg = f"an edit of {edit.path} must change sizes that it has ({', '.join(sizes) or 'none'}), got {name!r}"
            raise InputError(msg)
        setattr(submodule, name, size)
    known = _shapes(submodule)
    for name, shape in edit.shapes.items():
        if name not in known:
            msg = f"an edit of {edit.path} must resize tensors that it has ({', '.join(known) or 'none'}), got {name!r}"
            raise InputError(msg)
        tensor = getattr(submodule, name)
        resized = tensor.detach().new_zeros(shape)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(submodule, name, nn.Parameter(resized, tensor.requires_grad) if is_parameter else resized)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is Hugging Face's `Conv1D`, told by its name and shapes: weight (in, out), bias (out,)."""
    shapes = _shapes(layer)
    weight = shapes.get("weight", ())
    return type(layer).__name__ == "Conv1D" and len(weight) == 2 and shapes == {"weight": weight, "bias": weight[1:]}


def name_after(name: str, edits: tuple[Edit, ...]) -> str | None:
    """Name of a parameter after `edits`: stacks count the children that they kept anew.

    None if its module is gone, left out of a stack or replaced by another.
    """
    for edit in edits:
        prefix = f"{edit.path}." if edit.path else ""
        if edit.replacement is not None and name.startswith(prefix):
            return None
        if edit.children is not None and name.startswith(prefix):
            child, _, rest = name.removeprefix(prefix).partition(".")
            if child not in edit.children:
                return None
            name = f"{prefix}{edit.children.index(child)}.{rest}"
    return name


def _replace_in_place(module: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    if not path:
        msg = "only a submodule can be replaced, not the whole model; name its factory as `model` or `student` instead"
        raise InputError(msg)
    module.set_submodule(path, replacement.train(module.get_submodule(path).training))
    return replacement


def _become_linear_in_place(module: nn.Module, path: str) -> nn.Linear:
    conv1d = module.get_submodule(path)
    if not is_conv1d(conv1d) or not path:
        msg = f"only a Conv1D below the model can become nn.Linear, got {type(conv1d).__name__} at {path!r}"
        raise InputError(msg)
    weight, bias = conv1d.get_parameter("weight"), conv1d.get_parameter("bias")
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta").train(conv1d.training)
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
    linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    module.set_submodule(path, linear)
    return linear


def _keep_children_in_place(stack: nn.Module, path: str, names: tuple[str, ...]) -> None:
    if not isinstance(stack, nn.Sequential | nn.ModuleList):
        msg = f"only nn.Sequential and nn.ModuleList can lose children, got {type(stack).__name__} at {path!r}"
        raise InputError(msg)
    # named_children would leave out a child that stands in the stack twice
    children = dict(stack._modules)
    if not names or [name for name in children if name in names] != list(names):
        msg = f"the children kept of {path!r} must be some of {', '.join(children)}, in this order, got {list(names)}"
        raise InputError(msg)
    stack._modules.clear()
    for position, name in enumerate(names):
        stack.add_module(str(position), children[name])


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _sizes(module: nn.Module) -> dict[str, int | tuple[int, ...]]:
    def is_size(value: object) -> bool:
        if isinstance(value, tuple):
            return all(isinstance(part, int) for part in value)
        return isinstance(value, int) and not isinstance(value, bool)

    return {name: value for name, value in vars(module).items() if is_size(value)}
