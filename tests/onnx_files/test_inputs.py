"""Arrays for what ONNX files take: made up, or read from an .npz that is not trusted."""

import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from compressor.errors import InputError
from compressor.onnx_files.inputs import Input, arrange, random_inputs, read_inputs
from example_onnx import convolutions, save


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Tokens of 64 bits and a mask of floats, both (batch, length)."""
    return save(
        tmp_path / "text.onnx",
        [helper.make_node("Cast", ["tokens"], ["f"], to=TensorProto.FLOAT), helper.make_node("Add", ["f", "x"], ["y"])],
        [],
        {"tokens": (TensorProto.INT64, ("batch", "length")), "x": (TensorProto.FLOAT, ("batch", "length"))},
    )


def test_made_up_inputs_fit_the_model_and_are_repeatable(text):
    found = random_inputs(text, batch_size=3, sizes={"length": 7}, seed=1)
    tokens, x = found["tokens"], found["x"]
    assert (tokens.dtype, tokens.shape) == (np.int64, (3, 7))
    assert set(np.unique(tokens)) <= {0, 1}
    assert (x.dtype, x.shape) == (np.float32, (3, 7))
    again = random_inputs(text, batch_size=3, sizes={"length": 7}, seed=1)
    assert all(np.array_equal(found[name], again[name]) for name in ("tokens", "x"))
    assert not np.array_equal(x, random_inputs(text, batch_size=3, sizes={"length": 7}, seed=2)["x"])


def test_inputs_of_unknown_length_must_be_given(text):
    with pytest.raises(
        InputError, match=r"'tokens' .*text\.onnx must have known sizes .*'length'.*--dimension.*--inputs"
    ):
        random_inputs(text)


@pytest.mark.parametrize(
    ("name", "message"), [("lenght", "did you mean 'length'"), ("batch", r"'length'\), got 'batch'")]
)
def test_a_size_must_be_that_of_a_dimension_after_the_batch(text, name, message):
    with pytest.raises(InputError, match=message):
        random_inputs(text, sizes={"length": 7, name: 7})


def recurrent(path: Path, **inputs: tuple[int | str | None, ...]) -> Path:
    nodes = [helper.make_node("Identity", [next(iter(inputs))], ["y"])]
    return save(path, nodes, [], {name: (TensorProto.FLOAT, sizes) for name, sizes in inputs.items()})


def test_batch_is_the_dimension_that_is_called_so_or_that_all_inputs_share(tmp_path):
    states = {"x": ("time", "N", 4), "h": (2, "N", 8)}
    for number, (inputs, wanted) in enumerate(
        [
            ({"x": ("time", "batch", 4)}, [(7, 3, 4)]),
            ({"x": ("N", "time", 4), "h": (2, "N", 8)}, [(3, 7, 4), (2, 3, 8)]),
            (states, [(7, 3, 4), (2, 3, 8)]),
            ({"x": ("samples", "time", 4)}, [(3, 7, 4)]),
            ({"x": (None, "time", 4)}, [(3, 7, 4)]),
        ]
    ):
        path = recurrent(tmp_path / f"{number}.onnx", **inputs)
        found = random_inputs(path, batch_size=3, sizes={"time": 7})
        assert [array.shape for array in found.values()] == wanted
    with pytest.raises(InputError, match=r"beside the batch .*'time'\), got 'N'"):
        random_inputs(recurrent(tmp_path / "states.onnx", **states), sizes={"N": 3})


def test_dimension_without_a_name_is_not_asked_for_by_name(tmp_path):
    with pytest.raises(InputError, match=r"known sizes beside the batch, .*; give example inputs \(--inputs\)$"):
        random_inputs(recurrent(tmp_path / "m.onnx", x=("batch", None, 4)))


def test_a_fixed_batch_size_must_be_the_one_asked_for(tmp_path):
    path = convolutions(tmp_path / "m.onnx", (4, 3), shape=(8, 1, 28, 28))
    with pytest.raises(InputError, match="batch of 1"):
        random_inputs(path)
    assert random_inputs(path, batch_size=8)["t0"].shape == (8, 1, 28, 28)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint32, np.uint64, np.float16, np.float64])
def test_made_up_inputs_have_the_type_that_the_model_takes(tmp_path, dtype):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    path = save(tmp_path / "m.onnx", [helper.make_node("Identity", ["x"], ["y"])], [], {"x": (kind, ("n", 4))}, kind)
    assert random_inputs(path)["x"].dtype == dtype


def test_what_is_no_tensor_of_numbers_cannot_be_made_up(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"])
    path = save(tmp_path / "m.onnx", [node], [], {"x": (TensorProto.STRING, (1,))}, TensorProto.STRING)
    with pytest.raises(InputError, match=r"m\.onnx must be tensors of numbers that NumPy has, got 'tensor\(string\)'"):
        random_inputs(path)


ARRAYS = {"tokens": np.arange(6).reshape(2, 3), "x": np.ones((2, 3), np.float32)}


def test_given_inputs_are_those_of_the_file(text, tmp_path):
    # columns first, as a transposed array is: ONNX Runtime would copy it at each call
    np.savez(tmp_path / "in.npz", x=np.asfortranarray(ARRAYS["x"]), tokens=ARRAYS["tokens"])
    found = read_inputs(tmp_path / "in.npz", text)
    assert list(found) == ["tokens", "x"]
    for name, array in found.items():
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.dtype == ARRAYS[name].dtype


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"mask": ARRAYS["x"]},
            r"each input of .*text\.onnx, 'tokens', 'x', and no other; missing: .*unexpected: .'mask'",
        ),
        ({"x": np.ones((2, 3))}, r"'x' in .*in\.npz must be float32 .*, got float64 \(2, 3\)"),
        ({"x": np.ones((2, 3), ">f4")}, "'x' .* must be float32"),
        ({"x": np.ones(2, np.float32)}, r"'x' .*, got float32 \(2,\)"),
        ({"x": np.ones((0, 3), np.float32)}, "at least one sample"),
        ({"x": np.array([{}], dtype=object)}, "must be an .npz of plain arrays"),
    ],
    ids=["name", "type", "byte order", "rank", "empty", "object"],
)
def test_given_inputs_that_do_not_fit_are_refused(text, tmp_path, changed, message):
    np.savez(tmp_path / "in.npz", **ARRAYS | changed)
    with pytest.raises(InputError, match=message):
        read_inputs(tmp_path / "in.npz", text)


def test_a_missing_array_is_named(text, tmp_path):
    np.savez(tmp_path / "in.npz", tokens=ARRAYS["tokens"])
    with pytest.raises(InputError, match=r"missing: .'x'., unexpected: \[\]"):
        read_inputs(tmp_path / "in.npz", text)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_what_is_no_npz_is_refused_and_nothing_is_unpickled(text, tmp_path):
    np.save(tmp_path / "single.npy", ARRAYS["x"])
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    np.savez(tmp_path / "objects.npz", tokens=ARRAYS["tokens"], x=np.array([Trap(tmp_path / "sprung")], dtype=object))
    (tmp_path / "empty.npz").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("single.npy", "pickle.npz", "objects.npz", "empty.npz", "missing.npz", "pipe.npz", "text.onnx", "."):
        with pytest.raises(InputError, match=r"must be an \.npz of plain arrays"):
            read_inputs(tmp_path / name, text)
    assert not (tmp_path / "sprung").exists()


def header(descr: str = "'<f4'", shape: str = "(2, 3)", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def written_npz(file: Path, header: str, content: bytes, version: int = 1) -> Path:
    """An .npz whose x has this header and content."""
    tokens, start = io.BytesIO(), b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2, "little")
    np.save(tokens, ARRAYS["tokens"])
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", tokens.getvalue())
        archive.writestr("x.npy", start + header.encode() + content)
    return file


@pytest.mark.parametrize(
    "changed",
    [
        "{'descr': (",
        "{[]:1}",
        "{1: 2, 'a': 3}",
        "(" * 3000,
        "-" * 9000 + "1",
        "\0",
        header(descr="[('a','<f4',1,2,3)]"),
        header(descr="('<f4', -1)"),
        header(descr="'|O'"),
        header(descr="'<f3'"),
        header(shape="(True, 3)"),
        header(shape="(-2, 3)"),
        header(shape=f"({'9' * 5000},)"),
        header(order="1"),
    ],
    ids=lambda text: text.strip()[:60],
)
def test_header_that_is_not_of_an_array_of_numbers_is_refused(text, tmp_path, changed):
    with pytest.raises(InputError, match=r"must be an \.npz of plain arrays, .*no array of numbers"):
        read_inputs(written_npz(tmp_path / "in.npz", changed, bytes(24)), text)


def test_header_of_another_version_is_refused(text, tmp_path):
    with pytest.raises(InputError, match=r"in version 1\.0 of NumPy's format"):
        read_inputs(written_npz(tmp_path / "in.npz", header(), bytes(24), version=9), text)


@pytest.mark.parametrize(
    ("shape", "content", "message"),
    [
        ("(1125899906842624, 1024)", bytes(24), "must be 4,611,686,018,427,387,904 bytes of numbers, got 24"),
        ("(2, 3)", bytes(20), "must be 24 bytes of numbers, got 20"),
        ("(2, 3)", bytes(3 << 20), "must be 24 bytes of numbers, got more"),
    ],
    ids=["more than any memory", "less", "more"],
)
def test_array_that_is_not_as_large_as_its_header_says_is_the_fault_of_the_file(
    text, tmp_path, shape, content, message
):
    with pytest.raises(InputError, match=f"'x' in .*{message}"):
        read_inputs(written_npz(tmp_path / "in.npz", header(shape=shape), content), text)


def test_no_array_is_read_unless_names_types_and_shapes_are_right(text, tmp_path):
    # a member that is damaged would be refused for that, if it were read
    file = written_npz(tmp_path / "in.npz", header(descr="'<f8'"), random.Random(0).randbytes(100_000))
    content = bytearray(file.read_bytes())
    content[50_000] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"'x' in .* must be float32 .*, got float64"):
        read_inputs(file, text)


def test_damaged_npz_gives_arrays_or_an_input_error_and_nothing_else(text, tmp_path):
    file, choices = tmp_path / "in.npz", random.Random(0)
    np.savez_compressed(file, **ARRAYS)
    content, refused = file.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(choices.choice([1, 3])):
            damaged[choices.randrange(len(content))] ^= choices.randrange(1, 256)
        file.write_bytes(bytes(damaged))
        try:
            read_inputs(file, text)
        except InputError:
            refused += 1
    assert refused > 100


def test_sizes_beyond_any_memory_are_refused(text):
    with pytest.raises(InputError, match=r"input .* must have sizes that an array can have, got "):
        random_inputs(text, batch_size=2**62, sizes={"length": 2**62})


def test_inputs_go_by_name_where_a_file_has_the_same_names():
    named = {"a": ARRAYS["x"], "b": ARRAYS["tokens"]}
    x, tokens = (np.dtype(np.float32), ("n", 7)), (np.dtype(np.int64), ("n", 7))
    assert [array.dtype for array in arrange(named, [Input("b", *tokens), Input("a", *x)])] == [np.int64, np.float32]
    other = [Input("input", *x), Input("mask", *tokens)]
    assert [array.dtype for array in arrange(named, other)] == [np.float32, np.int64]
    assert list(map(id, arrange(named, other[:1]))) == [id(array) for array in named.values()]
