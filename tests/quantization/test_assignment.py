"""The division of layers between int8 and float."""

import itertools
import math
import random

import pytest

from compressor.quantization.assignment import Handover, Times, find_cheapest, total_time


def chain(*times: Times, conversion: float) -> tuple[dict[str, Times], list[Handover]]:
    """Layers a, b, … one after the other, between a float input and a float output."""
    names = "abcdefgh"[: len(times)]
    producers = [None, *names]
    handovers = [Handover(p, frozenset(r), False, conversion) for p, r in zip(producers, names, strict=False)]
    handovers.append(Handover(names[-1], frozenset(), True, conversion))
    return dict(zip(names, times, strict=True)), handovers


def random_network(generator: random.Random, size: int) -> tuple[dict[str, Times], list[Handover]]:
    names = [f"layer{index}" for index in range(size)]
    layers = {name: Times(generator.uniform(0, 10), generator.uniform(0, 10)) for name in names}
    handovers = []
    for index, producer in enumerate((None, *names)):
        readers = frozenset(name for name in names[index:] if generator.random() < 0.4)
        time = math.inf if generator.random() < 0.1 else generator.uniform(0, 5)
        handovers.append(Handover(producer, readers, generator.random() < 0.2, time))
    return layers, handovers


@pytest.mark.parametrize("seed", range(40))
def test_no_other_assignment_is_cheaper(seed: int) -> None:
    generator = random.Random(seed)
    layers, handovers = random_network(generator, size=8)
    every = itertools.chain.from_iterable(itertools.combinations(layers, count) for count in range(len(layers) + 1))
    least = min(total_time(layers, handovers, floats) for floats in every)
    # the flow and the total add the same numbers in other orders
    assert total_time(layers, handovers, find_cheapest(layers, handovers)) == pytest.approx(least, rel=1e-9)


def test_total_counts_one_conversion_for_all_who_read_a_tensor() -> None:
    layers = {name: Times(1.0, 2.0) for name in "abc"}
    handovers = [Handover("a", frozenset("bc"), True, 10.0)]
    assert total_time(layers, handovers, "") == 1 + 1 + 1 + 10  # something else reads float
    assert total_time(layers, handovers, "bc") == 1 + 2 + 2 + 10
    assert total_time(layers, handovers, "a") == 2 + 1 + 1 + 10
    assert total_time(layers, handovers, "abc") == 2 + 2 + 2


def test_layer_that_gains_less_than_conversions_cost_computes_in_float() -> None:
    layers, handovers = chain(Times(9.0, 1.0), Times(1.0, 2.0), Times(9.0, 1.0), conversion=0.6)
    assert find_cheapest(layers, handovers) == {"a", "b", "c"}


def test_layer_that_gains_more_than_conversions_cost_computes_in_int8() -> None:
    layers, handovers = chain(Times(9.0, 1.0), Times(1.0, 2.3), Times(9.0, 1.0), conversion=0.6)
    assert find_cheapest(layers, handovers) == {"a", "c"}


def test_slow_layer_amid_fast_ones_computes_in_int8_to_save_conversions() -> None:
    layers, handovers = chain(Times(1.0, 5.0), Times(2.0, 1.0), Times(1.0, 5.0), conversion=0.6)
    assert find_cheapest(layers, handovers) == frozenset()


def test_float_wins_a_tie() -> None:
    layers, handovers = chain(Times(1.0, 1.0), Times(2.0, 2.0), conversion=0.0)
    assert find_cheapest(layers, handovers) == {"a", "b"}


def test_many_layers_are_divided_in_no_time() -> None:
    generator = random.Random(0)
    layers = {str(index): Times(generator.uniform(0, 10), generator.uniform(0, 10)) for index in range(500)}
    handovers = [Handover(str(i), frozenset({str(i + 1), str(min(i + 3, 499))}), False, 1.0) for i in range(499)]
    floats = find_cheapest(layers, handovers)
    assert total_time(layers, handovers, floats) < min(
        total_time(layers, handovers, ()), total_time(layers, handovers, layers)
    )
