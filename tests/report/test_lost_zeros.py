import pytest
from example_report import report, row

from compressor.report.remarks import remarks


def said(before: int, after: int, parameters: int = 25_000) -> list[str]:
    rows = (row("sparse", nonzero=before), row("student", parameters=parameters, nonzero=after, size_bytes=50_000))
    return [remark for remark in remarks(report(*rows)) if "is dense" in remark]


def test_a_student_that_leaves_the_zeros_behind_is_called_dense():
    assert said(10_000, 4_990, parameters=5_000) == [
        "student is dense: 0 % of its parameters are zero, after 60 % of those of sparse."
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(10_000, 10_000, id="kept"),
        pytest.param(10_000, 14_000, id="removed-with-channels"),
        pytest.param(24_900, 25_000, id="few-biases"),
    ],
)
def test_nothing_is_said_where_zeros_stay_or_were_few(before, after):
    assert said(before, after) == []


def test_nothing_is_said_of_a_model_without_parameters():
    assert said(24_900, 0, parameters=0) == []
