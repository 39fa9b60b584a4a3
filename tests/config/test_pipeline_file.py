import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from example_pipeline import PIPELINE, changed, problems, with_stages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compressor.config.pipeline_file import Pipeline, load
from compressor.errors import ConfigError


def test_a_pipeline_is_loaded_with_its_defaults(directory: Path):
    pipeline = load(directory / "p.yaml")

    assert isinstance(pipeline, Pipeline)
    assert [planned.name for planned in pipeline.stages] == ["train", "distill", "prune", "quantize", "export"]
    assert [type(planned.stage).__name__ for planned in pipeline.stages] == [
        "Train",
        "Distill",
        "Prune",
        "Quantize",
        "Export",
    ]
    assert pipeline.seed == 0
    assert pipeline.stages[2].stage.pruning_ratio == 0.5
    assert pipeline.gate is not None
    assert pipeline.gate.size_ratio.min == 10
    assert pipeline.directory == directory


def test_the_settings_hold_every_default_and_no_path_of_the_machine(directory: Path):
    pipeline = load(directory / "p.yaml", ["seed=3"])

    assert pipeline.overrides == ("seed=3",)
    assert json.loads(json.dumps(pipeline.settings)) == {
        "name": "digits",
        "seed": 3,
        "model": {"factory": "digits:teacher"},
        "task": {"factory": "digits:task", "data_dir": "data"},
        "stages": [
            {"stage": "train", "epochs": 20},
            {"stage": "distill", "student": {"factory": "digits:student", "weights_file": "student.pt"}},
            {
                "stage": "prune",
                "pruning_ratio": 0.5,
                "recovery": {"epochs": 10, "losses": {}, "sizes": [8, 8]},
                "round_to": 8,
                "protect": [],
            },
            {"stage": "quantize", "target": "portable"},
            {"stage": "export"},
        ],
        "gate": {"size_ratio": {"min": 10.0}, "accuracy_drop": {"max": 0.01}},
    }


def test_equal_pipelines_in_different_directories_have_equal_settings(directory: Path, tmp_path: Path):
    here = load(directory / "p.yaml").settings
    (tmp_path / "moved").mkdir()
    for name in ("p.yaml", "digits.py", "data", "student.pt"):
        (directory / name).rename(tmp_path / "moved" / name)

    assert load(tmp_path / "moved/p.yaml").settings == here


def test_settings_name_a_link_and_not_where_it_leads(directory: Path, tmp_path: Path):
    (tmp_path / "volume/data").mkdir(parents=True)
    (tmp_path / "volume/beside").mkdir()
    (directory / "linked").symlink_to(tmp_path / "volume/data")

    linked, behind = (
        load(directory / "p.yaml", [f"task.data_dir={directory}/{path}"]) for path in ("linked", "linked/../beside")
    )
    assert linked.settings["task"]["data_dir"] == "linked"
    assert behind.task.arguments["data_dir"] == tmp_path / "volume/beside"


def test_paths_start_at_the_file_and_those_of_set_at_the_current_directory(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "elsewhere/data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert load(directory / "p.yaml").task.arguments == {"data_dir": directory / "data"}
    assert load(directory / "p.yaml", ["task.data_dir=data"]).task.arguments == {
        "data_dir": tmp_path / "elsewhere/data"
    }
    assert load(Path(os.path.relpath(directory / "p.yaml"))).task.arguments == {"data_dir": directory / "data"}


def test_the_users_model_and_task_are_not_imported(directory: Path):
    load(directory / "p.yaml")

    assert "digits" not in sys.modules


def test_all_problems_are_told_at_once_in_the_order_of_the_file(directory: Path):
    text = """\
name: dig/its
sed: 1
seed: "1"
model: {factory: digits:techer}
task: {factory: digits:task, data_dri: data}
stages:
  - stage: prune
    pruning_ratio: 1.5
    recovery: {epoch: 10, losses: {kd: {temprature: 2}}, sizes: [1, 2, 3]}
  - stage: train
    epochs: 20.0
  - stage: prun
  - {}
  - stage: [prune]
  - prune
  - stage: quantize
    target: portabel
gate: {size_ration: {min: 10}, accuracy_drop: {max: .nan}}
seed: 2
"""

    assert problems(directory, text) == [
        "1:7: name must be up to 100 letters, digits, '.', '_' and '-', the first a letter or digit, got 'dig/its'",
        "2:1: unknown key 'sed'; did you mean 'seed'?",
        "3:7: seed must be an integer, got '1'",
        f"4:18: {directory / 'digits.py'} has no 'techer'; did you mean 'teacher'?",
        "5:30: digits:task (digits.py:4) has no argument 'data_dri'; did you mean 'data_dir'?",
        "8:20: stages.0.pruning_ratio must be less than 1, got 1.5",
        "9:16: unknown key 'epoch' in stages.0.recovery; did you mean 'epochs'?",
        "9:41: unknown key 'temprature' in stages.0.recovery.losses.kd; did you mean 'temperature'?",
        "9:65: stages.0.recovery.sizes must have at most 2 items, got [1, 2, 3]",
        "11:13: stages.1.epochs must be an integer, got 20.0",
        "12:12: unknown stage 'prun'; did you mean 'prune'?",
        "13:5: stages.3 needs the key 'stage'",
        "14:12: stages.4.stage must be text, got ['prune']",
        "15:5: stages.5 must be a mapping, got 'prune'",
        "17:13: stages.6.target must be 'portable' or 'x86-vnni', got 'portabel'; did you mean 'portable'?",
        "18:8: unknown key 'size_ration' in gate; did you mean 'size_ratio'?",
        "18:53: a number must be finite, got .nan",
        "19:1: duplicate key 'seed', first given on line 3",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- name: digits\n", ["1:1: the file must be a mapping, got [{'name': 'digits'}]"]),
        ("", ["1:1: must hold a value, got nothing"]),
        (changed("name: digits\n", ""), ["1:1: the file needs the key 'name'"]),
        (changed("epochs: 20", "epochs: 0"), ["6:13: stages.0.epochs must be greater than 0, got 0"]),
        (changed("    epochs: 20\n", ""), ["5:5: stages.0 needs the key 'epochs'"]),
        (changed("{epochs: 10}", "10"), ["11:15: stages.2.recovery must be a mapping, got 10"]),
        (
            changed("{epochs: 10}", "{epochs: 101}"),
            ["11:15: stages.2.recovery: recovery must be shorter than 100 epochs, got 101"],
        ),
        (
            changed("{epochs: 10}", "{epochs: 10}\n    round_to: all"),
            ["12:15: stages.2.round_to must be an integer or must be 'target', got 'all'"],
        ),
        (
            changed("pruning_ratio: 0.5", "pruning_ratio: 0.5\n    protect: [stem, 3]"),
            ["11:21: stages.2.protect.1 must be text, got 3"],
        ),
        (
            changed("pruning_ratio: 0.5", "pruning_ratio: 0.5\n    protect: 3"),
            ["11:14: stages.2.protect must be 'none' or must be a list, got 3"],
        ),
        (changed("{size_ratio: {min: 10}, accuracy_drop: {max: 0.01}}", "{}"), ["14:7: gate: a gate must have "]),
        (changed("data_dir: data", "data_dir: 3"), ["3:40: task.data_dir must be a path, got 3"]),
        (
            changed("digits:teacher}", "digits}"),
            ["2:18: model.factory must be module:attribute, such as digits:teacher, got 'digits'"],
        ),
        (changed("digits:teacher}", "digit:teacher}"), ["2:18: there is no module 'digit' in "]),
        (
            changed("{factory: digits:teacher}", "digits:teacher"),
            ["2:8: model must be a mapping, got 'digits:teacher'"],
        ),
        (
            changed(", data_dir: data", ""),
            ["3:17: digits:task (digits.py:4) needs the argument 'data_dir'; give it beside `factory` or with --set "],
        ),
        (with_stages(), ["4:1: stages must be a list, got None"]),
        (with_stages().replace("stages:", "stages: []"), ["4:9: stages must have at least 1 item, got []"]),
    ],
)
def test_a_fault_is_told_with_its_line_and_column(directory: Path, text: str, told: list[str]):
    found = problems(directory, text)

    assert [one.startswith(start) for one, start in zip(found, told, strict=True)] == [True] * len(told), found


def test_a_missing_path_is_told_with_where_it_was_looked_for(directory: Path):
    (directory / "student.pt").unlink()
    (directory / "student.pt").mkdir()
    (directory / "data").rmdir()

    assert problems(directory, PIPELINE) == [
        f"3:40: task.data_dir must exist, but {directory / 'data'} does not: No such file or directory"
        "; another can be given with --set task.data_dir=…",
        f"8:54: stages.1.student.weights_file must exist, but {directory / 'student.pt'} is no file"
        "; another can be given with --set stages.1.student.weights_file=…",
    ]


def test_a_path_that_the_machine_cannot_look_up_is_told(directory: Path):
    (told,) = problems(directory, changed("data_dir: data", f"data_dir: {'x' * 5000}"))

    assert "does not: File name too long" in told


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory, not a file"):
        load(tmp_path)


def test_a_stage_named_in_vain_imports_no_torch(directory: Path):
    (directory / "p.yaml").write_text(with_stages("stage: no_such_stage"))
    code = f"""\
        import sys
        from pathlib import Path
        from compressor.config.pipeline_file import load
        from compressor.errors import ConfigError
        try:
            load(Path({str(directory / "p.yaml")!r}))
        except ConfigError:
            sys.exit("torch" in sys.modules)
    """

    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_loading_takes_less_than_50_ms_once_the_stages_are_imported(directory: Path):
    seconds = []
    for _ in range(5):
        start = time.process_time()
        load(directory / "p.yaml")
        seconds.append(time.process_time() - start)

    assert min(seconds[1:]) < 0.05


FRAGMENTS = ["", " ", "\n", "\n  - ", ":", "-", "{", "}", "[", "]", ",", "'", '"', "#", "&a ", "*a", "!x ", "%", "|\n"]
WORDS = ["1", "-1", "1e999", ".nan", "null", "true", "99999999999999999999", "stage: prune", "epochs: 3", "a.b:c", "é"]
CONTROL = [
    "\t",
    "\0",
    "\ud800",
    "\\",
    "---\n",
    "...\n",
    "? ",
    "<<: *a",
    "<<<<<<< x\n",
    "factory: ",
    "x_dir: .",
    "[" * 50,
]


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # every example writes the file anew
)
@given(
    st.lists(
        st.tuples(st.integers(0, len(PIPELINE)), st.integers(0, 12), st.sampled_from([*FRAGMENTS, *WORDS, *CONTROL])),
        min_size=1,
        max_size=4,
    )
)
def test_a_file_mutated_at_random_gives_a_pipeline_or_a_config_error(
    directory: Path, edits: list[tuple[int, int, str]]
):
    text = PIPELINE
    for position, length, new in edits:
        text = text[:position] + new + text[position + length :]
    (directory / "p.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))

    try:
        loaded = json.dumps(load(directory / "p.yaml").settings, allow_nan=False)
    except ConfigError as error:
        loaded = str(error)

    assert loaded
