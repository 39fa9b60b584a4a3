"""What a chain with pruning is refused for, and not refused for, before anything is trained."""

import pytest

from compressor.errors import StageError
from compressor.models.artifact import Artifact, TorchModel
from compressor.references.reference import Reference
from compressor.stages.magnitude_pruning import MagnitudePruning
from compressor.stages.sensitivity import Sensitivity
from compressor.stages.weight_pruning import WeightPruning


def plain() -> TorchModel:
    return TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)


LATER = {
    "ratio": [MagnitudePruning(pruning_ratio=0.25, round_to=1)],
    "goal": [MagnitudePruning(parameters=5_000, round_to=1)],
    "pattern": [WeightPruning(pattern="2:4")],
    "sensitivity": [Sensitivity(), MagnitudePruning(pruning_ratio=0.25, allocation="sensitivity", round_to=1)],
}


@pytest.fixture(scope="module", params=[{"parameters": 20_000}, {"latency_ratio": 1.1}], ids=["count", "time"])
def behind_a_goal(request, digits_task) -> Artifact | None:
    """What the rehearsal of a goal gives."""
    model = plain()
    return MagnitudePruning.model_validate({"round_to": 1, **request.param}).rehearse(model, model, digits_task)


@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
def test_what_follows_a_goal_is_not_refused_for_the_largest_cut(behind_a_goal, later, digits_task):
    """The rehearsal of a goal goes as far as it can; the stages behind it meet a model that was cut less."""
    model = behind_a_goal
    for stage in later:
        model = stage.rehearse(model, plain(), digits_task)
    assert isinstance(model, TorchModel)


@pytest.mark.parametrize("goal", ["parameters", "macs", "size_bytes"])
def test_a_goal_that_the_model_meets_uncut_is_refused_in_the_rehearsal(goal, digits_task):
    stage = MagnitudePruning.model_validate({goal: 10**9})
    with pytest.raises(StageError, match=rf"{goal} must be at most 1,000,000,000, which the model meets uncut with \d"):
        stage.rehearse(plain(), plain(), digits_task)
