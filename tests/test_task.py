"""What the user brings beside the model."""

import torch

from compressor.records.measurements import MetricInfo
from compressor.task import Samples, accuracy, evenly_spaced


def test_evenly_spaced_samples_reach_every_class_of_a_sorted_split():
    targets = torch.arange(10).repeat_interleave(100)
    split = Samples((targets,), targets)
    assert sorted({int(split[index][1]) for index in evenly_spaced(split, 20)}) == list(range(10))
    assert evenly_spaced(split, 5000) == list(range(1000))


def test_metric_says_how_it_is_shown_and_judged():
    assert accuracy.info == MetricInfo(name="accuracy", unit="%", higher_is_better=True)
