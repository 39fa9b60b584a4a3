"""Hidden units of recurrent layers, and what is pruned around a recurrent cell."""

import pytest
import torch
from torch import Tensor, nn

from compressor.models.artifact import TorchModel
from compressor.models.edits import structural_edits
from compressor.pruning.channels import prunable_groups, prune_channels
from compressor.pruning.criteria import magnitude
from compressor.pruning.groups import check_equal, silence, without
from compressor.references.reference import Reference

SERIES = (torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)),)


class SeriesNetwork(nn.Module):
    """A linear layer, a recurrent layer, two linear layers on what `read` takes of the recurrent layer's outputs."""

    def __init__(self, kind="GRU", read="last", **settings) -> None:
        super().__init__()
        self.read = read
        self.stem = nn.Linear(5, 12)
        self.rnn = getattr(nn, kind)(12, 8, batch_first=True, **settings)
        width = 16 if settings.get("bidirectional") else 8
        self.hidden = nn.Linear(width, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, states = self.rnn(self.stem(x).relu())
        state = states[0] if isinstance(states, tuple) else states
        both = torch.cat([state[-2], state[-1]], dim=1) if self.rnn.bidirectional else state[-1]
        return self.head(self.hidden({"last": y[:, -1], "mean": y.mean(1), "state": both}[self.read]).relu())


class CellNetwork(nn.Module):
    """A cell in a loop."""

    def __init__(self, kind="GRUCell") -> None:
        super().__init__()
        self.stem, self.cell = nn.Linear(5, 12), getattr(nn, kind)(12, 8)
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.stem(x).relu().unbind(1):
            state = self.cell(step, state)
        return self.head(self.hidden(state[0] if isinstance(state, tuple) else state).relu())


class StackedSeries(nn.Module):
    """One recurrent layer on another, with a normalization in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.LSTM(5, 8, batch_first=True), nn.LayerNorm(8)
        self.second, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)[0]))[0].mean(1))


class WrittenState(SeriesNetwork):
    """Its forward has the number of hidden units."""

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.stem(x).relu(), torch.zeros(1, len(x), 8))
        return self.head(self.hidden(y[:, -1]).relu())


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "GRU"},
        {"kind": "LSTM", "read": "mean", "num_layers": 2, "bidirectional": True},
        {"kind": "RNN", "read": "state", "bias": False},
        {"kind": "GRU", "read": "state", "bidirectional": True},
        {"kind": "LSTM", "read": "state", "num_layers": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_hidden_units_leave_and_the_network_answers_as_if_nothing_read_them(settings):
    torch.manual_seed(0)
    module, inputs = SeriesNetwork(**settings).double().eval(), (SERIES[0].double(),)
    groups = prunable_groups(module, inputs)
    assert [(group.path, group.units) for group in groups] == [("stem", 12), ("rnn", 8), ("hidden", 6)]
    removal = {"stem": (0, 3, 4), "rnn": (1, 2, 6), "hidden": (5,)}
    smaller = without(module, groups, removal)
    check_equal(smaller, silence(module, groups, removal), inputs, tolerance=1e-10)
    assert (smaller.rnn.input_size, smaller.rnn.hidden_size) == (9, 5)
    assert all(magnitude(module, group, order=2).shape == (group.units,) for group in groups)
    assert (smaller(*inputs) - module(*inputs)).abs().max() > 1e-3  # what left did something


def test_one_recurrent_layer_may_read_another():
    groups = prunable_groups(StackedSeries(), SERIES)
    assert [(group.path, group.units) for group in groups] == [("first", 8), ("second", 6)]


@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell", "RNNCell"])
def test_cell_in_a_loop_is_kept_and_the_rest_is_pruned(kind):
    lines = []
    groups = prunable_groups(CellNetwork(kind), SERIES, log=lines.append)
    assert [group.path for group in groups] == ["hidden"]
    assert any(line.startswith("kept whole: stem: cell") for line in lines)
    lines.clear()
    assert prunable_groups(CellNetwork(kind), SERIES, protect=["cell"], log=lines.append) == groups
    assert lines == []


def test_number_of_hidden_units_written_in_forward_keeps_them():
    lines = []
    groups = prunable_groups(WrittenState(), SERIES, log=lines.append)
    assert [group.path for group in groups] == ["stem", "hidden"]
    assert len(lines) == 1
    assert "rnn: WrittenState must run after pruning" in lines[0]


def test_pruned_recurrent_network_is_saved_and_comes_back_with_equal_outputs(tmp_path):
    model = TorchModel.build(Reference(factory="test_recurrent:SeriesNetwork"), seed=0)
    groups = prunable_groups(model.module, SERIES)
    cut = prune_channels(model.module, SERIES, groups, {"rnn": (1, 2, 6)}).module
    smaller = model.with_module(cut, *structural_edits(model.module, cut))
    smaller.save(tmp_path)
    assert torch.equal(TorchModel.load(tmp_path).predict(SERIES), smaller.predict(SERIES))
