"""What runs a reported pipeline again: the command, and the pipeline as it ran."""

import json
import shlex

from compressor.records.report import Report
from compressor.text.figures import printable


def command(report: Report) -> str:
    """The command of the run, on one line, quoted for a shell."""
    overrides = "".join(f" --set {shlex.quote(printable(override))}" for override in report.overrides)
    return f"compress run {shlex.quote(printable(report.pipeline))}.yaml{overrides}"


def settings(report: Report) -> str:
    """The pipeline file as it ran, overrides included, in JSON, which is YAML; ASCII."""
    return json.dumps(report.model_dump(mode="json")["settings"], indent=2)
