"""The layers that a user names for float."""

import pytest

from compressor.errors import InputError
from compressor.quantization.selection import select_layers

LAYERS = ("stem", "blocks.0.conv1", "blocks.0.add", "blocks.1.conv1", "blocks.10.conv1", "head")


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ((), ()),
        (("head",), ("head",)),
        (("blocks.0",), ("blocks.0.conv1", "blocks.0.add")),
        (("blocks.1",), ("blocks.1.conv1",)),
        (("blocks.*.conv1",), ("blocks.0.conv1", "blocks.1.conv1", "blocks.10.conv1")),
        (("**.conv1",), ("blocks.0.conv1", "blocks.1.conv1", "blocks.10.conv1")),
        (("blocks.**",), LAYERS[1:5]),
        (("head", "st*"), ("stem", "head")),
    ],
)
def test_a_name_keeps_its_layer_and_all_below_it(patterns: tuple[str, ...], names: tuple[str, ...]) -> None:
    assert select_layers(LAYERS, patterns) == names


def test_a_name_of_no_layer_is_refused_with_the_closest_one() -> None:
    with pytest.raises(InputError, match=r"'blocks\.0\.conv2' names none; did you mean 'blocks\.0\.conv1'\?.*stem"):
        select_layers(LAYERS, ("head", "blocks.0.conv2"))
