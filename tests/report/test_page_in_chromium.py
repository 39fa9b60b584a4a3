"""The page in a real browser, Debian's Chromium: what it shows, cuts off, runs and fetches."""

import contextlib
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from example_page import everything
from example_report import latency, report, row

from compressor.records.measurements import MetricInfo
from compressor.report.json import read_report
from compressor.report.page.html import to_html

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the command chromium: apt-get install chromium")
needs_pdftotext = pytest.mark.skipif(
    shutil.which("pdftotext") is None, reason="needs the command pdftotext: apt-get install poppler-utils"
)

FAULTS = """<!doctype html><body style="margin: 0">
<p style="height: 0; margin: 0">first</p><p style="margin: 0">second</p>
<p style="font-size: 11px; clear: both">tiny</p>
<p style="width: 2em; overflow: hidden; white-space: nowrap">clipped words</p>
<p style="width: 2000px; text-align: right">outside</p>
</body>"""
REPORTS = ("digits", "every section", "long names", "many")
WIDTHS = (360, 1280)

PROBE = """
const measured = () => {
  const found = {overlaps: [], cut: [], small: [], texts: 0, fetched: performance.getEntriesByType("resource").length,
                 wider: document.documentElement.scrollWidth - innerWidth};
  const boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement, text = node.data.trim();
    if (!text || element.closest("script, title, desc") || !element.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const em = parseFloat(getComputedStyle(element).fontSize);
    for (const box of [...range.getClientRects()].filter(box => box.width && box.height)) {
      found.texts += 1;
      if (em < 12) found.small.push(text);
      const scrolls = element.closest(".scroll");
      if (!scrolls && (box.left < 0 || box.right > innerWidth)) found.cut.push(text);
      for (let clip = element; clip !== document.body; clip = clip.parentElement) {
        const style = getComputedStyle(clip), frame = clip.getBoundingClientRect();
        if (clip === scrolls || (style.overflowX === "visible" && style.overflowY === "visible")) continue;
        if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
            || box.bottom > frame.bottom + 1) found.cut.push(text);
      }
      const seen = scrolls ? scrolls.getBoundingClientRect() : {left: -Infinity, right: Infinity};
      // glyphs fill an em, and the box of a tall font may be higher than its line
      const room = Math.max(0, box.height - em) / 2;
      boxes.push({text, left: Math.max(box.left, seen.left), right: Math.min(box.right, seen.right),
                  top: box.top + room, bottom: box.bottom - room});
    }
  }
  boxes.sort((one, other) => one.top - other.top);
  boxes.forEach((one, index) => {
    for (let next = index + 1; next < boxes.length && boxes[next].top < one.bottom - 1; next++) {
      const other = boxes[next];
      if (one.left < other.right - 1 && other.left < one.right - 1) found.overlaps.push([one.text, other.text]);
    }
  });
  return found;
};
addEventListener("load", () => {
  const folded = measured();
  document.querySelectorAll("details").forEach(details => { details.open = true; });
  const result = parent.document.createElement("pre");
  const name = decodeURIComponent(location.pathname.slice(1));
  result.textContent = JSON.stringify({name, width: innerWidth, folded, unfolded: measured()});
  parent.document.body.append(result);
});
"""
"""What a page says of the boxes of its texts, with its tables folded and unfolded, to the page that frames it."""


@dataclass
class Site:
    """A server of this process that gives `pages` by path, and keeps the path of each request."""

    address: str
    pages: dict[str, str] = field(default_factory=dict)
    requested: list[str] = field(default_factory=list)


@contextlib.contextmanager
def served() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            site.requested.append(self.path)
            page = site.pages.get(self.path)
            self.send_response(200 if page else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((page or "").encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Site(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield site
        server.shutdown()
        thread.join()


def chromium(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [CHROMIUM, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    # root must go without a sandbox, and on Ubuntu every user but of the browser's own package; the pages are ours
    command += ["--no-sandbox", "--no-first-run", "--disable-background-networking", "--enable-logging=stderr"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)


def browsed(address: str, profile: Path) -> tuple[str, str]:
    """Open an address, and return the document as it then is and what the browser's console said."""
    finished = chromium(profile, "--dump-dom", address)
    return finished.stdout, "\n".join(line for line in finished.stderr.splitlines() if "CONSOLE" in line)


def printed(page: str, directory: Path) -> str:
    """What paper shows of a page; what lies beyond its edges is left out."""
    written, paper = directory / "page.html", directory / "page.pdf"
    written.write_text(page)
    chromium(directory / "profile", "--no-pdf-header-footer", f"--print-to-pdf={paper}", written.as_uri())
    shown = subprocess.run(["pdftotext", "-layout", str(paper), "-"], capture_output=True, text=True, check=True)
    return shown.stdout.replace("\u00a0", " ")


def without_policy(page: str) -> str:
    changed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert changed != page
    return changed


def long_names(name: str) -> str:
    return f"{name}.{'W' * 80} {'精度' * 20}"


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """What the probe found in each report at each width, all of them opened at once."""
    reports = {
        "digits": read_report(ROOT / "tests/reports/digits.json"),
        "every section": everything(),
        "long names": everything(long_names),
        "many": everything(classes=1000, layers=200, epochs=500, prunings=5),
    }
    with served() as site:
        for name, report in reports.items():
            probed = without_policy(to_html(report)).replace("</body>", f"<script>{PROBE}</script></body>")
            site.pages[f"/{quote(name)}"] = probed
        site.pages["/faults"] = FAULTS.replace("</body>", f"<script>{PROBE}</script></body>")
        # in frames, as the windows of Chromium are no narrower than 500 pixels
        frames = (
            f'<iframe src="{path}" width="{width}" height="900" style="border: 0"></iframe>'
            for path in site.pages
            for width in WIDTHS
        )
        site.pages["/"] = f"<!doctype html><body>{''.join(frames)}"
        document, console = browsed(site.address, tmp_path_factory.mktemp("profile"))
    assert console == ""
    found = [json.loads(unescape(text)) for text in re.findall("<pre>(.*?)</pre>", document)]
    return {(one["name"], one["width"]): one for one in found}


def test_probe_sees_what_is_wrong(boxes):
    assert boxes["faults", 360]["folded"] == {
        "overlaps": [["first", "second"]],
        "cut": ["clipped words", "outside"],
        "small": ["tiny"],
        "texts": 5,
        "fetched": 0,
        "wider": 1640,
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REPORTS)
def test_no_text_overlaps_is_cut_off_or_too_small(boxes, name, width):
    for state in ("folded", "unfolded"):
        found = boxes[name, width][state]
        assert found.pop("texts") > 100
        assert found == {"overlaps": [], "cut": [], "small": [], "fetched": 0, "wider": 0}


def test_hostile_names_run_nothing_and_fetch_nothing_even_without_the_policy(tmp_path):
    with served() as site:
        stolen = f"{site.address}/stolen"
        hostile = (
            f"</script><img src={stolen} onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
            f"</style></svg><link rel=stylesheet href={stolen}><style>@import url({stolen})</style>"
            f'" style="background:url({stolen})" x=\''
        )
        site.pages["/"] = without_policy(to_html(everything(lambda name: name + hostile)))
        document, _ = browsed(site.address, tmp_path)
    assert set(site.requested) <= {"/", "/favicon.ico"}  # which the browser asks of every site
    title = unescape(document.partition("<title>")[2].partition("</title>")[0])
    assert title.startswith(f"digits{hostile}: ")


def test_page_is_drawn_as_its_policy_allows(tmp_path):
    with served() as site:
        site.pages["/"] = to_html(everything())
        _, console = browsed(site.address, tmp_path)
    assert console == ""  # a style that the policy refuses would be named here


def test_policy_refuses_what_is_put_into_the_page(tmp_path):
    with served() as site:
        added = f"<img src={site.address}/stolen><script>document.title = 'owned'</script><p style='color: red'></body>"
        site.pages["/"] = to_html(everything()).replace("</body>", added)
        document, console = browsed(site.address, tmp_path)
    assert set(site.requested) <= {"/", "/favicon.ico"}
    assert "<title>owned" not in document
    for directive in ("script-src", "img-src", "style-src"):
        assert directive in console


@needs_pdftotext
def test_paper_shows_what_is_folded_on_the_screen_unless_a_figure_says_it(tmp_path):
    paper = printed(to_html(everything()), tmp_path)
    for shown in ('"stage": "training"', "SQNR of its outputs", "-1.5 to 6.25"):
        assert shown in paper
    for hidden in ("As a table", "on the Pareto front\n"):
        assert hidden not in paper


@needs_pdftotext
def test_paper_has_room_for_four_metrics_and_for_every_digit_of_the_key(tmp_path):
    metrics = tuple(MetricInfo(name=f"{name} accuracy", unit="%", higher_is_better=True) for name in "abcd")
    rows = [
        row(f"pruning_{number}", metrics={one.name: 0.9 - 0.01 * number for one in metrics}, timed=latency(1 + number))
        for number in range(12)
    ]
    paper = printed(to_html(report(*rows, metrics=metrics)), tmp_path)
    assert [line.count("-11.00") for line in paper.splitlines() if line.count("79.00 %") == 4] == [4]
    assert "12. pruning_11, on the front" in " ".join(paper.split())
