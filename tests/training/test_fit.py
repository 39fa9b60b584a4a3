import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compressor import Augmentation, Samples, StageContext, TorchModel
from compressor.errors import InputError, StageError
from compressor.references.reference import Reference
from compressor.task import cross_entropy, uniform_numbers
from compressor.training.fit import fit
from compressor.training.objective import LabelLoss
from compressor.training.sampling import TrainingData
from compressor.training.settings import Optimizer, TrainingSettings, learning_rate
from processes import run_python, run_two

CPU = torch.device("cpu")
DIVERGING = Optimizer(name="sgd", learning_rate=1e10, schedule="constant", warmup=0.0)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def fit_briefly(
    module,
    split,
    augmentation=None,
    *,
    seed=0,
    log=lambda _line: None,
    record=lambda _means: None,
    zeros=(),
    first_epoch=0,
    **changes,
):
    settings = TrainingSettings(
        **{"epochs": 2, "batch_size": 64, "optimizer": Optimizer(learning_rate=1e-2), **changes}
    )
    model = TorchModel(module, Reference(factory="networks:PlainNetwork"))
    context = StageContext(model, CPU, seed, Path(), log, lambda told: record(told.means))
    data = TrainingData(split, augmentation=augmentation, first_epoch=first_epoch)
    return fit(module, LabelLoss(cross_entropy), data, settings, context, zeros=zeros)


def parameters(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_fit_leaves_the_given_module_as_it_was(digits_task):
    module = small_network()
    before = parameters(module).clone()
    trained = fit_briefly(module, digits_task.train)
    assert torch.equal(parameters(module), before)
    assert not torch.equal(parameters(trained), before)
    assert not trained.training


def test_same_seed_gives_the_same_weights_and_another_seed_others(digits_task):
    first, again, other = (fit_briefly(small_network(), digits_task.train, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(parameters(first), parameters(again))
    assert not torch.equal(parameters(first), parameters(other))


def test_fit_does_not_touch_the_global_generator(digits_task):
    module = small_network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit_briefly(module, digits_task.train, epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_fit_equals_a_loop_written_by_hand(digits_task):
    optimizer = Optimizer(name="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0, schedule="linear", warmup=0.0)
    trained = fit_briefly(small_network(), digits_task.train, epochs=1, batch_size=100, optimizer=optimizer)
    module = small_network()
    order = torch.randperm(len(digits_task.train), generator=torch.Generator().manual_seed(0))
    steps = len(order) // 100
    for step in range(steps):
        images, targets = digits_task.train.__getitems__(order[100 * step : 100 * step + 100].tolist())
        module.zero_grad()
        cross_entropy(module(*images), targets).mean().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.sub_(parameter.grad, alpha=0.1 * (1 - step / steps))
    torch.testing.assert_close(parameters(trained), parameters(module), rtol=0, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_grows_to_its_peak_and_follows_the_schedule(schedule):
    optimizer = Optimizer(learning_rate=2.0, schedule=schedule, warmup=0.1)
    rates = [learning_rate(optimizer, step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == max(rates) == 2.0
    halfway = {"cosine": 1.0, "linear": 1.0, "constant": 2.0}[schedule]
    assert rates[55] == pytest.approx(halfway)
    end = {"cosine": 1 - math.cos(math.pi / 90), "linear": 2 / 90, "constant": 2.0}[schedule]
    assert rates[99] == pytest.approx(end, rel=1e-6)


def test_not_finite_loss_stops_with_step_and_learning_rate(digits_task):
    with pytest.raises(StageError, match=r"step \d+/\d+, learning rate 1e\+10"):
        fit_briefly(small_network(), digits_task.train, optimizer=DIVERGING)


def test_weights_that_the_last_step_made_infinite_are_refused(digits_task):
    few = Samples((digits_task.train.inputs[0][:64],), digits_task.train.targets[:64])
    endless = Optimizer(name="sgd", learning_rate=1e38, weight_decay=1e3, schedule="constant", warmup=0.0)
    with pytest.raises(StageError, match=r"NaN or infinity in '\S+' after step 1/1, learning rate 1e\+38"):
        fit_briefly(small_network(), few, epochs=1, optimizer=endless)


def test_frozen_model_is_refused(digits_task):
    with pytest.raises(StageError, match="requires_grad"):
        fit_briefly(small_network().requires_grad_(False), digits_task.train)


def test_empty_split_is_refused():
    empty = Samples((torch.zeros(0, 1, 8, 8),), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match="got 0"):
        fit_briefly(small_network(), empty)


def test_augmentation_of_a_sample_does_not_depend_on_its_batch():
    together = uniform_numbers(3, 1, [5, 9, 2], 4)
    alone = uniform_numbers(3, 1, [9], 4)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(uniform_numbers(3, 2, [9], 4), alone)
    assert not torch.equal(uniform_numbers(4, 1, [9], 4), alone)


def test_augmentation_numbers_are_uniform():
    numbers = uniform_numbers(0, 0, range(50_000), 2).double()
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    # mean 1/2, variance 1/12, no correlation: four standard errors of 50,000 numbers
    torch.testing.assert_close(numbers.mean(0), torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=0.0052)
    assert numbers.var(0).sub(1 / 12).abs().max() < 0.0014
    assert torch.corrcoef(numbers.T)[0, 1].abs() < 0.018


def test_augmentation_sees_every_training_batch(digits_task):
    flipped = Augmentation(1, lambda inputs, uniform: (inputs[0] * (uniform < 0.5).float()[:, :, None, None],))
    plain = fit_briefly(small_network(), digits_task.train)
    augmented = fit_briefly(small_network(), digits_task.train, augmentation=flipped)
    assert not torch.equal(parameters(plain), parameters(augmented))


def test_map_style_data_set_trains_like_the_same_samples_in_memory(digits_task):
    class OneByOne(torch.utils.data.Dataset):
        def __len__(self):
            return len(digits_task.train)

        def __getitem__(self, index):
            (image,), target = digits_task.train[index]
            return image, int(target)

    one_by_one = fit_briefly(small_network(), OneByOne(), epochs=1)
    in_memory = fit_briefly(small_network(), digits_task.train, epochs=1)
    assert torch.equal(parameters(one_by_one), parameters(in_memory))


def test_means_of_the_loss_are_recorded_epoch_by_epoch(digits_task):
    epochs: list[dict[str, float]] = []
    still = Optimizer(name="sgd", learning_rate=1e-30, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0)
    module, samples = small_network(), len(digits_task.train)
    fit_briefly(module, digits_task.train, epochs=3, batch_size=samples // 5, optimizer=still, record=epochs.append)
    with torch.no_grad():
        losses = cross_entropy(module(*digits_task.train.inputs), digits_task.train.targets)
    # five steps leave out at most four of 1,257 samples
    assert epochs == [{"hard": pytest.approx(losses.mean().item(), rel=0.01)}] * 3
    assert epochs[0] != epochs[1]


def test_recorded_loss_falls_and_is_what_the_log_says(digits_task):
    epochs, lines = [], []
    fit_briefly(small_network(), digits_task.train, epochs=3, record=epochs.append, log=lines.append)
    assert [epoch["hard"] for epoch in epochs] == sorted((epoch["hard"] for epoch in epochs), reverse=True)
    assert lines == [f"epoch {i + 1}/3: hard {epoch['hard']:.4f}" for i, epoch in enumerate(epochs)]


def masked(split: Samples, share: int = 3) -> Samples:
    """Samples of which all but the first in every `share` do not count."""
    uncounted = torch.arange(len(split)) % share > 0
    return Samples(split.inputs, split.targets.masked_fill(uncounted, -100))


def test_samples_that_do_not_count_are_as_if_left_out(digits_task):
    split = Samples((digits_task.train.inputs[0][:300],), digits_task.train.targets[:300])
    counted = Samples((split.inputs[0][::3],), split.targets[::3])
    settings = {"epochs": 3, "optimizer": Optimizer(name="sgd", learning_rate=0.1)}
    epochs: list[list[dict[str, float]]] = [[], []]
    with_others = fit_briefly(small_network(), masked(split), batch_size=300, record=epochs[0].append, **settings)
    alone = fit_briefly(small_network(), counted, batch_size=100, record=epochs[1].append, **settings)
    torch.testing.assert_close(parameters(with_others), parameters(alone), rtol=0, atol=1e-6)  # float32 sums
    for one, other in zip(*epochs, strict=True):
        assert one["hard"] == pytest.approx(other["hard"], rel=1e-5)


def test_batch_in_which_nothing_counts_moves_nothing(digits_task):
    nothing = Samples(digits_task.train.inputs, torch.full_like(digits_task.train.targets, -100))
    still = Optimizer(name="sgd", learning_rate=0.1, weight_decay=0.0)
    trained = fit_briefly(small_network(), nothing, optimizer=still)
    assert torch.equal(parameters(trained), parameters(small_network()))


def test_targets_that_are_no_classes_may_hold_any_number(digits_task):
    targets = torch.where(digits_task.train.targets > 4, -100.0, digits_task.train.targets.float())
    epochs: list[dict[str, float]] = []
    still = Optimizer(name="sgd", learning_rate=1e-30, weight_decay=0.0)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    data = TrainingData(Samples(digits_task.train.inputs, targets))
    settings = TrainingSettings(epochs=1, batch_size=len(targets), optimizer=still)
    loss = LabelLoss(lambda outputs, wanted: (outputs - wanted).square())
    model = TorchModel(module, Reference(factory="networks:PlainNetwork"))
    fit(
        module, loss, data, settings, StageContext(model, CPU, 0, Path(), print, lambda told: epochs.append(told.means))
    )
    expected = (module(*digits_task.train.inputs) - targets).square().mean().item()
    assert epochs == [{"hard": pytest.approx(expected, rel=1e-5)}]


def half_empty() -> nn.Module:
    """The small network, every second weight of its linear layer zero."""
    module = small_network()
    with torch.no_grad():
        module[3].weight[:, ::2] = 0
    return module


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_named_zeros_stay_while_the_weights_beside_them_and_other_zeros_move(digits_task, name):
    module = half_empty()
    with torch.no_grad():
        module[0].weight[:, :, 0] = 0
    trained = fit_briefly(
        module, digits_task.train, zeros=["3.weight"], optimizer=Optimizer(name=name, weight_decay=0.1)
    )
    assert torch.equal(trained[3].weight == 0, module[3].weight == 0)
    assert (trained[3].weight != module[3].weight)[:, 1::2].any()
    assert trained[0].weight.all()


def test_zeros_that_are_not_named_move(digits_task):
    unmasked = fit_briefly(half_empty(), digits_task.train, epochs=1)
    assert (unmasked[3].weight[:, ::2] != 0).any()


def test_training_in_two_parts_sees_the_samples_of_training_at_once(digits_task):
    still = Optimizer(name="sgd", learning_rate=1e-2, momentum=0.0, schedule="constant", warmup=0.0)
    settings = {"optimizer": still, "augmentation": Augmentation(numbers=1, apply=brighter)}
    whole = fit_briefly(small_network(), digits_task.train, epochs=3, **settings)
    first = fit_briefly(small_network(), digits_task.train, epochs=1, **settings)
    second = fit_briefly(first, digits_task.train, epochs=2, first_epoch=1, **settings)
    assert torch.equal(parameters(second), parameters(whole))


def brighter(inputs, uniform):
    return (inputs[0] + uniform[:, :, None, None],)


DISTRIBUTED = """
import sys
import torch
from pathlib import Path
from safetensors.torch import save_file
from compressor import Samples, TorchModel
from compressor.distillation.distil import Student, distil
from compressor.distillation.distillation_settings import DistillationSettings
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.training.settings import Optimizer
from dataclasses import replace
from tests.conftest import digits_task
from tests.training.test_fit import fit_briefly, half_empty, masked, small_network

SGD = Optimizer(name="sgd", learning_rate=1e-2)
directory = Path(sys.argv[1])
task = digits_task.__wrapped__()


def distilled(record, **losses):
    network = Reference(factory="tests.example_models:SequenceNetwork")
    student, teacher = (TorchModel.build(network, seed=i) for i in (0, 1))
    unlabeled = Samples((task.validation.inputs[0],), torch.zeros(180))
    settings = DistillationSettings(
        losses={"hint": {"layers": {"embedding": "query_key_value"}}, **losses},
        unlabeled_share=0.25, epochs=2, batch_size=64, optimizer=SGD,
    )
    context = StageContext(
        teacher, torch.device("cpu"), 0, directory, lambda line: None, lambda told: record(told.means)
    )
    return distil(Student.of(student), teacher, replace(task, unlabeled=unlabeled), settings, context)


fits = {
    "plain": lambda record: fit_briefly(small_network(), task.train, epochs=2, batch_size=64, record=record),
    "zeros": lambda record: fit_briefly(
        half_empty(), task.train, epochs=1, batch_size=64, optimizer=SGD, zeros=["3.weight"], record=record
    ),
    # Of a batch of 4 often one sample counts, or none: the processes have unequal numbers.
    "masked": lambda record: fit_briefly(
        small_network(), masked(task.train, 5), epochs=1, batch_size=4, optimizer=SGD, record=record
    ),
    "hint": lambda record: distilled(record, kd={}, hard={}),
    # The layers behind the hinted one have no gradient.
    "hint_alone": distilled,
}
losses = {name: [] for name in fits}
trained = {name: fit(losses[name].append) for name, fit in fits.items()}
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
for name, module in trained.items():
    means = torch.tensor([list(epoch.values()) for epoch in losses[name]])
    save_file({**module.state_dict(), "losses": means}, directory / f"{name}{rank}.safetensors")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def fits_of_one_and_two(tmp_path_factory) -> Path:
    """Directories `one` and `two`, with what so many processes trained."""
    directory = tmp_path_factory.mktemp("distributed")
    script = directory / "train.py"
    script.write_text(DISTRIBUTED)
    for name in ("one", "two"):
        (directory / name).mkdir()
    tests = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    one = run_python(script, directory / "one", PYTHONPATH=tests, OMP_NUM_THREADS="1")
    for ended in (one, *run_two(script, directory / "two", PYTHONPATH=tests)):
        assert ended.returncode == 0, ended.stderr
    return directory


@pytest.mark.parametrize("name", ["plain", "zeros", "masked", "hint", "hint_alone"])
def test_two_processes_give_the_weights_and_the_recorded_losses_of_one(fits_of_one_and_two, name):
    one = load_file(fits_of_one_and_two / f"one/{name}0.safetensors")
    for rank in (0, 1):
        other = load_file(fits_of_one_and_two / f"two/{name}{rank}.safetensors")
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6)  # the order of float32 sums differs


def test_zeros_stay_in_every_process(fits_of_one_and_two):
    for rank in (0, 1):
        weight = load_file(fits_of_one_and_two / f"two/zeros{rank}.safetensors")["3.weight"]
        assert not weight[:, ::2].any()
        assert weight[:, 1::2].all()
