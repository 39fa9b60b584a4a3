import getpass
import json
import os
import platform
import re
import socket
from importlib.metadata import version
from pathlib import Path

import pytest

from compressor.records.environment import environment


def test_the_facts_are_json_and_name_what_a_measurement_depends_on():
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cores"] == os.cpu_count()
    assert facts["python"] == platform.python_version()
    assert facts["versions"]["onnxruntime"] == version("onnxruntime")
    assert facts["versions"]["torch"] == version("torch")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="/proc/cpuinfo is Linux's")
def test_the_flags_are_those_of_the_processor():
    words = set(Path("/proc/cpuinfo").read_text().split())
    asked = {"avx2", "avx512_vnni", "avx_vnni", "asimddp"}
    facts = environment()
    assert asked & words == asked & set(facts["cpu_flags"])
    assert 0 <= facts["steal_share"] <= 1


def test_the_facts_name_no_user_host_or_path():
    text = json.dumps(environment())
    for private in (getpass.getuser(), socket.gethostname(), str(Path.home()), str(Path.cwd())):
        assert not re.search(rf"(?<![\w.]){re.escape(private)}(?![\w.])", text)
