#!/usr/bin/env bash
# pytest 9.2.0 and torch 2.13.0: inside a test, torch.export writes a structured trace of every step.
#
# Guess: logging of a library that nobody configured costs nothing in a test. Seen: pytest adds its capturing handlers
# also to loggers that do not propagate. torch.__trace is one, and the handler there is what torch asks whether a trace
# is wanted: it then dumps its graphs as JSON at every step. In a plain process the same export logs nothing.
# Exports in a suite take about twice as long, and the report of a failed test ends with thousands of lines of trace.
# pytest 9.0.3 does not do it. `logging.getLogger("torch.__trace").propagate = True` in pytest_configure stops it, if torch
# is imported before.
# Source: _pytest/logging.py, catching_logs.__enter__; torch/_logging/_internal.py, trace_structured.
#
# Output seen: pytest 9.0.3: 0 records, pytest 9.2.0: 21, with propagate = True: 2.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0
"$place/venv/bin/pip" install --quiet numpy==2.4.6
cat > "$place/test_trace.py" <<'PY'
import torch


def test_export(caplog):
    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(2, 2),))
    print("records:", sum(record.name == "torch.__trace" for record in caplog.records))
PY
count() {
    (cd "$place" && "$place/venv/bin/python" -m pytest -q -s -p no:cacheprovider test_trace.py 2>/dev/null) |
        sed -n 's/^.*records: //p'
}
"$place/venv/bin/pip" install --quiet pytest==9.0.3
before=$(count)
"$place/venv/bin/pip" install --quiet pytest==9.2.0
after=$(count)
echo 'import logging
import torch
def pytest_configure():
    logging.getLogger("torch.__trace").propagate = True' > "$place/conftest.py"
mended=$(count)
echo "pytest 9.0.3: $before records, pytest 9.2.0: $after, with propagate = True: $mended"
[ "$before" = 0 ] && [ "$after" -gt 10 ] && [ "$mended" -lt 5 ]
