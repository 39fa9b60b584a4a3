"""From a float graph to an int8 model: how ranges are found and weights rounded, for every stage that needs one."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch.fx import GraphModule

from compressor.quantization.bias_correction import correct_bias
from compressor.quantization.calibration import calibrate
from compressor.quantization.conversion import affine_of, round_weights
from compressor.quantization.int8_model import Int8Model
from compressor.quantization.int8_plan import plan_int8
from compressor.quantization.layerwise import Refine, refine_layers, sample_inputs
from compressor.quantization.ranges import RangeMethod
from compressor.quantization.rounding import learn_rounding
from compressor.quantization.targets import TARGETS, TargetName
from compressor.task import Split

Rounding: TypeAlias = Literal["nearest", "learned"]


@dataclass(frozen=True)
class Recipe:
    """How numbers become codes."""

    target: TargetName
    ranges: RangeMethod
    rounding: Rounding
    bias_correction: bool
    seed: int

    @property
    def refinements(self) -> tuple[Refine, ...]:
        """What each layer goes through after its weights were rounded."""
        limit, generator = TARGETS[self.target].weight_limit, torch.Generator().manual_seed(self.seed)
        learned = partial(learn_rounding, limit=limit, generator=generator)
        return (learned,) * (self.rounding == "learned") + (correct_bias,) * self.bias_correction


def int8_model(
    graph: GraphModule,
    split: Split,
    samples: Sequence[int],
    recipe: Recipe,
    *,
    keep_float: Collection[str] = (),
    compute_float: Collection[str] = (),
) -> Int8Model:
    """Quantize a folded float graph, calibrated on the `samples` of `split`; the layers are named as in `plan_int8`.

    Raises InputError naming the first weight or layer whose numbers are not finite.
    """
    spelled, plan = plan_int8(graph, keep_float=keep_float, compute_float=compute_float)
    affines = affine_of(plan, calibrate(spelled, plan, split, samples, recipe.ranges))
    weights = round_weights(spelled, plan, affines, TARGETS[recipe.target].weight_limit)
    if recipe.refinements:
        inputs = sample_inputs(spelled, split, samples)
        spelled, weights = refine_layers(spelled, plan, affines, weights, inputs, refinements=recipe.refinements)
    return Int8Model(spelled, plan, affines, weights)
