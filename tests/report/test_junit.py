from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.records.report import Verdict
from compressor.report.junit import to_junit


def verdict(status: str = "met", level: str = "error", metric: str = "size_bytes", message: str = "too large"):
    return Verdict(metric=metric, limit="<= 10", status=status, level=level, message=message)


def suite(*verdicts: Verdict, name: str = "digits") -> ElementTree.Element:
    (found,) = ElementTree.fromstring(to_junit(name, verdicts))
    return found


@pytest.mark.parametrize(
    ("status", "level", "element"),
    [
        ("met", "error", "system-out"),
        ("met", "warn", "system-out"),
        ("unmet", "error", "failure"),
        ("undecidable", "error", "error"),
        ("unmet", "warn", "skipped"),
        ("undecidable", "warn", "skipped"),
    ],
)
def test_each_verdict_is_a_case_with_what_became_of_it(status, level, element):
    (case,) = suite(verdict(status, level))
    (told,) = case
    assert (case.get("classname"), case.get("name"), told.tag) == ("digits", "size_bytes", element)
    assert (told.text or told.get("message")) == "too large"


def test_the_suite_counts_its_cases():
    found = suite(verdict(), verdict("unmet"), verdict("unmet"), verdict("undecidable"), verdict("unmet", "warn"))
    assert found.attrib == {"name": "digits", "tests": "5", "failures": "2", "errors": "1", "skipped": "1"}


def test_a_run_without_gate_is_an_empty_suite():
    assert suite().get("tests") == "0"


def test_names_stay_text_and_what_xml_forbids_is_removed():
    hostile = "</testsuite><img src=x onerror=alert(1)>\x00\x1b[31m&\"'\ufffe]]>"
    found = suite(verdict("unmet", metric=hostile, message=hostile), name=hostile)
    harmless = "</testsuite><img src=x onerror=alert(1)>[31m&\"']]>"
    (case,) = found
    assert {found.get("name"), case.get("name"), case.get("classname"), case[0].get("message")} == {harmless}


@given(st.text(), st.sampled_from(["met", "unmet", "undecidable"]))
def test_every_name_gives_xml_that_can_be_read(name, status):
    assert len(suite(verdict(status, metric=name, message=name), name=name)) == 1
