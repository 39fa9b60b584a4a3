"""What layers the models have that a pipeline file names: for choosing those that a student learns from."""

from dataclasses import dataclass

from torch import nn

from compressor.config.pipeline_file import Pipeline
from compressor.models.artifact import TorchModel
from compressor.models.layers import LayerOutput, layer_outputs, layer_paths
from compressor.references.reference import Reference, prefer_modules_in, user_errors
from compressor.run.preflight import as_task
from compressor.system.disk import memory_errors
from compressor.task import Task
from compressor.text.figures import printable
from compressor.text.layout import align


@dataclass(frozen=True)
class ModelLayers:
    """The layers of one model: those that give a tensor, with its shape for `batch_size` samples, and the others."""

    name: str
    """The factory, with its arguments."""
    parameters: int
    batch_size: int
    outputs: tuple[LayerOutput, ...]
    without_output: tuple[str, ...]


def inspect_models(pipeline: Pipeline) -> tuple[ModelLayers, ...]:
    """Build the model of `pipeline` and every model that its stages name, without weights files, and run each once.

    Raises InputError for user code at fault, HostError.
    """
    with prefer_modules_in(pipeline.directory), user_errors(), memory_errors():
        task = as_task(pipeline.task.call())
        architectures = [reference.without("weights_file") for reference in (pipeline.model, *pipeline.references)]
        return tuple(
            _inspect(reference, task, seed=pipeline.seed)
            for position, reference in enumerate(architectures)
            if reference not in architectures[:position] and (position == 0 or isinstance(reference.call(), nn.Module))
        )


def to_table(model: ModelLayers) -> str:
    """Heading and aligned table: path, class, output shape with N for the batch, parameters. No final newline."""
    head = ["layer", "class", "output", "parameters"]
    body = [
        [printable(output.path), output.kind, _shape(output, model.batch_size), f"{output.parameters:,}"]
        for output in model.outputs
    ]
    silent = [f"never called, or without a tensor: {', '.join(map(printable, model.without_output))}"]
    title = f"{printable(model.name)}: {model.parameters:,} parameters"
    return "\n".join([title, align([head, *body], left=3), *(silent if model.without_output else [])])


def _inspect(reference: Reference, task: Task, *, seed: int) -> ModelLayers:
    module = TorchModel.build(reference, seed=seed).module
    outputs = layer_outputs(module, task.example_inputs)
    giving = {output.path for output in outputs}
    arguments = ", ".join(f"{name}={value!r}" for name, value in (reference.model_extra or {}).items())
    return ModelLayers(
        name=f"{reference.factory}({arguments})" if arguments else reference.factory,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        batch_size=len(task.example_inputs[0]),
        outputs=outputs,
        without_output=tuple(path for path in layer_paths(module) if path not in giving),
    )


def _shape(output: LayerOutput, batch_size: int) -> str:
    sizes = ["N" if axis == 0 and size == batch_size else str(size) for axis, size in enumerate(output.shape)]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
