import pytest

from compressor.records.measurements import Latency, MetricInfo
from compressor.text.figures import change, milliseconds, printable, size, speed, times, value

ACCURACY = MetricInfo(name="accuracy", unit="%", higher_is_better=True)
LOSS = MetricInfo(name="loss", unit="nats", higher_is_better=False)


def latency(ratio: float, half_width: float) -> Latency:
    return Latency(
        p50_ms=0.1 / ratio, ratio=ratio, ratio_low=ratio / (1 + half_width), ratio_high=ratio * (1 + half_width)
    )


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (14_249, "14.2 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (1_724_000, "1.72 MB"),
        (2_500_000_000, "2.50 GB"),
    ],
)
def test_sizes_have_three_digits_and_decimal_units(size_bytes, text):
    assert size(size_bytes) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(121.4, "121x faster"), (4.817, "4.82x faster"), (1.0, "1.000x faster"), (0.769, "1.30x slower")],
)
def test_ratios_below_1_are_turned_round(ratio, text):
    assert times(ratio, "faster", "slower") == text


def test_a_slower_model_has_its_interval_turned_round_with_it():
    assert speed(latency(0.5, 0.1)) == "2.00x slower [1.82, 2.20]"
    assert speed(latency(4.0, 0.01)) == "4.00x faster [3.96, 4.04]"


def test_an_interval_that_holds_1_is_no_difference():
    assert speed(latency(1.01, 0.02)) == "no difference [0.990, 1.030]"


def test_figures_that_round_up_keep_three_digits():
    assert milliseconds(9.996) == "10.0 ms"
    assert milliseconds(0.0069) == "0.00690 ms"
    assert milliseconds(1234.5) == "1230 ms"


def test_metrics_have_their_unit_and_shares_are_percentages():
    assert (value(ACCURACY, 0.98766), change(ACCURACY, 0.99, 0.98766)) == ("98.77 %", "-0.23 points")
    assert (value(LOSS, 0.12346), change(LOSS, 0.1, 0.12346)) == ("0.1235 nats", "+0.0235 nats")
    assert value(MetricInfo(name="f1", unit="", higher_is_better=True), 0.5) == "0.5"


def test_shares_beyond_a_million_percent_have_few_digits():
    assert (value(ACCURACY, 9999.0), value(ACCURACY, 1e300)) == ("999900.00 %", "1e+302 %")
    assert change(ACCURACY, 0.0, -1e300) == "-1e+302 points"


def test_letters_of_other_scripts_are_printable():
    assert printable("präzision 精度") == "präzision 精度"
    joined = "می\u200cروم 👩\u200d🚀"  # a Persian word, and an astronaut: a woman and a rocket
    assert printable(joined) == joined
