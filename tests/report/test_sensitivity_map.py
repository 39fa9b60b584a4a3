import xml.etree.ElementTree as ET

import pytest
from pydantic import ValidationError

from compressor.records.measurements import MetricInfo
from compressor.records.sensitivity_curves import GroupCurve, SensitivityCurves
from compressor.report.sensitivity_map import to_markdown, to_svg, to_table

SVG = "{http://www.w3.org/2000/svg}"
LOSS = MetricInfo(name="loss", unit="nats", higher_is_better=False)


def example(groups=None, **changes) -> SensitivityCurves:
    groups = groups or {
        "stem": GroupCurve(channels=16, values=(0.9, 0.5)),
        "layer1.0.conv1": GroupCurve(channels=1024, values=(0.95, 0.94)),
    }
    settings = {
        "model": "ab" * 32,
        "criterion": "l2",
        "metric": MetricInfo(name="accuracy", unit="%", higher_is_better=True),
        "samples": 2000,
        "ratios": (0.25, 0.5),
        "value": 0.95,
        "groups": groups,
    }
    return SensitivityCurves(**{**settings, **changes})


def cells(svg: str) -> dict[str, str]:
    """Color of each cell by what it tells."""
    return {
        cell.find(f"{SVG}title").text: cell.find(f"{SVG}rect").get("fill")
        for cell in ET.fromstring(svg).iter(f"{SVG}g")
    }


def test_table_has_a_row_for_each_group_and_a_column_for_each_ratio():
    assert to_table(example()).splitlines() == [
        "accuracy in % on 2,000 samples of the validation split, by the share of one group's channels that was cut; "
        "95.00 % uncut",
        "group           channels  25 %  50 %",
        "--------------  --------  ----  ----",
        "stem                  16  90.0  50.0",
        "layer1.0.conv1     1,024  95.0  94.0",
    ]


def test_markdown_has_the_table_and_shows_the_picture():
    text = to_markdown(example(), picture="sensitivity.svg")
    assert "| layer1.0.conv1 | 1,024 | 95.0 | 94.0 |" in text
    assert "(sensitivity.svg)" in text
    assert "smallest l2 scores" in text


def test_picture_tells_every_value_and_is_darkest_where_the_fall_is_largest():
    found = cells(to_svg(example()))
    assert list(found) == [
        "stem without 25 % of its channels: 90.00 % (-5.00 points)",
        "stem without 50 % of its channels: 50.00 % (-45.00 points)",
        "layer1.0.conv1 without 25 % of its channels: 95.00 % (+0.00 points)",
        "layer1.0.conv1 without 50 % of its channels: 94.00 % (-1.00 points)",
    ]
    five, most, none, one = (int(color[3:5], 16) for color in found.values())  # green, of which red has little
    assert none == 255 > one > five > most


def test_picture_has_a_title_and_a_description_that_label_it():
    root = ET.fromstring(to_svg(example()))
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "title description"
    assert root.find(f"{SVG}title").text == "Sensitivity of 2 groups"
    assert "95.00 % uncut" in root.find(f"{SVG}desc").text


def test_all_of_thirty_groups_lies_within_the_picture():
    groups = {f"layer{i}.{'deep.' * i}conv": GroupCurve(channels=64, values=(0.9, 0.8)) for i in range(30)}
    root = ET.fromstring(to_svg(example(groups)))
    width, height = float(root.get("width")), float(root.get("height"))
    assert height < 30 * 20 + 150
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width")) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height")) <= height


def test_names_cannot_write_markup():
    bad = '<script>"&\x1b[31m|'
    found = example({bad: GroupCurve(channels=4, values=(0.9, 0.8))})
    texts = [text.text for text in ET.fromstring(to_svg(found)).iter(f"{SVG}text")]
    assert '<script>"&?[31m|' in texts
    assert "\x1b" not in to_table(found)
    assert "<script>" not in to_markdown(found, picture="p.svg")


def test_metric_that_is_better_when_lower_is_dark_where_it_rises():
    groups = {"a": GroupCurve(channels=4, values=(0.4, 2.5)), "b": GroupCurve(channels=4, values=(0.5, 0.5))}
    found = cells(to_svg(example(groups, metric=LOSS, value=0.5)))
    assert found["a without 50 % of its channels: 2.5 nats (+2 nats)"] == "#a50f15"
    assert found["a without 25 % of its channels: 0.4 nats (-0.1 nats)"] == "#ffffff"


def test_picture_without_any_fall_is_white():
    groups = {"a": GroupCurve(channels=4, values=(0.95, 0.95))}
    assert set(cells(to_svg(example(groups))).values()) == {"#ffffff"}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"ratios": (0.5, 0.25)}, id="ratios-fall"),
        pytest.param({"ratios": (0.5, 1.0)}, id="all-removed"),
        pytest.param({"ratios": (0.1, 0.2, 0.3)}, id="value-missing"),
        pytest.param({"value": float("nan")}, id="no-number"),
        pytest.param({"samples": 0}, id="no-samples"),
    ],
)
def test_record_that_does_not_hold_together_is_refused(changes):
    with pytest.raises(ValidationError):
        example(**changes)


def test_record_comes_back_from_json():
    assert SensitivityCurves.model_validate_json(example().model_dump_json()) == example()
