"""The report of the benchmarks: the committed pages are what the result files give; losses are not hidden."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import made_up_results as made_up
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import losses, plots, report  # noqa: E402
from benchmarks.result_files import turns  # noqa: E402

Row = dict[str, Any]
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def folder(root: Path, rows: list[Row] | None = None, **changes: Any) -> Path:
    """A repository with one result file and an empty block in its README."""
    (root / report.RESULTS).mkdir(parents=True)
    (root / report.README).write_text(f"# Title\n\n{report.BEGIN}\n{report.END}\n\nThe rest.\n")
    (root / report.RESULTS / "made-up.json").write_text(json.dumps(made_up.report(rows, **changes)))
    return root


def page(rows: list[Row], **changes: Any) -> str:
    return report.page({"made-up": made_up.report(rows, **changes)}, [])


def changed(rows: list[Row], **changes: Any) -> list[Row]:
    """The rows; those of which ``where`` is true with changes."""
    where = changes.pop("where")
    return [row | changes if where(row) else row for row in rows]


def lines_of(text: str, start: str) -> list[str]:
    """The lines of the section that starts with a heading."""
    lines = text.splitlines()
    first = lines.index(start)
    end = next((i for i in range(first + 1, len(lines)) if lines[i].startswith("#")), len(lines))
    return lines[first:end]


def test_committed_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.load(ROOT / report.RESULTS), "no result file of pytest benchmarks is committed"
    status = report.main(["--check"])
    assert status == 0, capsys.readouterr()


def test_readme_has_the_numbers_of_the_result_files() -> None:
    readme = (ROOT / report.README).read_text()
    block = readme[readme.index(report.BEGIN) : readme.index(report.END) + len(report.END)]
    assert block == report.readme_block(report.load(ROOT / report.RESULTS))


def test_every_picture_in_the_documents_exists() -> None:
    for document in (report.README, report.PAGE):
        text = (ROOT / document).read_text()
        linked = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
        missing = [link for link in linked if not (ROOT / document.parent / link).exists()]
        assert missing == []


def test_ratio_tables() -> None:
    rows = made_up.rows()
    text = report.ratio_tables(made_up.report(rows))
    (head, first, *_), *_ = (
        block.splitlines()[1:] for block in text.split("\n\n") if "layer: forward+backward, bfloat16" in block
    )
    ours, others = ["switch_moe", "switch_moe + table"], ["expert loop", "grouped_mm", "official"]
    columns = ["F.linear", *ours, *others, "switch_moe time"]
    assert re.split(r"  +", head) == ["case", *columns, "saved MiB", "peak MiB"]
    assert re.split(r"  +", first)[1:] == [
        "51.9 ms", "1.90", "1.99", "3.00", "1.60", "2.64", "98.62 ms", "30.4", "60.8"
    ]  # fmt: skip
    assert "failed" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_base_is_ours_where_the_dense_layer_was_not_timed() -> None:
    rows = [row for row in made_up.rows() if row["group"] == "expert_linear" and row["dtype"] == "float32"]
    dense = lambda row: row["contender"] == "F.linear"  # noqa: E731
    text = report.ratio_tables(made_up.report(changed(rows, where=dense, microseconds=None, failure="x")))
    head, first = text.splitlines()[2:4]
    assert re.split(r"  +", head)[:3] == ["case", "switch_moe", "F.linear"]
    assert re.split(r"  +", first)[1:4] == ["56.62 ms", "failed", "2.17"]


def test_absent_contenders_have_a_dash() -> None:
    rows = [row for row in made_up.rows() if row["group"] == "expert_linear" and row["dtype"] == "float32"]
    rows.remove(next(row for row in rows if row["contender"] == "grouped_mm"))
    first, second = report.ratio_tables(made_up.report(rows)).splitlines()[3:5]
    assert re.split(r"  +", first)[4] == "-"
    assert re.split(r"  +", second)[4] == "2.40"


def test_losing_cases_are_named() -> None:
    text = page(made_up.rows())
    (said,) = [
        line
        for line in lines_of(text, "### expert_linear: forward+backward, bfloat16, cpu")
        if "Ours" in line
    ]
    assert "slower than F.linear: D=384 B=32 (1.90x), D=768 B=16 (1.90x), D=1152 B=8 (1.90x)." in said
    assert "slower than grouped_mm: D=384 B=32 (1.19x), D=768 B=16 (1.19x), D=1152 B=8 (1.19x)." in said
    assert "Missed: at most 1.8x the time of F.linear, at D=384 B=32 (1.90x)" in said
    assert "Missed: at least 2x as fast as expert loop, at D=384 B=32 (1.58x)" in said
    assert "Met" not in said
    (said,) = [
        line for line in lines_of(text, "### expert_linear: forward+backward, float32, cpu") if "Ours" in line
    ]
    assert "grouped_mm" not in said
    assert "Met: at most 1.3x the time of F.linear, at least 2x as fast as expert loop." in said
    assert "Missed" not in said
    assert "Ours is the fastest here." in lines_of(text, "### gate: forward, float32, cpu")


def test_every_table_of_times_says_where_ours_loses() -> None:
    text = page(made_up.rows())
    headings = [str(section) for section in report.sections(made_up.report())]
    assert len(headings) == 12
    for heading in headings:
        assert any(line.startswith("Ours ") for line in lines_of(text, f"### {heading}")), heading


def test_many_losing_cases_are_summed_up() -> None:
    found = [(1.1, "a"), (1.3, "b"), (1.2, "c")]
    assert losses.listing(found, 3, 3) == "a (1.10x), b (1.30x), c (1.20x)"
    assert losses.listing(found, 3, 2) == "all 3 cases (1.10x to 1.30x, the most at b)"
    assert losses.listing(found, 5, 2) == "3 of 5 cases (1.10x to 1.30x, the most at b)"


def test_limits_hold_at_the_shapes_of_the_design_only() -> None:
    rows = [row for row in made_up.rows() if row["group"] == "expert_linear"]
    other = [row | {"shape": row["shape"] | {"M": 16}} for row in rows]
    assert "Missed" in losses.slower(turns(rows))
    assert not re.search("Missed|Met", losses.slower(turns(other)))


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (1.0, "at least 2x as fast as expert loop, at least 2x as fast as official."),
        (1.2, "Missed: at least 2x as fast as official, at D=384 B=32 (1.75x)"),
        (3.0, "Ours is slower than official: D=384 B=32 (1.43x)"),
    ],
)
def test_the_official_layer_is_held_against_ours_with_the_table(factor: float, said: str) -> None:
    rows = [row for row in made_up.rows() if row["group"] == "layer" and row["dtype"] == "float32"]
    found = [
        row | {"microseconds": factor * row["microseconds"]} if "table" in row["contender"] else row
        for row in rows
    ]
    assert said in losses.slower(turns(found))


def test_names_agree_with_those_of_the_steps() -> None:
    from benchmarks import steps

    assert (losses.DENSE_MODEL, *report.STEPS) == (steps.DENSE, f"{steps.TRAIN}_step", f"{steps.SAMPLE}_step")


def test_the_step_of_the_largest_model_has_a_limit() -> None:
    rows = [row for row in made_up.rows() if row["group"] == "train_step"]
    assert "Missed" not in losses.slower(turns(rows))
    largest = [row | {"model": "XL/2"} for row in rows]
    assert "Missed: at most 1.1x the time of dense DiT" in losses.slower(turns(largest))


def test_failures_are_shown() -> None:
    rows = made_up.rows()
    ours = lambda row: row["group"] == "gate" and row["ours"]  # noqa: E731
    broken = changed(rows, where=ours, microseconds=None, samples=[], failure="wrong: far off")
    text = page(broken)
    assert "| gate D=384 N=1032 | float32 | forward | broken | wrong: 1.0 off |" in text
    said = lines_of(text, "### gate: forward, float32, cpu")
    assert "Ours failed at D=384 N=1032 (wrong: far off)." in said
    assert "| D=384 N=1032 | failed | 900 us | failed |" in said
    untimed = [row | {"microseconds": None} for row in broken]
    assert "| D=384 N=1032 | failed | - | failed |" in lines_of(
        page(untimed), "### gate: forward, float32, cpu"
    )
    assert "Ours is the fastest here." not in said


def test_memory_is_beside_the_floor_and_losses_are_named() -> None:
    lines = lines_of(page(made_up.rows()), "### layer: forward+backward, bfloat16, cpu")
    heading = "| case | floor | switch_moe | F.linear | expert loop | grouped_mm | official |"
    first = lines[lines.index(heading) + 2]
    x = 32 * 256 * 384 * 2 / 2**20
    assert first.split(" | ")[1:3] == [f"{x:g}, {2 * x:g}", "30.4 / 60.8"]
    (said,) = [line for line in lines if line.startswith("Saved memory")]
    assert "grouped_mm: D=384 B=32 (1.19x)" in said
    assert "expert loop" not in said


def test_times_follow_the_result_file() -> None:
    """Twice the times: the same ratios, twice the times, and no other number changes."""
    rows = made_up.rows()
    twice = [row | {"microseconds": row["microseconds"] and 2 * row["microseconds"]} for row in rows]
    before, after = page(rows), page(twice)
    times = re.compile(r"([\d.]+) (us|ms|s)\b")
    scale = {"us": 1.0, "ms": 1e3, "s": 1e6}
    found = [[float(n) * scale[unit] for n, unit in times.findall(text)] for text in (before, after)]
    assert len(found[0]) > 60
    assert found[1] == pytest.approx([2 * time for time in found[0]], rel=2e-3)
    assert times.sub("", before) == times.sub("", after)


@pytest.mark.parametrize("contender", ["switch_moe", "F.linear", "expert loop", "grouped_mm"])
def test_ratios_follow_the_result_file(contender: str) -> None:
    """Each number in the README's table changes with each of its two contenders."""

    def cells(rows: list[Row]) -> list[list[float]]:
        block = report.readme_block({"made-up": made_up.report(rows)})
        lines = [line.split(" | ")[2:] for line in block.splitlines() if line.startswith("| D=")]
        return [[float(NUMBER.search(cell).group()) for cell in line] for line in lines]

    rows = made_up.rows()
    slower = [
        row | {"microseconds": 3 * row["microseconds"]} if row["contender"].startswith(contender) else row
        for row in rows
    ]
    factors = {
        "switch_moe": (3, 1 / 3, 1 / 3, 1 / 3), "F.linear": (1 / 3, 1, 1, 1), "expert loop": (1, 3, 1, 1),
        "grouped_mm": (1, 1, 3, 1),
    }[contender]  # fmt: skip
    before, after = cells(rows), cells(slower)
    assert len(before) == 6
    for old, new in zip(before, after, strict=True):
        assert new == pytest.approx([n * factor for n, factor in zip(old, factors, strict=True)], abs=0.02)


def test_losses_are_bold_in_the_readme() -> None:
    lines = report.readme_block({"made-up": made_up.report()}).splitlines()
    assert "| D=384 B=32 T=256 M=3 k=2 | float32 | 1.20 | 2.17 | 2.00 | 2.10 |" in lines
    assert "| D=384 B=32 T=256 M=3 k=2 | bfloat16 | **1.90** | **1.58** | **0.84** | 1.33 |" in lines
    (said,) = [line for line in lines if line.startswith("-: not")]
    assert "Ours is slower than grouped_mm: 3 of 6 cases" in said
    (step,) = [line for line in lines if line.startswith("A training step")]
    assert "120 ms, 1.20x the time of dense DiT, 0.60x the time of official structure" in step


def test_what_was_not_measured_is_not_there() -> None:
    rows = [row for row in made_up.rows() if row["contender"] not in ("official", "grouped_mm")]
    lines = report.readme_block({"made-up": made_up.report(rows)}).splitlines()
    assert "| D=384 B=32 T=256 M=3 k=2 | float32 | 1.20 | 2.17 | - | - |" in lines
    steps = [row for row in rows if row["group"] == "train_step"]
    block = report.readme_block({"made-up": made_up.report(steps)})
    assert "A training step" in block
    assert "expert_linear" not in block
    empty = report.page({}, [])
    assert "No machine has been measured." in empty
    assert " ms" not in empty


def test_growth_has_exponents_and_the_claim() -> None:
    lines = lines_of(page(made_up.rows()), "### growth: exponents, cpu, float32, forward+backward")
    assert any(
        line.startswith("| k | 1, 2, 4, 8 | 0.02 | 0.00 | 0.90 | 0.02 | 0.00 | 0.90 |") for line in lines
    )
    (said,) = [line for line in lines if line.startswith("The time")]
    assert "The time of ours grows faster than that of F.linear in D (1.90 against 1.80)" in said
    assert "The memory of ours grows faster than that of F.linear in D (1.90 against 1.80)" in said
    assert f"{8**0.02:.2f}x from k = 1 to 8" in said
    assert f"{8**0.1:.2f}x from M = 2 to 16" in said


def test_exponent() -> None:
    assert plots.exponent([(1, 5.0), (2, 20.0), (4, 80.0)]) == pytest.approx(2)
    assert plots.exponent([(1, 5.0), (2, 5.0)]) == 0
    assert plots.exponent([(1, 5.0)]) is None
    assert plots.exponent([(2, 5.0), (2, 6.0)]) is None


def test_writes_then_is_up_to_date(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / report.RESULTS / "compiled.json").write_text('{"rows": []}')
    (root / report.RESULTS / "compiled.md").write_text("# Kernels\n")
    assert report.main(["--check"], root) == 1
    assert report.main([], root) == 0
    capsys.readouterr()
    assert report.main(["--check"], root) == 0
    assert capsys.readouterr().out == ""
    readme, text = ((root / path).read_text() for path in (report.README, report.PAGE))
    assert readme.startswith("# Title\n\n<!--")
    assert readme.endswith("-->\n\nThe rest.\n")
    assert "[`results/compiled.md`](results/compiled.md)" in text
    names = {f"made-up-{end}.{kind}" for end in plots.ENDINGS for kind in plots.FORMATS}
    assert names == {
        path.name for path in (root / report.RESULTS).iterdir() if path.stem.startswith("made-up-")
    }
    for name in names:
        path = root / report.RESULTS / name
        assert 5_000 < path.stat().st_size < (150_000 if path.suffix == ".svg" else 400_000)
        if path.suffix == ".png":
            assert Image.open(path).size > (600, 400)
        else:
            assert "date>" not in path.read_text()
    before = {name: (root / report.RESULTS / name).read_bytes() for name in names}
    assert report.main([], root) == 0
    assert before == {name: (root / report.RESULTS / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that is up to date."""
    root = folder(tmp_path_factory.mktemp("written"))
    report.write(root)
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


GROWN = next(row["microseconds"] for row in made_up.rows() if row["case"] == "growth k=8" and row["ours"])


@pytest.mark.parametrize(
    ("path", "old", "new", "stale"),
    [
        (report.README, "**1.58**", "**1.98**", ["README.md"]),
        (report.README, "The rest.", "Other.", []),
        (report.PAGE, "1.19x", "0.99x", ["benchmarks/README.md"]),
        (
            report.RESULTS / "made-up.json", f'"microseconds": {json.dumps(GROWN)}', '"microseconds": 9e5',
            ["benchmarks/README.md", *(f"benchmarks/results/made-up-growth-time.{f}" for f in plots.FORMATS)],
        ),
    ],
)  # fmt: skip
def test_stale_files_are_named(
    root: Path, capsys: pytest.CaptureFixture[str], path: Path, old: str, new: str, stale: list[str]
) -> None:
    assert report.stale(root) == []
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))
    assert report.main(["--check"], root) == bool(stale)
    lines = [f"report: {name} is stale; run make bench-report" for name in stale]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_missing_picture_is_named(root: Path) -> None:
    (root / report.RESULTS / "made-up-ratios.svg").unlink()
    assert report.stale(root) == ["benchmarks/results/made-up-ratios.svg is stale"]


def test_no_picture_without_its_result_file(root: Path) -> None:
    (root / report.RESULTS / "made-up.json").unlink()
    orphans = [line for line in report.stale(root) if line.endswith("has no result file")]
    assert len(orphans) == len(plots.ENDINGS) * len(plots.FORMATS)
    assert all("made-up-" in line for line in orphans)
    report.write(root)
    assert report.stale(root) == []
    assert list((root / report.RESULTS).iterdir()) == []


@pytest.mark.parametrize(
    "readme",
    ["", report.BEGIN, report.END, f"{report.END}\n{report.BEGIN}", 2 * f"{report.BEGIN}\n{report.END}\n"],
)
def test_readme_without_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str], readme: str) -> None:
    root = folder(tmp_path)
    (root / report.README).write_text(readme)
    assert report.main([], root) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(root / report.README) in line
    assert report.BEGIN in line
    assert (root / report.README).read_text() == readme
    assert not (root / report.PAGE).exists()


def test_a_bad_result_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, format=2)
    assert report.main([], root) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("report: ")
    assert "made-up.json: format is 2; it must be 1" in line
