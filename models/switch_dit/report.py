"""A run as one page: ``report.html`` in its folder, made of the files that are there.

The page asks for nothing from outside and runs no script, which its Content-Security-Policy forbids too.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
import struct
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from switch_dit.charts import Series, chart, finite, thinned
from switch_dit.markup import Markup, element, join

_NOT_SETTINGS = ("environment", "data_identity")
_MODELS = {
    "switch": "Switch-DiT",
    "dtr": "a diffusion transformer with fixed channel masks",
    "none": "a plain diffusion transformer",
}
_STRIP = 12  # pictures over time; more are left out evenly


def write_report(folder: Path | str, defaults: dict[str, Any] | None = None) -> Path:
    """Writes report.html from config.json, stats.jsonl, summary.json and the pictures of a run.

    A file that is missing or broken leaves its part out. ``defaults`` are the settings of a run where nothing
    is set: what differs is shown first. ``OSError`` where the page cannot be written.
    """
    folder = Path(folder)
    page = "<!doctype html>\n" + _page(folder, defaults or {})
    draft, path = folder / "report.incomplete", folder / "report.html"
    try:
        draft.write_bytes(page.encode("utf-8", "replace"))
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    return path


def _page(folder: Path, defaults: dict[str, Any]) -> Markup:
    config, summary = _read_json(folder / "config.json"), _read_json(folder / "summary.json")
    rows = _read_rows(folder / "stats.jsonl")
    evaluations = _read_rows(folder / "evaluations.jsonl")
    settings = {key: value for key, value in config.items() if key not in _NOT_SETTINGS}
    name = folder.resolve().name
    title, lead = _headline(settings, summary, rows)
    main = (
        element("p", "Run ", element("strong", name), cls="eyebrow"),
        element("h1", title),
        element("p", lead, cls="lead") if lead else "",
        *(element("p", text, cls="warning", role="note") for text in _warnings(settings, rows)),
        _key_numbers(summary, rows),
        _section("Samples", _picture(folder / "samples.png", "Samples", _caption_of_samples(settings))),
        *(_section(f"{kind.capitalize()} over time", strip) for kind, strip in _strips(folder)),
        _section("Training", _charts(rows), _picture_in_details(folder / "loss.png")),
        _section("Samples during training", _evaluation_charts(evaluations)),
        _section("Routing", *_routing(folder)),
        _section("Go on from here", _commands(folder, settings, defaults)),
        _section("Settings", _settings(settings, defaults)),
        _section("Environment", _environment(config.get("environment"))),
    )
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    head = (
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy",
                content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{name}: {title}"),
        element("style", Markup(Path(__file__).with_suffix(".css").read_text())),
    )  # fmt: skip
    footer = element("footer", f"Written {now} by switch_dit. The page is one file; it needs no network.")
    return element("html", element("head", *head), element("body", element("main", *main), footer), lang="en")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file such as stats.jsonl that are whole and have a step."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the run was killed while it wrote
            continue
        if isinstance(row, dict) and finite(row.get("step")):
            rows.append(row)
    return rows


def _section(title: str, *parts: Markup | str) -> Markup | str:
    """A section with a heading, or nothing where all of its parts are missing."""
    return element("section", element("h2", title), *parts) if any(parts) else ""


def _headline(
    settings: dict[str, Any], summary: dict[str, Any], rows: list[dict[str, Any]]
) -> tuple[str, str]:
    routing = settings.get("routing")
    model = _MODELS.get(routing, "a diffusion transformer") if isinstance(routing, str) else "a model"
    size = f" {settings['model']}" if "model" in settings else ""
    data = f" on {Path(str(settings['data']).split(':')[-1]).name}" if "data" in settings else ""
    steps = f", {rows[-1]['step']:,.0f} steps" if rows else ""
    title = f"{model[0].upper()}{model[1:]}{size}{data}{steps}"
    accuracy, real = summary.get("conditional_accuracy"), summary.get("classifier_accuracy")
    if not finite(accuracy):
        return title, ""
    lead = f"A small classifier reads {_share(accuracy)} of the generated images as the class asked for"
    return title, lead + (f", and {_share(real)} of real ones as theirs." if finite(real) else ".")


def _warnings(settings: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    said, wanted = [], settings.get("steps")
    if not rows:
        said.append("The run has logged nothing yet.")
    elif finite(wanted) and rows[-1]["step"] < wanted:
        said.append(f"The run has logged {rows[-1]['step']:,.0f} of {wanted:,.0f} steps; it can go on.")
    if any(isinstance(value, float) and not math.isfinite(value) for row in rows for value in row.values()):
        said.append("Some of the logged numbers are not finite; the curves leave them out.")
    return said


def _caption_of_samples(settings: dict[str, Any]) -> str:
    text = (
        "Drawn at the end, with the moving average of the weights. Where rows are numbered, each row is a "
        "class: its images should all show that class and still differ from one another."
    )
    if {"guidance", "sample_steps"} <= settings.keys():
        text += f" Guidance {settings['guidance']}, {settings['sample_steps']} DDIM steps."
    return text


ROUTING = {
    "routing": (
        "Use of experts",
        "Use of experts: each row is an expert and each column a timestep, from the clean image on the left "
        "to noise on the right; a bright row is an expert in use, a bar says at how many timesteps, and the "
        "lower half is what training pulls the upper one towards.",
    ),
    "routing-affinity": (
        "Affinity of timesteps",
        "Affinity of timesteps: a point is a pair of timesteps and its colour the share of experts that both "
        "use, so a bright square on the diagonal is a range of timesteps that are treated alike; the right "
        "half is what training pulls the left one towards.",
    ),
    "routing-entropy": (
        "Entropy of the gates",
        "Entropy of the gates: bright is a router that hardly tells its experts apart at that timestep, as a "
        "fresh one does, and dark is one that relies on a single expert.",
    ),
    "routing-distance": (
        "Distance to the diffusion prior",
        "Distance to the diffusion prior: the lower the curve, the nearer the routing is to the prior at "
        "that timestep; a routing that has learned nothing is at the dotted line, and the map shows which "
        "blocks add to the distance.",
    ),
}
"""What each picture of the routing is and how to read it, by the stem of its file."""
_MEANINGS = {
    "frechet_floor": "the Fréchet distance between two halves of the real images",
    "classifier_accuracy": "the share of real images that the classifier reads rightly",
    "generated": "images were drawn and measured",
    "mse": "the error of the predicted noise at the end",
    "vb": "the variational bound of the predicted variance at the end, in bits per dimension",
    "prior": "the distance of the routing from the diffusion prior at the end, in nats",
    "unreadable": "images could not be read, others of their class took their place",
}
_Form = Callable[[Any], str]


def _key_numbers(summary: dict[str, Any], rows: list[dict[str, Any]]) -> Markup | str:
    """A card for each number of the summary; those that explain another one stand beneath it."""
    left, cards = dict(summary), []
    speed = rows[-1].get("images_per_second") if rows else None
    speed = f", {_integer(speed)} images a second" if finite(speed) else ""

    def card(
        key: str, label: str, shown: _Form, note: str, *beneath: tuple[str, str, _Form], bar=False
    ) -> None:
        if key not in left:
            return
        value = left.pop(key)
        note += "".join(text.format(_or_not(left.pop(of), form)) for of, text, form in beneath if of in left)
        parts = [element("dt", label), element("dd", _or_not(value, shown), cls="number")]
        if bar and finite(value):
            inside = element("span", style=f"width:{100 * min(max(value, 0), 1):.1f}%")
            parts.append(element("dd", inside, cls="bar", aria_hidden="true"))
        cards.append(element("div", *parts, element("dd", note, cls="note") if note else "", cls="card"))

    card("conditional_accuracy", "Right class", _share, "of the generated images are read as asked for",
         ("classifier_accuracy", "; of real ones {}", _share), ("generated", ". {} were measured", _integer),
         bar=True)  # fmt: skip
    card("frechet_distance", "Fréchet distance", _number,
         "of generated to real images in the classifier's features; 0 is best",
         ("frechet_floor", ", two halves of the real ones give {}", _number))  # fmt: skip
    card("mind", "MIND", _number, "the sliced Wasserstein distance in the same features; 0 is best")
    card("out_of_range", "Cut-off pixels", _share, "of the pixel values lie beyond what a picture can show",
         bar=True)  # fmt: skip
    card("loss", "Loss", _number, "mean over the last tenth of training", ("mse", "; noise {}", _number),
         ("vb", ", its variance {}", _number), ("prior", ", routing {}", _number))  # fmt: skip
    card("training_seconds", "Training time", _duration, "since the run was last started" + speed)
    for key, value in list(left.items()):
        note = _MEANINGS.get(key, "")
        if isinstance(value, (list, dict)):
            note = ": ".join(text for text in (note, ", ".join(map(str, value))) if text)
            left[key] = len(value)
        card(key, key.replace("_", " ").capitalize(), _number, note)
    return element("dl", *cards, cls="cards") if cards else ""


def _png(path: Path) -> tuple[bytes, int, int] | None:
    """The bytes, width and height of a PNG; None where there is no whole one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or data[-8:-4] != b"IEND":
        return None
    return data, *struct.unpack(">II", data[16:24])


def _image(path: Path, alt: str) -> Markup | str:
    found = _png(path)
    if found is None:
        return ""
    data, width, height = found
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return element("img", src=source, alt=alt, width=width, height=height)


def _picture(path: Path, alt: str, caption: str) -> Markup | str:
    image = _image(path, f"{alt}: {caption}")
    return element("figure", image, element("figcaption", caption)) if image else ""


def _routing(folder: Path) -> list[Markup | str]:
    """What routing.json says in words, and the pictures of the routing with how to read them."""
    words = _read_json(folder / "routing.json").get("in_words")
    pictures = [_picture(folder / f"{name}.png", *told) for name, told in ROUTING.items()]
    said = element("p", words, cls="note") if isinstance(words, str) and any(pictures) else ""
    return [said, *pictures]


def _picture_in_details(path: Path) -> Markup | str:
    picture = _picture(path, "Loss curves", "Each point is the mean since the last one.")
    title = element("summary", f"The losses as a picture, {path.name}")
    return element("details", title, picture) if picture else ""


def _strips(folder: Path) -> Iterable[tuple[str, Markup]]:
    """The pictures pictures/step-N-KIND.png of each kind in the order of their steps."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.glob("pictures/step-*.png"):
        if match := re.fullmatch(r"step-(\d+)(?:-(.+))?\.png", path.name):
            kinds.setdefault(match[2] or "samples", []).append((int(match[1]), path))
    for kind, found in sorted(kinds.items()):
        found.sort()
        last, count = len(found) - 1, min(len(found), _STRIP)
        chosen = [found[round(i * last / max(count - 1, 1))] for i in range(count)]
        images = [(step, _image(path, f"{kind} at step {step:,}")) for step, path in chosen]
        figures = [
            element("figure", image, element("figcaption", f"step {step:,}"))
            for step, image in images
            if image
        ]
        if figures:
            text = f"Drawn during training, row by row. {len(figures)} of {len(found)} are shown."
            yield kind, element("div", *figures, cls="strip") + element("p", text, cls="note")


def _charts(rows: list[dict[str, Any]]) -> Markup | str:
    if not rows:
        return ""
    points, each = thinned(rows)
    drawn = [
        chart("Loss", "log scale", points, log=True, series=(
            Series("loss", "all"), Series("mse", "noise (mse)"), Series("vb", "its variance (vb)"))),
        chart("Diffusion prior loss", "nats", points, series=(Series("prior", "prior"),)),
        chart("Learning rate", "", points, series=(Series("lr", "lr"),)),
        chart("Speed", "images a second", points, series=(Series("images_per_second", "images/s"),)),
    ]  # fmt: skip
    drawn = [figure for figure in drawn if figure]
    if not drawn:
        return ""
    means = f" Each point is the mean of {each} of them." if each > 1 else ""
    keys = dict.fromkeys(key for point in points for key in point if key != "step")
    header = element("tr", *(element("th", key.replace("_", " "), scope="col") for key in ("step", *keys)))
    body = [
        element("tr", element("th", f"{point['step']:,.0f}", scope="row"),
                *(element("td", _or_not(point.get(key), _number)) for key in keys))
        for point in points
    ]  # fmt: skip
    table = element("table", element("thead", header), element("tbody", *body), cls="numbers")
    text = f"From {len(rows):,} lines of stats.jsonl.{means} Point at a curve to read its values."
    return join(
        element("p", text, cls="note"),
        element("div", *drawn, cls="charts"),
        element("details", element("summary", "The numbers as a table"), element("div", table, cls="scroll")),
    )


def _evaluation_charts(rows: list[dict[str, Any]]) -> Markup | str:
    """What --evaluate-every has measured, over steps."""
    drawn = [
        chart("Right class", "share of the generated images, and of real ones", rows, series=(
            Series("conditional_accuracy", "generated"), Series("classifier_accuracy", "real"))),
        chart("Fréchet distance", "0 is best", rows, series=(
            Series("frechet_distance", "to real images"), Series("frechet_floor", "among real images"))),
        chart("Sliced Wasserstein distance (MIND)", "0 is best", rows, series=(Series("mind", "mind"),)),
    ]  # fmt: skip
    drawn = [figure for figure in drawn if figure]
    text = "Samples of the moving average, measured every --evaluate-every steps."
    return element("p", text, cls="note") + element("div", *drawn, cls="charts") if drawn else ""


def _settings(settings: dict[str, Any], defaults: dict[str, Any]) -> Markup | str:
    if not settings:
        return ""
    changed = [key for key in settings if key in defaults and settings[key] != defaults[key]]
    rest = [key for key in settings if key not in changed]

    def row(key: str, *, differs: bool) -> Markup:
        cells = [element("th", key, scope="row"), element("td", _value(settings[key]))]
        if defaults:
            cells.append(element("td", _value(defaults[key]) if differs else "", cls="default"))
        return element("tr", *cells, cls="changed" if differs else "same")

    titles = ("Setting", "Value", "Default") if defaults else ("Setting", "Value")
    header = element("thead", element("tr", *(element("th", title, scope="col") for title in titles)))
    body = [row(key, differs=True) for key in changed] + [row(key, differs=False) for key in rest]
    text = f"{len(changed)} of {len(settings)} differ from the defaults; they come first."
    table = element("table", header, element("tbody", *body), cls="settings")
    return join(element("p", text, cls="note") if defaults else "", element("div", table, cls="scroll"))


def _environment(environment: Any) -> Markup | str:
    if not isinstance(environment, dict) or not environment:
        return ""
    pairs = (element("div", element("dt", key), element("dd", _value(v))) for key, v in environment.items())
    return element("dl", *pairs, cls="pairs")


def _commands(folder: Path, settings: dict[str, Any], defaults: dict[str, Any]) -> Markup | str:
    """The commands to go on, of the settings that differ from the defaults, and to draw samples."""
    if not settings or not defaults:
        return ""
    options = []
    for key, value in settings.items():
        if key in ("output", "name", "resume") or key not in defaults or value == defaults[key]:
            continue
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            options.append([f"--{flag}" if value else f"--no-{flag}"])
        else:
            options.append([f"--{flag}", str(value)])
    options += [["--output", str(folder.parent)], ["--name", folder.resolve().name]]
    shown = (
        ("Go on where the run was interrupted:", [["python", "models/train_switch_dit.py"], *options]),
        ("Draw more samples:", [["python", "models/sample_switch_dit.py"], ["--run", str(folder)]]),
    )  # fmt: skip
    parts = []
    for text, command in shown:
        spans = [element("span", shlex.join(words)) for words in command]  # a line breaks between them
        parts += [element("p", text), element("pre", element("code", join(*spans, between=" ")))]
    return join(*parts)


def _or_not(value: Any, shown: Callable[[Any], str]) -> str:
    """A number in its form, and anything else as it is."""
    if finite(value):
        return shown(value)
    return "not finite" if isinstance(value, float) else _value(value)


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _integer(value: float) -> str:
    return f"{value:,.0f}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value or "(empty)"
    return "none" if value is None else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    return f"{minutes} min" if minutes < 60 else f"{hours} h {round(seconds / 60 - 60 * hours)} min"
