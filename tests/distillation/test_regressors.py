import numpy as np
import pytest
import torch
from torch import nn

from compressor.distillation.regressors import regressor, resize
from compressor.errors import InputError
from compressor.models.layers import LayerOutput, capture_outputs, check_fires
from example_models import CifarResNet


def features(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def output(*shape: int, channel_dimension: int = 1, path: str = "layer") -> LayerOutput:
    return LayerOutput(path, "Layer", shape, 0, channel_dimension)


@pytest.mark.parametrize(
    ("student", "teacher", "channels"),
    [
        (output(2, 16), output(2, 64), nn.Linear),
        (output(2, 5, 16, channel_dimension=2), output(2, 5, 32, channel_dimension=2), nn.Linear),
        (output(2, 5, 16, channel_dimension=2), output(2, 9, 16, channel_dimension=2), nn.Identity),
        (output(2, 9, 16, channel_dimension=2), output(2, 5, 32, channel_dimension=2), nn.Linear),
        (output(2, 16, 20), output(2, 32, 7), nn.Conv1d),
        (output(2, 16, 20), output(2, 20, 32, channel_dimension=2), nn.Conv1d),
        (output(2, 9, 16, channel_dimension=2), output(2, 16, 5), nn.Identity),
        (output(2, 8, 7, 5), output(2, 32, 4, 9), nn.Conv2d),
        (output(2, 7, 5, 8, channel_dimension=3), output(2, 32, 4, 9), nn.Linear),
        (output(2, 8, 4, 4, 4), output(2, 16, 2, 4, 6), nn.Conv3d),
    ],
    ids=str,
)
def test_student_features_get_the_shape_of_the_teachers(student, teacher, channels):
    regress = regressor(student, teacher)
    assert type(regress.channels) is channels
    found = regress(features(*student.shape), features(*teacher.shape))
    assert found.shape == teacher.shape


@pytest.mark.parametrize("shape", [(2, 16), (2, 8, 7, 5)])
def test_features_of_equal_shape_stay_as_they_are(shape):
    regress = regressor(output(*shape), output(*shape))
    assert list(regress.parameters()) == []
    torch.testing.assert_close(regress(features(*shape), features(*shape)), features(*shape), rtol=0, atol=0)


def test_channels_are_mixed_alike_at_every_place():
    regress = regressor(output(2, 3, 4, 5), output(2, 6, 4, 5))
    found = regress(features(2, 3, 4, 5), features(2, 6, 4, 5))
    weight, bias = regress.channels.weight.detach().flatten(1).numpy(), regress.channels.bias.detach().numpy()
    wanted = np.einsum("oc,nchw->nohw", weight, features(2, 3, 4, 5).numpy()) + bias[:, None, None]
    torch.testing.assert_close(found.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)  # float32 sums of 3 products


def test_tokens_are_mixed_over_their_last_dimension():
    regress = regressor(output(2, 7, 3, channel_dimension=2), output(2, 7, 6, channel_dimension=2))
    found = regress(features(2, 7, 3), features(2, 7, 6))
    wanted = (
        features(2, 7, 3).numpy() @ regress.channels.weight.detach().numpy().T + regress.channels.bias.detach().numpy()
    )
    torch.testing.assert_close(found.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)  # float32 sums of 3 products


def interpolated(line: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation between the centres of cells, of the last dimension."""
    places = (np.arange(size) + 0.5) * line.shape[-1] / size - 0.5
    return np.apply_along_axis(lambda row: np.interp(places, np.arange(len(row)), row), -1, line)


def test_each_dimension_is_averaged_or_interpolated_by_itself():
    maps = features(2, 3, 8, 4)
    averaged = maps.numpy().astype(np.float64).reshape(2, 3, 4, 2, 4).mean(3)
    found = resize(maps, (4, 6)).double().numpy()
    torch.testing.assert_close(found, interpolated(averaged, 6), rtol=1e-5, atol=1e-6)  # float32 against float64


def test_tokens_are_interpolated_along_the_sequence():
    regress = regressor(output(2, 4, 3, channel_dimension=2), output(2, 9, 3, channel_dimension=2))
    tokens = features(2, 4, 3)
    wanted = interpolated(tokens.double().mT.numpy(), 9).swapaxes(1, 2)
    found = regress(tokens, features(2, 9, 3)).double().numpy()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # float32 against float64


def test_constant_features_stay_constant():
    ones = torch.ones(2, 3, 7, 5)
    torch.testing.assert_close(resize(ones, (4, 9)), torch.ones(2, 3, 4, 9), rtol=1e-6, atol=0)  # float32 rounding


def test_features_of_other_batches_and_image_sizes_fit_too():
    torch.manual_seed(0)
    student, teacher = CifarResNet(1).eval(), CifarResNet(2).eval()
    images = features(2, 3, 32, 32)
    (ours,), (theirs,) = check_fires(student, ["layer1"], (images,)), check_fires(teacher, ["layer3"], (images,))
    regress = regressor(ours, theirs)
    for shape in [(2, 3, 32, 32), (5, 3, 32, 32), (3, 3, 44, 28)]:
        images = features(*shape)
        with (
            capture_outputs(student, ["layer1"]) as student_outputs,
            capture_outputs(teacher, ["layer3"]) as teacher_outputs,
        ):
            student(images), teacher(images)
        wanted = teacher_outputs["layer3"].detach()
        found = regress(student_outputs["layer1"], wanted)
        assert found.shape == wanted.shape == (shape[0], 64, -(-shape[2] // 4), -(-shape[3] // 4))
    (found - wanted).square().mean().backward()
    assert student.conv1.weight.grad.abs().max() > 0
    assert regress.channels.weight.grad.abs().max() > 0


def test_weights_follow_from_the_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return regressor(output(2, 3, 4, 5), output(2, 6, 4, 5)).channels.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (output(2, 16, 8, 8, path="layer2"), output(2, 65, 192, channel_dimension=2, path="blocks.3")),
        (output(2, 16, path="layer2"), output(2, 64, 1, 1, path="blocks.3")),
        (output(2, path="layer2"), output(2, path="blocks.3")),
    ],
)
def test_outputs_of_other_ranks_are_refused_with_paths_and_shapes(student, teacher):
    with pytest.raises(InputError) as raised:
        regressor(student, teacher)
    for told in ("'layer2'", str(student.shape), "'blocks.3'", str(teacher.shape)):
        assert told in str(raised.value)
