"""What `compress sensitivity` runs: a pipeline up to the stage that measures how much each group matters."""

from dataclasses import replace

from compressor.config.chain import NamedStage, find_stage
from compressor.config.installed_stages import stage_names
from compressor.config.pipeline_file import Pipeline
from compressor.errors import ConfigError, Problem

_SENSITIVITY = "sensitivity"
_PRUNING = "magnitude_pruning"


def up_to_sensitivity(pipeline: Pipeline, *, stage: int | None = None) -> Pipeline:
    """Return `pipeline` up to the stage that measures sensitivity; all its steps have the keys they have in a full run.

    That is the first such stage or, if there is none, one put before the first pruning, whose criterion and protected
    layers it takes over. `stage`, counted from 0, chooses another one of either kind.

    Raises ConfigError if there is no such stage.
    """
    measures, prunes = (find_stage(name, stage_names()) for name in (_SENSITIVITY, _PRUNING))
    stages = pipeline.stages
    known = [position for position, one in enumerate(stages) if isinstance(one.stage, measures | prunes)]
    if stage is None and known:
        stage = min(known, key=lambda position: not isinstance(stages[position].stage, measures))
    if stage is None or stage not in known:
        listed = ", ".join(f"{position} ({stages[position].name})" for position in known) or "none"
        asked = "" if stage is None else f"; asked for {stage}"
        msg = f"sensitivity is measured at a stage {_SENSITIVITY} or {_PRUNING}, of which there are: {listed}{asked}"
        raise ConfigError([Problem(msg)])
    last = stage
    while last > 0 and stages[last - 1].stage.keeps_model and not isinstance(stages[last].stage, measures):
        last -= 1
    if isinstance(stages[last].stage, measures):
        return replace(pipeline, stages=stages[: last + 1])
    settings = stages[stage].stage.model_dump_json(include={"criterion", "protect"})
    added = NamedStage(_SENSITIVITY, measures.model_validate_json(settings))
    return replace(pipeline, stages=(*stages[:stage], added))
