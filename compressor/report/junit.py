"""Verdicts as JUnit XML, which most systems for continuous integration show as tests."""

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from compressor.records.report import Verdict

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, escaped or not (section 2.2)."""


def to_junit(name: str, verdicts: Sequence[Verdict]) -> bytes:
    """The suite `name` with a case for each verdict: unmet fails, undecidable is an error, at level `warn` skipped."""
    kinds = [_kind(verdict) for verdict in verdicts]
    suite_name = _strip_forbidden(name)
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name=suite_name,
        tests=str(len(kinds)),
        failures=str(kinds.count("failure")),
        errors=str(kinds.count("error")),
        skipped=str(kinds.count("skipped")),
    )
    for kind, verdict in zip(kinds, verdicts, strict=True):
        case = ElementTree.SubElement(suite, "testcase", classname=suite_name, name=_strip_forbidden(verdict.metric))
        if kind == "system-out":
            ElementTree.SubElement(case, kind).text = _strip_forbidden(verdict.message)
        else:
            ElementTree.SubElement(case, kind, type=verdict.status, message=_strip_forbidden(verdict.message))
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _kind(verdict: Verdict) -> str:
    """The element that tells what became of a case."""
    if verdict.status == "met":
        return "system-out"
    if verdict.level == "warn":
        return "skipped"
    return "failure" if verdict.status == "unmet" else "error"


def _strip_forbidden(text: str) -> str:
    return _FORBIDDEN.sub("", text)
