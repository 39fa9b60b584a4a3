"""What every int8 stage does first: plan what becomes int8, and say what does not."""

from collections.abc import Callable, Collection

from torch.fx import GraphModule

from compressor.errors import StageError
from compressor.quantization.plan import Plan, plan_int8, weighted_floats


def planned(
    graph: GraphModule, log: Callable[[str], None], *, keep_float: Collection[str] = ()
) -> tuple[GraphModule, Plan]:
    """`plan_int8`; `log` is told which layers stay in float. Raises StageError if all would."""
    spelled, plan = plan_int8(graph, keep_float=keep_float)
    if not plan.computes:
        whose = "the model has none that keep_float leaves" if keep_float else "the model has none"
        msg = f"int8 needs a convolution or a linear layer with a weight of its own, but {whose}"
        raise StageError(msg)
    floats = weighted_floats(spelled, plan)
    if floats:
        log(f"stays in float: {', '.join(floats)}")
    return spelled, plan
