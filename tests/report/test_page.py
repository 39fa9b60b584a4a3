import base64
import hashlib
import json
import re
import shutil
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from example_page import everything
from example_report import ACCURACY, chain, report, row

from compressor.report.json import read_report
from compressor.report.page.html import to_html
from compressor.report.remarks import headline, remarks
from compressor.report.reproduction import command
from processes import run_python

ROOT = Path(__file__).parents[2]
STYLE = (ROOT / "compressor/report/page/templates/page.css").read_text()
HOSTILE = "</script><img src=x onerror=alert(1)>\"'`{{ 7 * 7 }}</style></title></svg>&lt;b&gt;\x1b[31m\u202e"


class Page(HTMLParser):
    """Elements with the names of their attributes, and the text of each, of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[dict[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.attributes.append(dict(attrs))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.attributes.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self._open[-1], " ".join(data.split())))

    def of(self, tag: str) -> list[str]:
        return [text for within, text in self.texts if within == tag]

    def having(self, tag: str) -> list[dict[str, str]]:
        return [found for (name, _), found in zip(self.elements, self.attributes, strict=True) if name == tag]


def test_page_begins_with_what_came_in_and_what_came_out():
    page = Page(to_html(chain()))
    assert page.of("h1") == [headline(chain())]
    assert page.of("title")[0] == f"digits: {headline(chain())}"


def test_sections_stand_in_order():
    assert Page(to_html(everything())).of("h2") == [
        "Gate",
        "Stages",
        "Size and latency",
        "Trade-off",
        "Training",
        "What compression changed",
        "Channels",
        "Int8",
        "How it was measured",
        "Environment",
        "How to reproduce it",
    ]


def test_sections_without_data_are_left_out():
    alone = report(row("training", timed=None)).model_copy(update={"latency_session": None})
    assert Page(to_html(alone)).of("h2") == [
        "Stages",
        "Size and latency",
        "How it was measured",
        "Environment",
        "How to reproduce it",
    ]


def test_remarks_verdicts_and_figures_are_those_of_the_other_forms():
    found = everything()
    said = Page(to_html(found)).of("li") + Page(to_html(found)).of("span")
    assert not set(remarks(found)) - set(said)
    assert {verdict.message for verdict in found.verdicts} <= set(said)
    assert {"99.12 %", "6.60x faster [6.53, 6.67]", "5.00x smaller", "-0.72 points"} <= set(said)


def test_every_verdict_is_told_in_a_word():
    assert Page(to_html(everything())).of("strong") == ["met", "warning, unmet", "undecidable"]


def test_every_figure_has_a_title_a_description_and_a_table():
    page = Page(to_html(everything()))
    ids = [found["id"] for found in page.attributes if "id" in found]
    assert len(ids) == len(set(ids))
    images = [found for found in page.attributes if found.get("role") == "img"]
    figures = len(page.having("figure"))
    assert len(images) == figures == page.of("summary").count("As a table") > 15
    for found in page.attributes:
        assert set(found.get("aria-labelledby", "").split()) <= set(ids)
    assert all(len(image["aria-labelledby"].split()) == 2 for image in images)
    drawn = [found for found in page.having("svg") if "role" in found]
    assert len(drawn) == len(page.having("desc"))
    undrawn = [found for found in page.having("svg") if "role" not in found and "viewbox" not in found]
    assert all(found["aria-hidden"] == "true" for found in undrawn)


def test_tables_have_captions_and_headings_with_scope():
    page = Page(to_html(everything()))
    assert len(page.having("table")) == len(page.having("caption"))
    assert {found["scope"] for found in page.having("th")} == {"col", "row"}
    assert "<span></span></th>" not in to_html(everything())


def test_regions_that_scroll_can_be_reached_by_keyboard():
    regions = [found for found in Page(to_html(everything())).having("div") if found.get("class") == "scroll"]
    assert all(found["tabindex"] == "0" and found["role"] == "region" for found in regions)


def test_hostile_names_stay_text():
    plain, hostile = (Page(to_html(everything(named))) for named in (str, lambda name: name + HOSTILE))
    assert hostile.elements == plain.elements  # not one element or attribute more, and each was closed
    said = "\n".join(text for _, text in hostile.texts)
    shown = HOSTILE.replace("\x1b", "?").replace("\u202e", "?")
    for name in (
        "digits",
        "training",
        "int8_ptq",
        "soft_labels",
        "accuracy",
        "class 2",
        "blocks.0.conv",
        "cpu",
        "torch",
        "kd",
        "pruning_ratio",
        "size_ratio is 5",
    ):
        assert name + shown in said


def test_numbers_after_names_from_right_to_left_keep_their_order():
    accuracy, pruning = "דיוק", "גיזום שני"
    html = to_html(everything(lambda name: {"accuracy": accuracy, "pruning": pruning}.get(name, name)))
    accuracy, pruning = (f"\u2068{name}\u2069" for name in (accuracy, pruning))
    assert f"{accuracy} 99.12\u00a0% to 98.40\u00a0%" in html
    assert f"{pruning} has a lower {accuracy} than" in html


def test_numbers_stay_beside_their_units_and_intervals_stay_whole():
    html = to_html(everything())
    for whole in ("1.00\u00a0MB", "0.0152\u00a0ms, 6.60x faster [6.53,\u00a06.67]", "(-0.51\u00a0points)"):
        assert whole in html


def test_commands_are_shown_as_they_are_copied():
    found = everything().model_copy(update={"pipeline": "גיזום 5 MB"})
    assert f"<code>{escape(command(found)).replace('&#x27;', '&#39;')}</code>" in to_html(found)


def test_control_characters_do_not_reach_the_page():
    html = to_html(everything(lambda name: name + HOSTILE))
    assert not {"\x1b", "\u202e"} & set(html)


@pytest.mark.parametrize(
    "sign", ["http:", "https:", "//", "src=", "href", "url(", "@import", "<script", "<link", "style="]
)
def test_page_refers_to_nothing_outside_itself(sign):
    assert sign not in to_html(everything())


def test_policy_of_the_page_allows_its_own_style_and_nothing_else():
    html = to_html(everything())
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = Page(html).having("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_thousand_classes_two_hundred_layers_and_five_hundred_epochs_are_cut_and_counted():
    html = to_html(everything(classes=1000, layers=200, epochs=500, prunings=20))
    assert len(html) < 1_500_000
    said = [text for _, text in Page(html).texts]
    for left_out in ("970 more classes", "160 more layers", "180 more layers", "480 more epochs", "20 more curves"):
        assert f"and {left_out}, all in report.json" in said


def test_layers_that_lost_most_are_shown_in_the_order_of_the_model():
    paths = [f"layer{number:02}" for number in range(60)]
    before, after = row("distillation"), row("pruning")
    rows = (
        before.model_copy(update={"channels": dict.fromkeys(paths, 64)}),
        after.model_copy(update={"channels": {path: 10 if number >= 20 else 64 for number, path in enumerate(paths)}}),
    )
    page = Page(to_html(report(*rows)))
    assert [text for text in page.of("span") if text.startswith("layer")][:40] == paths[20:]
    assert "40 of 60 layers have fewer channels than after distillation; of all, 1,680 of 3,840 remain." in " ".join(
        page.of("span")
    )


@pytest.mark.parametrize("channels", [{"other": 32}, {}, {"conv": 64}])
def test_rows_with_other_or_equal_layers_are_not_compared(channels):
    rows = row("a").model_copy(update={"channels": {"conv": 64}}), row("b").model_copy(update={"channels": channels})
    assert "Channels" not in Page(to_html(report(*rows))).of("h2")


def test_loss_that_falls_by_orders_is_drawn_on_a_logarithmic_scale():
    losses = tuple({"kd": 5.0 / 10**epoch, "hard": 5.0 - epoch} for epoch in range(4))
    html = to_html(report(row("distillation").model_copy(update={"losses": losses})))
    assert html.count("loss, logarithmic") == 1
    # equal factors are equal steps
    (line,) = re.findall(r'points="(0,[^"]*)"', html.partition("distillation: kd")[2].partition("</figure>")[0])
    heights = [float(point.partition(",")[2]) for point in line.split()]
    steps = [after - before for before, after in pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.02)  # coordinates have two decimals


def test_models_that_were_not_timed_do_not_stop_the_page():
    assert "Trade-off" not in to_html(report(row("a"), row("b", timed=None), metrics=(ACCURACY,)))


def test_report_of_an_earlier_release_becomes_a_page():
    found = read_report(ROOT / "tests/reports/mnist.json")
    assert "140x smaller" in Page(to_html(found)).of("h1")[0]


def test_command_writes_the_page_of_a_finished_run_again(tmp_path):
    shutil.copy(ROOT / "tests/reports/digits.json", tmp_path / "report.json")
    written = tmp_path / "pages" / "again.html"
    finished = run_python("-m", "compressor", "report", tmp_path, "--json", "--html", written, torch=False)
    assert json.loads(finished.stdout)["pipeline"] == "digits"
    assert written.read_text() == to_html(read_report(tmp_path / "report.json"))


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_line_of_an_interval_lies_on_the_ground_and_not_on_its_bar():
    """On its bar it would have a contrast of 2.5; on the ground both it and the bar are tested below."""
    drawn = re.findall(r"<svg aria-hidden.*?</svg>", to_html(chain()), re.DOTALL)
    bars = [bar for bar in drawn if "interval" in bar]
    assert len(bars) == 4
    for bar in bars:
        lines = re.findall(r'<line class="(\w+)" ([^>]*)/>', bar)
        edges, shown = ([place for name, place in lines if name == wanted] for wanted in ("edge", "interval"))
        assert edges == shown
        assert [name for name, _ in lines] == ["edge"] * 3 + ["interval"] * 3
    assert re.search(r"\.edge \{ stroke: var\(--ground\);", STYLE)


def test_text_stands_out_from_its_ground_in_light_and_dark():
    schemes = re.findall(r"--ground: (#\w{6}).*?--raised: (#\w{6}).*?--other: #\w{6};", STYLE, re.DOTALL)
    assert len(schemes) == 2
    for block in re.findall(r":root \{([^}]*--ground: #\w{6}[^}]*)\}", STYLE):
        colors = dict(re.findall(r"--(\w+): (#\w{6});", block))
        for ground in ("ground", "raised"):
            for text in ("text", "muted", "strong", "other"):
                bright, dim = sorted((luminance(colors[ground]), luminance(colors[text])), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ground, text)  # WCAG 2.2, 1.4.3
