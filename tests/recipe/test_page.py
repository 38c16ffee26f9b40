"""The page: its parts, its texts that are escaped, and its looks in a browser."""

import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.browser import BROWSER, looks
from helpers.reports import ARMS, choices, group, images, improvement

from ncprior.diagnostics import Report, Verdict
from ncprior.recipe import Improvement, Score
from ncprior.recipe.charts import ticks
from ncprior.recipe.markup import element

VOID = {"img", "meta", "line", "circle", "path", "rect"}

PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(19, 23, 27)"}


class Reader(HTMLParser):
    """Reads a page, and fails where elements are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes an element."""
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes an element without content."""
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Closes the element that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Notes a text."""
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.found if name == tag]


def headings(report: Improvement) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", report.to_html())


def test_a_full_report_has_every_section_and_a_bare_one_only_its_verdict() -> None:
    assert headings(improvement()) == [
        "Samples, before and after", "Latents", "Proposals and groups", "Calibration of log r",
        "Training", "Choices", "Details",
    ]  # fmt: skip
    assert headings(Improvement("Better.")) == ["Details"]
    assert "<h1>Better.</h1>" in Improvement("Better.").to_html()


def test_the_heading_is_the_first_sentence_of_the_verdict() -> None:
    page = Improvement("The new prior fits. It has 0.01 nats.").to_html()
    assert "<h1>The new prior fits.</h1>" in page
    assert ">It has 0.01 nats.</p>" in page


def test_every_text_is_escaped() -> None:
    evil = '<script>alert("x")</script>&'
    first, *rest = choices()
    candidate = first.candidates[0]._replace(name=evil)
    choice = first._replace(
        part=evil, chosen=evil, reason=evil, criterion=evil, unit=evil,
        candidates=(candidate, *first.candidates),
    )  # fmt: skip
    history = improvement().histories[0]._replace(stopped=evil)
    x = torch.rand(4, 1, 8, 8)
    report = Improvement(
        evil, {evil: Score(0.5)}, (choice, *rest), histories=(history,), sampler=evil,
        details={evil: evil}, samples={evil: x, "posterior": x},
        latents={evil: torch.randn(9, 3), "posterior": torch.randn(9, 3)},
    )  # fmt: skip
    page = report.to_html()
    assert "<script" not in page
    assert page.count(escape(evil)) > 12
    assert evil in Reader(page).texts or evil in "".join(Reader(page).texts)


def test_attributes_are_escaped_and_left_out() -> None:
    found = element("p", "a<b", element("br"), class_='"x"', aria_label=None, stroke_width=1 / 3)
    assert found == '<p class="&quot;x&quot;" stroke-width="0.333333">a&lt;b<br></br></p>'


def test_nothing_is_fetched_and_no_script_runs() -> None:
    page = improvement().to_html()
    reader = Reader(page)
    sources = [
        it.get(key) or "" for _, it in reader.found for key in ("src", "href", "xlink:href")
    ]
    assert all(source.startswith("data:image/png;base64,") for source in sources if source)
    assert not re.search(r"url\(|@import|@font-face|https?://|<script|<link|<iframe| on\w+=", page)
    policy = next(it["content"] for it in reader.all("meta") if "http-equiv" in it)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_pictures_have_words_for_those_who_cannot_see_them() -> None:
    reader = Reader(improvement(num_groups=2).to_html())
    assert len(reader.all("img")) == 5
    assert all(it["alt"] for it in reader.all("img"))
    for svg in reader.all("svg"):
        assert svg.get("aria-label") or svg.get("aria-hidden") == "true"
    assert reader.all("html")[0]["lang"] == "en"
    assert len(reader.all("h1")) == 1


def test_of_many_groups_the_most_needy_come_first_and_curves_are_folded() -> None:
    page = improvement(num_groups=30).to_html()
    rows = re.findall(r"<tr><td>(\d+)</td><td class=\"(\w+)\">", page)
    assert [int(k) for k, _ in rows[:3]] == [29, 28, 27]
    assert [style for _, style in rows[-7:]] == ["idle"] * 7  # where the base matches
    assert page.count("<summary>24 more groups") == 2  # of two stages
    few = re.findall(r"<tr><td>(\d+)</td><td class=", improvement(num_groups=3).to_html())
    assert few == ["0", "1", "2"]


def test_a_lower_bound_of_the_proposals_is_marked() -> None:
    bound = group(0, 2_000_000, Verdict.TOO_WIDE)._replace(needs_more=True)
    page = Improvement("So.", diagnosis=Report((bound,), 10, 100, (5, 50))).to_html()
    assert "&gt; 2e6" in page


def test_the_users_own_pictures_are_shown() -> None:
    class Figure:
        def savefig(self, file: Any, **options: Any) -> None:
            file.write(b"a picture")

    seen = []

    def show(x: torch.Tensor) -> Figure:
        seen.append(x)
        return Figure()

    samples = {"old prior": torch.zeros(3, 50), "new prior": torch.ones(3, 50)}
    page = improvement(samples=samples).to_html(show=show)
    assert page.count("data:image/png;base64,YSBwaWN0dXJl") == 2
    assert torch.equal(seen[1], samples["new prior"])


def test_columns_of_a_narrow_table_are_histograms_and_other_data_has_no_picture() -> None:
    table = {arm: torch.randn(99, 4) for arm in ("held-out data", *ARMS)}
    page = improvement(samples=table).to_html()
    assert headings(improvement(samples=table))[0] == "Columns, before and after"
    assert page.count('aria-label="Histograms of column') == 4
    named = improvement(samples=table)._replace(columns=("age", "<b>", "c", "d")).to_html()
    assert (
        'aria-label="Histograms of age: held-out data' in named
        and "Histograms of &lt;b&gt;" in named
    )
    constant = {arm: torch.full((5, 1), torch.nan) for arm in table}
    assert headings(improvement(samples=constant))[0] == "Columns, before and after"
    for shape in ((9, 2, 50), (9, 31), (9,)):
        other = {arm: torch.randn(shape) for arm in table}
        assert headings(improvement(samples=other))[0] == "Latents"


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    for low, high in ((1.32, 1.39), (-3.0, 1e6), (1e-7, 2e-7)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 7
        assert low - 1e-9 <= found[0] < found[-1] <= high + 1e-9


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """No messages, nothing fetched, no overflow, contrast of 4.5 (WCAG AA), letters of a size."""
    table = {arm: torch.randn(99, 6) for arm in ("held-out data", *ARMS)}
    pages = {
        "flat": improvement().to_html(),
        "deep": improvement(10, images(3, 16)).to_html(),
        "table": improvement(2, table).to_html(),
        "bare": Improvement("Better.").to_html(),
    }
    found, messages = looks(pages, tmp_path)
    assert "CONSOLE" not in messages
    assert len(found) == 4 * len(pages)
    for page in found:
        assert page["scroll"] <= page["width"], page
        assert not page["outside"], page
        assert not page["fetched"], page
        assert page["contrast"] >= 4.5, page
        assert page["letters"] >= 11, page  # pixels, with the space above them
        assert page["paper"] == PAPER[page["scheme"]]
        assert page["texts"] > (3 if page["name"] == "bare" else 60)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_browser_finds_faults(tmp_path: Path) -> None:
    """A page that is too wide, pale, fetches and fails is seen to be so."""
    bad = """<body style="background: rgb(255, 255, 255)"><p style="color: #ccc; width: 500px">Pale and
    wide, so that it reaches over the right edge of a narrow window</p><svg width="9" height="9">
    <text style="font-size: 3px" y="9">small</text></svg><img src="http://127.0.0.1:9/a.png">
    <script>throw new Error("no")</script>"""
    (narrow, _, wide, _), messages = looks({"bad": bad}, tmp_path)
    assert "CONSOLE" in messages
    assert narrow["scroll"] > 400 >= wide["scroll"] - 1000
    assert narrow["outside"] and not wide["outside"]
    assert narrow["contrast"] < 2 and narrow["letters"] < 6
    assert narrow["fetched"][0].endswith("a.png")


def test_rows_of_several_shapes_are_one_picture_or_none() -> None:
    """The report of a decoder of another shape than the data could not be written."""
    flat, images = torch.rand(9, 64), torch.rand(9, 1, 8, 8)
    for data, decoded in ((flat, images), (images, flat)):
        samples = {"held-out data": data, **dict.fromkeys(ARMS, decoded)}
        assert headings(improvement(samples=samples))[0] == "Samples, before and after"
    narrow = {"held-out data": torch.randn(9, 5), **dict.fromkeys(ARMS, torch.randn(9, 2))}
    assert headings(improvement(samples=narrow))[0] == "Latents"
    large = dict.fromkeys(("held-out data", *ARMS), torch.full((9, 2), 1e17))
    assert headings(improvement(samples=large))[0] == "Columns, before and after"
