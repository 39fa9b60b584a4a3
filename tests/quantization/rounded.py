"""A module as an int8 graph whose weights are rounded to the nearest, for tests of what improves on that."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from compressor import Samples, Task
from compressor.quantization.calibration import calibrate
from compressor.quantization.codes import Affine, WeightCodes
from compressor.quantization.conversion import affine_of, convert, round_weights
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from compressor.quantization.int8_plan import Int8Plan, plan_int8
from compressor.quantization.layerwise import Layer, Refine, refine_layers


@dataclass(frozen=True)
class Rounded:
    """What `refine_layers` takes, and what it gave: the float graph, its plan, ranges, codes and samples."""

    graph: GraphModule
    plan: Int8Plan
    affines: Mapping[str, Affine]
    weights: Mapping[str, WeightCodes]
    images: Tensor

    def refined(self, *refinements: Refine) -> "Rounded":
        graph, weights = refine_layers(
            self.graph, self.plan, self.affines, self.weights, (self.images,), refinements=refinements
        )
        return Rounded(graph, self.plan, self.affines, weights, self.images)

    def layers(self) -> list[Layer]:
        """Each layer as a refinement sees it."""
        seen: list[Layer] = []

        def keep(layer: Layer) -> Layer:
            seen.append(layer)
            return layer

        self.refined(keep)
        return seen

    def outputs(self, images: Tensor) -> Tensor:
        """What the int8 graph gives."""
        with torch.no_grad():
            return convert(self.graph, self.plan, self.affines, self.weights)(images)


def task_of(images: Tensor) -> Task:
    samples = Samples((images,), torch.zeros(len(images), dtype=torch.long))
    return Task(samples, samples, samples, samples, (images[:2],))


def rounded(module: nn.Module, images: Tensor, limit: int = 63) -> Rounded:
    task = task_of(images)
    graph, plan = plan_int8(fold_batch_norms(float_graph(module.eval(), task)))
    affines = affine_of(plan, calibrate(graph, plan, task.calibration, range(len(images)), "minmax"))
    return Rounded(graph, plan, affines, round_weights(graph, plan, affines, limit), images)
