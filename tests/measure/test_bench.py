"""`bench` on real ONNX files, and the command as a process."""

import gzip
import logging
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import InputError
from compressor.measure.bench import bench, distinct_names
from compressor.records.benchmark import Benchmark
from example_onnx import convolutions, graph_model, linear_model, save, save_external
from processes import run_python

PROBE = """
import atexit, sys
from compressor.cli.main import main
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
main()
"""


def compress_bench(*arguments: object) -> subprocess.CompletedProcess:
    return run_python("-c", PROBE, "bench", "--max-seconds", "0", *map(str, arguments), torch=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return convolutions(tmp_path_factory.mktemp("small") / "small.onnx", (4, 3))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return convolutions(tmp_path_factory.mktemp("large") / "large.onnx", (16, 3), (16, 3))


def test_files_are_compared_with_the_first_at_each_batch_size_and_number_of_threads(large, small):
    found = bench([large, small], batch_sizes=(1, 4), thread_counts=(1, 2), max_seconds=0)
    baseline, candidate = found.candidates
    assert (baseline.name, candidate.name) == ("large.onnx", "small.onnx")
    content = small.read_bytes()
    assert candidate.size_bytes == len(content)
    assert candidate.transfer_bytes == len(gzip.compress(content, compresslevel=9, mtime=0))
    assert (candidate.parameters, candidate.macs) == (4 * 9, 28 * 28 * 4 * 9)
    assert baseline.macs == 28 * 28 * (16 * 9 + 16 * 16 * 9)
    settings = [(timing.session.batch_size, timing.session.threads) for timing in found.timings]
    assert settings == [(1, 1), (1, 2), (4, 1), (4, 2)]
    for timing in found.timings:
        assert timing.inputs == {"t0": f"float32 ({timing.session.batch_size}, 1, 28, 28)"}
        first, second = timing.latencies
        assert first.ratio == 1.0
        assert second.ratio_low > 1  # 60 times fewer products
        assert second.p50_ms < first.p50_ms
        assert timing.session.noise.ratio == pytest.approx(1, abs=0.5)


def test_one_file_is_timed_against_itself(small):
    found = bench([small], max_seconds=0)
    assert len(found.candidates) == len(found.timings[0].latencies) == 1
    assert found.timings[0].session.noise.p50_ms > 0


def test_external_data_is_part_of_a_file(tmp_path):
    path = save_external(tmp_path, np.ones((64, 64), np.float32))
    (candidate,) = bench([path], max_seconds=0).candidates
    assert candidate.size_bytes == path.stat().st_size + 64 * 64 * 4


def test_a_file_in_half_precision_is_compared_with_the_float_one_and_counted(tmp_path):
    files = [
        save(
            tmp_path / f"{dtype.__name__}.onnx",
            [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])],
            [numpy_helper.from_array(np.ones((8, 4), dtype=dtype), "w")],
            {"x": (helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ("n", 8))},
            helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
        )
        for dtype in (np.float32, np.float16)
    ]
    found = bench(files, max_seconds=0)
    assert [candidate.macs for candidate in found.candidates] == [32, 32]
    assert len(found.timings[0].latencies) == 2


def test_what_cannot_be_counted_is_unknown_and_says_why(tmp_path):
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    nodes = [helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")]
    path = save(tmp_path / "m.onnx", nodes, [weight], {"x": (TensorProto.FLOAT, ("n", 4))})
    (candidate,) = bench([path], max_seconds=0).candidates
    assert (candidate.parameters, candidate.macs) == (16, None)
    assert "the products of the node that gives 'y' (com.microsoft.FusedMatMul) are not known" in candidate.uncounted


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.INT4, TensorProto.FLOAT8E5M2])
def test_output_of_a_type_that_numpy_lacks_is_named_with_its_file(tmp_path, kind):
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=kind)]
    path = save(tmp_path / "m.onnx", nodes, [], {"x": (TensorProto.FLOAT, ("n", 4))}, kind)
    name = TensorProto.DataType.Name(kind).lower()
    with pytest.raises(
        InputError, match=rf"m\.onnx must give outputs of types that NumPy has, got 'y' tensor\({name}\)"
    ):
        bench([path], max_seconds=0)


def test_file_that_takes_another_batch_is_named_before_anything_is_timed(large, tmp_path, caplog):
    fixed = convolutions(tmp_path / "fixed.onnx", (4, 3), shape=(1, 1, 28, 28))
    with caplog.at_level(logging.INFO), pytest.raises(InputError, match=r"fixed\.onnx must take .* float32 \(8, 1, 28"):
        bench([large, fixed], batch_sizes=(1, 8), max_seconds=0)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(InputError, match=r"'t0' of .*fixed\.onnx must take a batch of 8"),
    ):
        bench([fixed, large], batch_sizes=(1, 8), max_seconds=0)
    assert "timing" not in caplog.text


def test_sizes_of_dynamic_dimensions_are_taken_by_name(tmp_path):
    path = convolutions(tmp_path / "m.onnx", (4, 3), shape=("batch", 1, "height", "width"))
    found = bench([path], sizes={"height": 5, "width": 7}, max_seconds=0)
    assert found.timings[0].inputs == {"t0": "float32 (1, 1, 5, 7)"}
    assert found.candidates[0].macs == 5 * 7 * 4 * 9


def gather(path: Path, *order: str) -> Path:
    """A file that stops unless `rows` are below 4, and `number` may be anything."""
    nodes = [
        helper.make_node("Gather", ["table", "rows"], ["taken"]),
        helper.make_node("Mul", ["taken", "number"], ["y"]),
    ]
    table = numpy_helper.from_array(np.arange(4), "table")
    return save(path, nodes, [table], {name: (TensorProto.INT64, ("n", 2)) for name in order}, TensorProto.INT64)


def test_given_inputs_reach_each_file_by_name(tmp_path):
    files = [gather(tmp_path / "a.onnx", "rows", "number"), gather(tmp_path / "b.onnx", "number", "rows")]
    np.savez(tmp_path / "in.npz", rows=np.full((3, 2), 3), number=np.full((3, 2), 1000))
    found = bench(files, inputs_file=tmp_path / "in.npz", max_seconds=0)
    assert found.timings[0].session.batch_size == 3
    assert [one.uncounted for one in found.candidates] == [None, None]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("a.onnx", "b.onnx"), ("a.onnx", "b.onnx")),
        (("x/m.onnx", "y/m.onnx", "c.onnx"), ("x/m.onnx", "y/m.onnx", "c.onnx")),
        (("/p/x/m.onnx", "/q/x/m.onnx", "/q/y/m.onnx"), ("p/x/m.onnx", "q/x/m.onnx", "y/m.onnx")),
        (("m.onnx", "x/m.onnx"), ("m.onnx", "x/m.onnx")),
        (("x/m.onnx", "x/m.onnx", "c.onnx"), ("m.onnx (1)", "m.onnx (2)", "c.onnx")),
        (("a\x1b[31m.onnx", "a\x1c[31m.onnx"), ("a?[31m.onnx (1)", "a?[31m.onnx (2)")),
        (("a\udcff.onnx",), ("a?.onnx",)),
        (("a.onnx", "a.onnx", "a.onnx (1)"), ("a.onnx (1)", "a.onnx (2)", "a.onnx (1) (3)")),
    ],
)
def test_names_are_short_printable_and_different(paths, names):
    assert distinct_names([Path(path) for path in paths]) == names


def linked(directory: Path) -> Path:
    """A file whose external data is a hard link, which ONNX Runtime would follow."""
    path = save_external(directory, np.ones((4, 4), np.float32))
    (directory / "secret").hardlink_to(directory / "model.onnx.data")
    return path


def foreign(directory: Path) -> Path:
    model = graph_model(helper.make_node("Evil", ["x"], ["y"], domain="evil"), weights={}, shape=("n", 4))
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    return directory / "model.onnx"


def truncated(directory: Path) -> Path:
    (directory / "model.onnx").write_bytes(linear_model(np.ones((4, 4), np.float32)).SerializeToString()[:-20])
    return directory / "model.onnx"


@pytest.mark.parametrize("make", [linked, foreign, truncated], ids=["hard link", "domain", "truncated"])
def test_file_that_is_not_safe_is_refused_by_name_before_any_is_opened(tmp_path, make):
    (tmp_path / "unreadable.onnx").write_bytes(linear_model(np.ones((3, 4), np.float32)).SerializeToString())
    with pytest.raises(InputError, match=r"model\.onnx must be an ONNX model that is safe to read"):
        bench([tmp_path / "unreadable.onnx", make(tmp_path)], max_seconds=0)


def test_command_prints_json_that_reads_back_and_needs_no_torch(large, small):
    finished = compress_bench(small, "--baseline", large, large, "--batch-size", 2, "--batch-size", 2, "--json")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.splitlines()[-1] == "False"
    found = Benchmark.model_validate_json(finished.stdout)
    assert [one.name for one in found.candidates] == ["large.onnx", "small.onnx"]
    assert [timing.session.batch_size for timing in found.timings] == [2]
    assert found.environment["versions"]["onnxruntime"]
    assert Benchmark.model_validate_json(found.model_dump_json()) == found


def test_baseline_that_is_given_as_a_file_twice_is_timed_twice(large, small):
    finished = compress_bench(large, small, large, "--baseline", large, "--json")
    assert finished.returncode == 0, finished.stderr
    names = [one.name for one in Benchmark.model_validate_json(finished.stdout).candidates]
    assert names == ["large.onnx (1)", "small.onnx", "large.onnx (3)"]


def test_command_prints_tables_or_markdown(small):
    finished = compress_bench(small, small)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[0].split()[:2] == ["file", "size"]
    assert "small.onnx (2)" in finished.stdout
    assert "x smaller" not in finished.stdout
    assert compress_bench(small, "--markdown").stdout.startswith("# Benchmark\n\n| file | size |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "--markdown"], "choose one"),
        (["--inputs", "in.npz", "--batch-size", "2"], "leave out --batch-size"),
        (["--dimension", "height"], "must be NAME=SIZE, SIZE of at most 18 digits, got 'height'"),
        (["--dimension", "height=" + "9" * 5000], "SIZE of at most 18 digits, got 'height=99"),
        (["--batch-size", "0"], "x>=1"),
        (["--threads", "3000000000"], "1<=x<=1024"),
        (["--max-seconds", "nan"], "must be a finite number, got nan"),
        (["--max-seconds", "inf"], "must be a finite number, got inf"),
    ],
)
def test_options_that_contradict_exit_2(small, arguments, message):
    finished = compress_bench(small, *arguments)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


def test_errors_quote_no_control_characters_of_a_file(tmp_path, small):
    node = helper.make_node("Nope", ["x"], ["y"], name="\x1b[31mred")
    path = tmp_path / "a\x1b[31m.onnx"
    onnx.save(graph_model(node, weights={}, shape=("n", 4)), path)
    finished = compress_bench(small, path)
    assert finished.returncode == 5
    assert "a?[31m.onnx must be a model that ONNX Runtime can run" in finished.stderr
    assert "\x1b" not in finished.stderr
