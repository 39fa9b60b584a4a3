import pytest
from pydantic import ValidationError

from compressor import Document, EpochLosses, Finding, Reached
from compressor.errors import StageError
from compressor.records.step_facts import collect_findings


def test_losses_come_in_order_and_the_last_of_each_setting_and_document_counts():
    told = [
        EpochLosses(means={"hard": 2.0}),
        Reached(setting="sparsity", asked=0.5, achieved=0.1),
        Document(name="curve.svg", text="<svg/>"),
        EpochLosses(means={"hard": 1.0}),
        Reached(setting="sparsity", asked=0.5, achieved=0.5),
        Document(name="curve.svg", text="<svg></svg>"),
    ]
    findings = collect_findings(told)
    assert [losses["hard"] for losses in findings.losses] == [2.0, 1.0]
    assert [reached.achieved for reached in findings.reached] == [0.5]
    assert [document.text for document in findings.documents] == ["<svg></svg>"]
    assert findings.quantization is None


def test_finding_of_an_unknown_kind_is_refused_with_the_kinds_there_are():
    class Rank(Finding):
        rank: int

    for told in (Rank(rank=3), {"rank": 3}):
        with pytest.raises(StageError, match=r"must be given EpochLosses, Reached, .* got (Rank|dict)"):
            collect_findings([told])


@pytest.mark.parametrize(
    "name", ["../curve.svg", "a/b.md", ".store.json", "model.onnx", "run.html", "", "report.json", "Outcome.json"]
)
def test_document_is_a_text_file_directly_in_the_run_directory(name):
    with pytest.raises(ValidationError):
        Document(name=name, text="")
    Document(name="curve.svg", text="")
    with pytest.raises(ValidationError, match="UTF-8"):
        Document(name="curve.svg", text="\ud800")
