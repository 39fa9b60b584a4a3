#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: torch.onnx.export(dynamo=True) builds its table of translations anew at every call.
#
# Guess: the table is made once for a process, or from compiled metadata. Seen: each call reads the Python source of
# some 500 functions again (inspect.getsource), since OnnxDecompMeta is given no signature. For a linear layer of four
# weights that is two thirds of the processor time of an export: 1.3 of 1.9 s on an AMD EPYC with AVX2.
# Source: torch/onnx/_internal/exporter/_registration.py, ONNXRegistry.from_torchlib.
# And each call asks the dispatcher some 55 times for all composite operators, once for each namespace, twice: an eighth of
# what is left (torch/_export/utils.py, _collect_all_valid_cia_ops_for_namespace).
# Whoever exports in a loop, or many times in a test suite, pays it each time.
#
# Output seen: export 0 read 548 functions and asked 55 times, exports 1 and 2 read 497 and asked 54 times.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0
"$place/venv/bin/pip" install --quiet numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnx-ir==1.1.0
cat > "$place/count.py" <<'PY'
import inspect
import torch

reads = 0
getsource = inspect.getsource


def count(function):
    global reads
    reads += 1
    return getsource(function)


questions = 0
registrations = torch._C._dispatch_get_registrations_for_dispatch_key


def ask(key):
    global questions
    questions += 1
    return registrations(key)


inspect.getsource = count
torch._C._dispatch_get_registrations_for_dispatch_key = ask
for call in range(3):
    reads = questions = 0
    torch.onnx.export(torch.nn.Linear(2, 2), (torch.ones(2, 2),), dynamo=True, verbose=False)
    print(f"export {call} read {reads} functions and asked {questions} times for the composite operators")
    assert reads > 100, "torch now keeps its table: this finding is out of date"
    assert questions > 10, "torch now asks once: this finding is out of date"
PY
"$place/venv/bin/python" "$place/count.py" 2>/dev/null
