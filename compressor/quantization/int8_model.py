"""An int8 model as one value: the planned graph with its codes, and what of it runs in PyTorch."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import GraphModule

from compressor.export.operators import DEQUANTIZE, QUANTIZE
from compressor.quantization.codes import Affine, WeightCodes
from compressor.quantization.conversion import convert
from compressor.quantization.int8_plan import Activation, Int8Plan
from compressor.task import Inputs


@dataclass(frozen=True)
class Int8Model:
    """A float graph, what of it becomes int8, and with which codes."""

    graph: GraphModule
    plan: Int8Plan
    affines: Mapping[str, Affine]
    """Scale and zero point by name of a tensor."""
    weights: Mapping[str, WeightCodes]
    """By name of a unit's node."""

    @cached_property
    def int8_graph(self) -> GraphModule:
        """The graph that is exported; in PyTorch it computes what the file does."""
        return convert(self.graph, self.plan, self.affines, self.weights)

    def with_one(self, layer: str) -> "Int8Model":
        """Return the model in which `layer` alone is int8, with the codes that it has here.

        What it reads becomes uint8 for it alone, what it gives for all that read it.
        """
        units = tuple(unit for unit in self.plan.units if unit.layer == layer)
        read = {name: Activation(name, everywhere=False) for unit in units for name in unit.inputs}
        given = {unit.output: Activation(unit.output) for unit in units if unit.output is not None}
        return replace(self, plan=Int8Plan(units, read | given))

    def outputs(self) -> Mapping[str, str]:
        """Name of the tensor that each layer gives, by layer; in `graph` and, before it is rounded, in `int8_graph`.

        Layers that only move codes are left out: they round nothing.
        """
        activations = self.plan.activations
        return {
            unit.layer: unit.output or unit.node
            for unit in self.plan.units
            if unit.output is None or activations[unit.output].like == unit.output
        }


def predict(graph: GraphModule, inputs: Inputs) -> Tensor:
    """Outputs without gradient."""
    with torch.no_grad():
        outputs: Tensor = graph(*inputs)
    return outputs


def round_outputs(int8_graph: GraphModule) -> Mapping[str, str]:
    """Name of the node that gives a tensor after it was rounded to its codes, by name of that tensor."""
    return {
        str(codes.args[0]): node.name
        for node in int8_graph.graph.nodes
        if node.target is DEQUANTIZE
        for codes in node.all_input_nodes[:1]
        if codes.target is QUANTIZE
    }


def ratio_db(signal: float, noise: float) -> float | None:
    """10 log10 of a ratio of powers; None without noise."""
    return 10 * math.log10(max(signal, sys.float_info.min) / noise) if noise else None
