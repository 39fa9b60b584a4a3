"""What every int8 stage does first: choose samples, plan what becomes int8, and say what does not."""

from collections.abc import Callable, Collection

from torch.fx import GraphModule

from compressor.errors import StageError
from compressor.quantization.calibration import FEW_SAMPLES, calibration_samples
from compressor.quantization.int8_plan import Int8Plan, list_float_layers, plan_int8
from compressor.task import Split


def choose_samples(split: Split, count: int, log: Callable[[str], None]) -> list[int]:
    """`calibration_samples`; `log` is told how many, and if they are few."""
    samples = calibration_samples(split, count)
    few = f", fewer than {FEW_SAMPLES}: ranges may be too small" if len(samples) < FEW_SAMPLES else ""
    log(f"calibrated on {len(samples)} samples{few}")
    return samples


def prepare_plan(
    graph: GraphModule, log: Callable[[str], None], *, keep_float: Collection[str] = ()
) -> tuple[GraphModule, Int8Plan]:
    """`plan_int8`; `log` is told which layers stay in float. Raises StageError if all would."""
    spelled, plan = plan_int8(graph, keep_float=keep_float)
    if not plan.computes:
        whose = "the model has none that keep_float leaves" if keep_float else "the model has none"
        msg = f"int8 needs a convolution or a linear layer with a weight of its own, but {whose}"
        raise StageError(msg)
    floats = list_float_layers(spelled, plan)
    if floats:
        log(f"stays in float: {', '.join(floats)}")
    return spelled, plan
