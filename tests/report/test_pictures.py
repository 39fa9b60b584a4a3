import pytest
from example_page import everything
from example_report import ACCURACY, LOSS, latency, quality, report, row

from compressor.report.page.pictures import class_picture, loss_pictures, tradeoff_picture


def front_of(*rows, metric=ACCURACY):
    picture = tradeoff_picture(report(*rows, metrics=(metric,)))
    return [line[-1] for line in picture.table[1:]]


def test_stages_that_are_as_good_and_as_fast_within_the_noise_are_both_on_the_front():
    assert front_of(row("a"), row("b", timed=latency(4.0, 0.02)), row("c", timed=latency(4.01, 0.02))) == [
        "no",
        "yes",
        "yes",
    ]


def test_lower_values_of_a_loss_are_on_the_front():
    rows = row("a", metrics={"loss": 0.5}), row("b", metrics={"loss": 0.4}, timed=latency(2.0))
    assert front_of(*rows, metric=LOSS) == ["no", "yes"]
    assert "lower is better" in tradeoff_picture(report(*rows, metrics=(LOSS,))).drawing.y_title


def test_front_is_told_in_words_beside_the_drawing():
    picture = tradeoff_picture(report(row("a"), row("b", timed=latency(2.0))))
    assert picture.drawing.key == ("a", "b, on the front")


def test_baseline_is_named_and_not_compared_with_itself():
    picture = tradeoff_picture(report(row("a"), row("b", timed=latency(2.0))))
    assert [line[2] for line in picture.table[1:]] == ["the baseline", "2.00x faster [1.98, 2.02]"]


def test_of_many_stages_only_those_on_the_front_are_numbered_in_the_drawing():
    rows = [row(f"stage {number}", timed=latency(1.5**number)) for number in range(21)]
    few, many = (tradeoff_picture(report(*rows[:count])).drawing.labels for count in (20, 21))
    assert len(few) > 1
    assert [label.text for label in many] == ["21"]


def loss_picture(*losses):
    (picture,) = loss_pictures(report(row("training").model_copy(update={"losses": losses})))
    return picture


@pytest.mark.parametrize("losses", [(0.5,), (0.69315, 0.69314, 0.69313), (0.0, 0.0), (1e9, 1e9 + 1)])
def test_gridlines_have_different_labels_however_little_a_loss_changes(losses):
    ticks = loss_picture(*({"kd": loss} for loss in losses)).drawing.y_ticks
    texts = [tick.text for tick in ticks]
    assert len(texts) == len(set(texts)) > 0


def test_loss_is_drawn_in_pieces_where_epochs_lack_it_and_as_a_mark_where_a_piece_is_one_epoch():
    drawn = loss_picture({"kd": 5.0}, {"kd": 4.0}, {}, {"kd": 3.0}, {}, {}, {"kd": 2.0}, {"kd": 1.0}, {})
    assert len(drawn.drawing.lines) == 2
    assert [mark.x for mark in drawn.drawing.marks] == [37.5, 87.5]  # of nine epochs the fourth, and the last known
    assert drawn.description == "5 to 1 in 5 of 9 epochs"


def test_table_of_classes_has_every_stage_that_was_judged_per_class():
    found = everything()
    student = found.rows[1].model_copy(update={"quality": quality(0.875)})
    table = class_picture(found.model_copy(update={"rows": (found.rows[0], student, *found.rows[2:])})).table
    assert table[0] == ["class", "training", "distillation", "int8_ptq", "change, first to last"]
    assert [line[2] for line in table[1:4]] == ["87.50 %", "unknown", "50.00 %"]
    assert table[1][0] == "class 0 (0)"
