import json
import math
import os
import threading

import pytest
from example_report import chain, classifiers, prepared, report, row

from compressor.errors import InputError
from compressor.report.json import MOST_BYTES, read_report, to_json


def written(path, **changes):
    document = json.loads(to_json(chain()))
    path.write_text(json.dumps({**document, **changes}))
    return path


def distilled():
    """A report with soft labels and a student that learned from them."""
    student = row("distillation").model_copy(update={"losses": ({"kd": 0.5, "hard": 2.25}, {"kd": 0.125, "hard": 1.5})})
    return report(row("training"), student).model_copy(update={"preparations": (prepared(),)})


@pytest.mark.parametrize("found", [chain(), classifiers(), distilled()], ids=["chain", "classifiers", "distilled"])
def test_a_report_that_was_written_is_read_back_equal(tmp_path, found):
    (tmp_path / "report.json").write_text(to_json(found))
    assert read_report(tmp_path / "report.json") == found


def test_a_report_from_before_quality_was_measured_is_read(tmp_path):
    document = json.loads(to_json(chain()))
    del document["labels"]
    for written_row in document["rows"]:
        del written_row["quality"], written_row["fidelity"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    assert read_report(tmp_path / "report.json") == chain()


def test_a_report_from_before_losses_and_preparations_were_kept_is_read(tmp_path):
    document = json.loads(to_json(chain()))
    del document["preparations"]
    for written_row in document["rows"]:
        del written_row["losses"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    assert read_report(tmp_path / "report.json") == chain()


def test_a_report_of_another_schema_says_which(tmp_path):
    path = written(tmp_path / "report.json", schema_version=2, rows="of another kind")
    with pytest.raises(InputError, match=r"report.json must have schema_version 1, got 2; read it with the release"):
        read_report(path)


def test_an_unknown_key_is_refused_and_named(tmp_path):
    path = written(tmp_path / "report.json", speed=5)
    with pytest.raises(InputError, match="speed: Extra inputs are not permitted"):
        read_report(path)


def test_a_value_of_the_wrong_type_is_refused_and_named(tmp_path):
    document = json.loads(to_json(chain()))
    document["rows"][1]["measurement"]["size_bytes"] = "58000"
    path = written(tmp_path / "report.json", rows=document["rows"])
    with pytest.raises(InputError, match=r"rows\.1\.measurement\.size_bytes: Input should be a valid integer"):
        read_report(path)


@pytest.mark.parametrize("number", [math.nan, math.inf, None])
def test_a_number_that_is_not_finite_is_refused_and_named(tmp_path, number):
    document = json.loads(to_json(chain()))
    document["rows"][1]["measurement"]["metrics"]["accuracy"] = number
    path = written(tmp_path / "report.json", rows=document["rows"])
    with pytest.raises(InputError, match=r"rows\.1\.measurement\.metrics\.accuracy: Input should be a "):
        read_report(path)


def test_many_faults_are_not_all_listed(tmp_path):
    path = written(tmp_path / "report.json", **{f"unknown_{number}": 1 for number in range(8)})
    with pytest.raises(InputError, match="and 3 more"):
        read_report(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"schema_version": 1}', "[" * 100_000])
def test_what_is_no_report_is_an_input_error(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match=r"report\.json must"):
        read_report(tmp_path / "report.json")


def test_bytes_that_are_no_text_are_an_input_error(tmp_path):
    (tmp_path / "report.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="must be a report"):
        read_report(tmp_path / "report.json")


def test_a_missing_report_says_what_writes_one(tmp_path):
    with pytest.raises(InputError, match="No such file or directory; `compress run` writes one"):
        read_report(tmp_path / "report.json")


def test_more_than_a_report_ever_has_is_not_read(tmp_path):
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", MOST_BYTES + 1)  # a hole, which takes no room
    with pytest.raises(InputError, match="must be a report, of at most 64 MiB, got more"):
        read_report(tmp_path / "large")


def test_a_report_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    report = classifiers()
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=[to_json(report)])
    writer.start()
    assert read_report(tmp_path / "pipe") == report
    writer.join()


@pytest.mark.parametrize("name", ["index", "target", "baseline_predicted", "predicted"])
def test_an_index_below_zero_is_refused_and_named(tmp_path, name):
    document = json.loads(to_json(classifiers()))
    document["rows"][-1]["fidelity"]["worst_samples"][0][name] = -1
    path = written(tmp_path / "report.json", rows=document["rows"])
    with pytest.raises(InputError, match=rf"worst_samples\.0\.{name}: Input should be greater than or equal to 0"):
        read_report(path)
