"""The page of a run: its structure, what it escapes, what may be missing, and how it looks to a browser."""

from __future__ import annotations

import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
from PIL import Image
from switch_dit.charts import Series, chart, short, thinned
from switch_dit.markup import Markup, element
from switch_dit.report import write_report

DEFAULTS = {
    "model": "tiny/4", "routing": "switch", "data": "digits", "steps": 900, "lr": 4e-3, "lr_decay": True,
    "flip": False, "output": "runs", "name": "", "resume": True, "guidance": 1.5, "sample_steps": 50,
}  # fmt: skip
SUMMARY = {
    "training_seconds": 123.4, "loss": 0.25, "mse": 0.19, "vb": 0.0056, "prior": 0.0545,
    "conditional_accuracy": 0.931, "classifier_accuracy": 0.978, "frechet_distance": 1.25,
    "frechet_floor": 0.647, "out_of_range": 0.0, "generated": 1000,
}  # fmt: skip
HOSTILE = "<script>alert('x')</script><img src=x onerror=\"alert(1)\">&amp;\0\x1b</style></title>"


def row(step: int, **values: Any) -> dict[str, Any]:
    usual = {"loss": 20 / step, "mse": 15 / step, "vb": 0.01, "prior": 5 / step, "lr": 1e-3}
    return {"step": step, **usual, "images_per_second": 2000.0, **values}


def write_run(folder: Path, settings: dict[str, Any] | None = None, rows: list[dict] | None = None,
              summary: dict[str, Any] | None = None, pictures: bool = True) -> Path:  # fmt: skip
    """The files that a run leaves behind."""
    folder.mkdir(parents=True)
    environment = {"torch": "2.13.0", "python": "3.11.7", "device": "cpu"}
    settings = DEFAULTS | {"steps": 60} | (settings or {})
    (folder / "config.json").write_text(
        json.dumps(settings | {"data_identity": "9f", "environment": environment})
    )
    rows = [row(20), row(40), row(60)] if rows is None else rows
    (folder / "stats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "summary.json").write_text(json.dumps(SUMMARY if summary is None else summary))
    for name in ("samples", "loss", "routing") if pictures else ():
        Image.new("RGB", (700, 500), "navy").save(folder / f"{name}.png")
    return folder


class Page(HTMLParser):
    """A page as a tree of elements, each of which must be closed where HTML wants that."""

    EMPTY = ("meta", "link", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.shown = path.read_text(encoding="utf-8"), ""
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.shown += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def check(self) -> None:
        """The page is one file: no script, no address but data, no handler, and a text for each picture."""
        names = {name for name, _ in self.elements}
        assert self.text.startswith("<!doctype html>")
        assert self.all("html") == [{"lang": "en"}]
        assert len(self.all("h1")) == len(self.all("main")) == 1
        assert names <= KNOWN
        for name, attributes in self.elements:
            assert not any(key.startswith("on") for key in attributes), (name, attributes)
            for key in ("src", "href", "srcset", "xlink:href"):
                assert attributes.get(key, "data:").startswith("data:"), (name, attributes)
        for image in self.all("img"):
            assert image["src"].startswith("data:image/png;base64,")
            assert image["alt"]
        for word in ("url(", "@import"):
            assert word not in self.text
        for _, attributes in self.elements:
            drawn = " ".join(
                attributes.get(key, "") for key in ("d", "cx", "cy", "x", "y", "x1", "y1", "width")
            )
            assert not {"nan", "inf", "-inf"} & set(re.split("[ MLh]", drawn)), drawn


KNOWN = {
    "html", "head", "meta", "link", "title", "style", "body", "main", "footer", "section", "h1", "h2", "p",
    "strong", "b", "i", "span", "div", "dl", "dt", "dd", "figure", "figcaption", "img", "details", "summary",
    "table", "thead", "tbody", "tr", "th", "td", "pre", "code",
    "svg", "g", "line", "text", "path", "rect", "circle",
}  # fmt: skip


def page_of(folder: Path) -> Page:
    page = Page(write_report(folder, DEFAULTS))
    page.check()
    return page


def test_a_page_has_everything(tmp_path: Path) -> None:
    changed = {"lr": 1e-3, "lr_decay": False, "flip": True, "data": "a b.npz"}
    run = write_run(tmp_path / "runs" / "digits", changed)
    (run / "pictures").mkdir()
    for step in (100, 20, 3000):
        Image.new("RGB", (8, 8)).save(run / "pictures" / f"step-{step}-samples.png")
    page = page_of(run)
    assert [image["width"] for image in page.all("img")] == ["700", "8", "8", "8", "700", "700"]
    assert [image["alt"] for image in page.all("img")][1:4] == [
        f"samples at step {step}" for step in ("20", "100", "3,000")
    ]
    for text in ("Switch-DiT tiny/4 on a b.npz, 60 steps", "93.1%", "of real ones 97.8%", "1.25",
                 "give 0.647", "2 min", "noise 0.19", "2.13.0", "3.11.7", "5 of 12 differ"):  # fmt: skip
        assert text in page.shown, text
    assert "can go on" not in page.shown
    rest = page.text.index('class="same"')
    for key in ("steps", *changed):
        assert page.text.index(f">{key}</th>") < rest, key
    assert page.text.index(">model</th>") > rest
    train, sample = (command.split("Draw more")[0] for command in page.shown.split("python ")[1:])
    assert shlex.split(train) == [
        "models/train_switch_dit.py", "--data", "a b.npz", "--steps", "60", "--lr", "0.001", "--no-lr-decay",
        "--flip", "--output", str(tmp_path / "runs"), "--name", "digits",
    ]  # fmt: skip
    assert sample.startswith(f"models/sample_switch_dit.py --run {run}")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    settings = {"data": HOSTILE, "model": HOSTILE, HOSTILE: HOSTILE, "routing": HOSTILE}
    summary = SUMMARY | {HOSTILE: HOSTILE, "unreadable": [HOSTILE], "loss": HOSTILE}
    rows = [row(20), row(40, **{HOSTILE: 1.0, "loss": HOSTILE})]
    run = write_run(tmp_path / "<b>&\"'", settings, rows, summary)
    (run / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(run / "pictures" / 'step-1-<i>"x.png')
    page = page_of(run)  # which knows no script
    assert len(page.all("img")) == 4
    assert page.shown.count("<script>alert('x')</script>") >= 8
    assert '<i>"x at step 1' in [image["alt"] for image in page.all("img")]
    assert not {"\0", "\x1b"} & set(page.text)


@pytest.mark.parametrize("missing", ["config.json", "stats.jsonl", "summary.json", "all"])
def test_missing_and_broken_files_leave_their_part_out(missing: str, tmp_path: Path) -> None:
    parts = {"config.json": "Settings", "stats.jsonl": "Speed", "summary.json": "Right class"}
    run = write_run(tmp_path / "digits", pictures=False)
    for name in parts if missing == "all" else [missing]:
        (run / name).unlink()
    shown = page_of(run).shown
    for name, part in parts.items():
        assert (part in shown) == (missing not in (name, "all")), part
        (run / name).write_text('{"step": 20, "lo')
    assert not any(part in page_of(run).shown for part in parts.values())
    for name in parts:
        (run / name).write_text("[1, null]\n3\n")
    assert "logged nothing" in page_of(run).shown


def test_without_pictures_or_with_broken_ones(tmp_path: Path) -> None:
    run = write_run(tmp_path / "digits", pictures=False)
    assert not page_of(run).all("img")
    whole = tmp_path / "whole.png"
    Image.new("RGB", (70, 50), "navy").save(whole)
    (run / "samples.png").write_bytes(whole.read_bytes()[:-20])  # cut off
    (run / "loss.png").write_bytes(b"")
    (run / "routing.png").mkdir()
    page = page_of(run)
    assert not page.all("img")
    assert not {"Samples", "Routing"} & set(re.findall("<h2>(.*?)</h2>", page.text))


def test_an_interrupted_run_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    rows = [
        row(20),
        row(40, loss=math.nan, mse=math.inf, prior=None),
        row(60, vb=-1.0),
        row(80, loss=10**400),
    ]
    summary = SUMMARY | {"conditional_accuracy": math.nan, "frechet_distance": math.inf, "loss": None}
    page = page_of(write_run(tmp_path / "digits", {"steps": 900}, rows, summary))
    assert "80 of 900 steps; it can go on" in page.shown
    assert page.shown.count("not finite") >= 4
    assert "step 40: its variance (vb) 0.01" in page.shown
    assert "step 60: all 0.3333, noise (mse) 0.25" in page.shown


def test_a_long_run_is_thinned_to_means(tmp_path: Path) -> None:
    rows = [row(step, prior=float(step)) for step in range(1, 1001)]
    points, each = thinned(rows)
    assert each == 5
    assert len(points) == 200
    assert [points[0]["step"], points[-1]["step"]] == [5, 1000]
    assert [points[0]["prior"], points[-1]["prior"]] == [3, 998]
    run = write_run(tmp_path / "digits", rows=rows)
    (run / "pictures").mkdir()
    for step in range(1, 101):
        Image.new("RGB", (8, 8)).save(run / "pictures" / f"step-{step}-samples.png")
    page = page_of(run)
    assert "mean of 5 of them" in page.shown
    steps = [int(i["alt"].split()[-1]) for i in page.all("img") if i["width"] == "8"]
    assert (steps[0], len(steps), steps[-1]) == (1, 12, 100)


@pytest.mark.parametrize("log", [False, True])
def test_a_curve_is_where_its_values_are(log: bool) -> None:
    """Height 10 is the top and 210 the bottom of the plot, 54 the left and 468 the right."""
    rows = [{"step": step, "a": value} for step, value in ((0, 1.0), (50, 10.0), (100, 100.0))]
    drawn = chart("A", "units", rows, series=[Series("a", "a")], log=log)
    assert re.findall(r'<path d="(.*?)"', drawn) == [
        "M54 210L261 110L468 10" if log else "M54 208L261 190L468 10"
    ]
    assert re.findall(r'text-anchor="end">(.*?)<', drawn) == (
        ["1", "2", "5", "10", "20", "50", "100"] if log else ["0", "25", "50", "75", "100"]
    )
    gap = chart("A", "", [*rows[:2], {"step": 75}, rows[2]], series=[Series("a", "a")], log=log)
    assert re.findall(r'<path d="(.*?)"', gap)[0].count("M") == 2
    assert chart("A", "", [{"step": 1, "a": 0.0}], series=[Series("a", "a")], log=log) == ""
    assert 'd="M' in chart("A", "", rows[:1], series=[Series("a", "a")], log=log)


def test_ticks_are_short() -> None:
    values = (0, -0.25, 0.01, 0.0015, 0.000125, 2.0, 2500, 60000, 1e5, 2.5e12)
    assert [short(value) for value in values] == [
        "0", "-0.25", "0.01", "1.5e-3", "1.25e-4", "2", "2,500", "60,000", "1e5", "2.5e12",
    ]  # fmt: skip


def test_markup_escapes_what_is_not_markup() -> None:
    made = element("p", "a<b", element("i", "&"), cls='"x"', aria_label="'")
    assert made == '<p class="&quot;x&quot;" aria-label="&#x27;">a&lt;b<i>&amp;</i></p>'
    assert Markup("<hr>") + "<hr>" == "<hr>&lt;hr&gt;"


def test_a_page_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "digits")
    before = write_report(run, DEFAULTS).read_bytes()
    seen = []
    replace, write = Path.replace, Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError("no space left on device")

    def watched(path: Path, target: Path) -> Path:
        seen.append((path.read_bytes().endswith(b"</html>"), target.read_bytes() == before))
        return replace(path, target)

    (run / "summary.json").unlink()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(run, DEFAULTS)
    monkeypatch.undo()
    assert [path.name for path in run.glob("report*")] == ["report.html"]
    assert (run / "report.html").read_bytes() == before
    monkeypatch.setattr(Path, "replace", watched)
    write_report(run, DEFAULTS)
    assert seen == [(True, True)]
    assert (run / "report.html").read_bytes() != before
    assert [path.name for path in run.glob("report*")] == ["report.html"]


BROKEN = {
    "script error: ReferenceError: missing": "<script>missing()</script>",
    "console: log": "<script>console.log(1)</script>",
    "broken image: gone": "<img src='gone.png' alt='gone'>",
    "broken image: rotten": "<img src='data:image/png;base64,AAAA' alt='rotten'>",
    "failed load: net::ERR_FILE_NOT_FOUND": "<link rel='stylesheet' href='gone.css'>",
    "request: http://127.0.0.1:1/x.js": "<script src='http://127.0.0.1:1/x.js'></script>",
    "overflow: ": "<div style='width: 2000px'>wide</div>",
    "log: Loading the image": (
        "<meta http-equiv='Content-Security-Policy' content=\"img-src 'none'\"><img src='data:,'>"
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(
    browser.executable() is None, reason=f"needs one of {', '.join(browser.NAMES)} on the PATH"
)
def test_in_a_browser(tmp_path: Path) -> None:
    """Nothing goes wrong on a page, from phone to desk, light and dark; a page with a fault is noticed."""
    long = "images:/" + "a_very_long_folder_name/" * 12
    rows = [row(step, prior=1 / step) for step in range(20, 6001, 20)]
    summary = SUMMARY | {"unreadable": [HOSTILE, "x" * 300]}
    run = write_run(tmp_path / "runs" / "digits", {"data": long, HOSTILE: HOSTILE}, rows, summary)
    (run / "pictures").mkdir()
    for step in (20, 40, 60):
        Image.new("RGB", (700, 700)).save(run / "pictures" / f"step-{step}-samples.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    with browser.browser() as chromium:
        for folder in (run, empty):
            page = write_report(folder, DEFAULTS)
            colours = {}
            for width, dark in ((320, False), (390, True), (800, False), (1100, True)):
                assert chromium.problems(page, width, dark=dark) == [], (folder, width)
                colours.setdefault(dark, set()).add(chromium.opened(page, width, dark=dark)["background"])
            assert colours[False] != colours[True]
            assert len(colours[False]) == len(colours[True]) == 1
        for problem, markup in BROKEN.items():
            (tmp_path / "broken.html").write_text(f"<!doctype html><title>x</title>{markup}")
            found = chromium.problems(tmp_path / "broken.html")
            assert any(one.startswith(problem) for one in found), (problem, found)
