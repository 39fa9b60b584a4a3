"""What the user brings beside the model."""

import pytest
import torch

from compressor.records.measurements import MetricInfo
from compressor.task import Samples, accuracy, evenly_spaced, survey


def test_evenly_spaced_samples_reach_every_class_of_a_sorted_split():
    targets = torch.arange(10).repeat_interleave(100)
    split = Samples((targets,), targets)
    assert sorted({int(split[index][1]) for index in evenly_spaced(split, 20)}) == list(range(10))
    assert evenly_spaced(split, 5000) == list(range(1000))


def test_metric_says_how_it_is_shown_and_judged():
    assert accuracy.info == MetricInfo(name="accuracy", unit="%", higher_is_better=True)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bool])
def test_survey_has_each_target_with_the_first_sample_that_has_it(shape, dtype):
    targets = torch.randint(0, 100, (700, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    facts = survey(Samples((torch.zeros(700, 1),), targets))
    expected = {}
    for row, target in enumerate(targets):
        for value in target.flatten().tolist():
            expected.setdefault(float(value), row)
    assert facts.first == expected
    assert facts.is_complete
    assert facts.is_uniform


def test_survey_has_the_first_target_that_is_no_number():
    targets = torch.tensor([0.5, float("nan"), float("inf"), float("nan"), 0.5])
    facts = survey(Samples((torch.zeros(5, 1),), targets))
    assert {str(value): row for value, row in facts.first.items()} == {"0.5": 0, "nan": 1, "inf": 2}
