"""What people look at: the command line, JSON and CSV, figures, and the page in a real browser."""

import base64
import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("jinja2")

from matplotlib.figure import Figure  # noqa: E402
from planned import old_objects_aside  # noqa: E402, F401

from accumkern.__main__ import main  # noqa: E402
from accumkern.planning import speed  # noqa: E402
from accumkern.planning.report import plan_figures, sweep_figures, write_page  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")

SCRIPT = """
    import torch
    from torch import nn
    from accumkern.planning.protocol import Setup

    def setup():
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1)).to(torch.bfloat16)
        return Setup(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            lambda size: torch.randn(size, 16, dtype=torch.bfloat16),
            lambda model, batch: (model(batch).float()[:, 0] - batch.float().sum(-1)).square().mean(),
            tokens_per_sample=16,
        )

    def raising():
        return 1 / 0

    def refused():
        made = setup()
        group = {"params": list(made.model.parameters()), "gradient_release": True}
        return made._replace(optimizer=torch.optim.SGD([group], lr=1e-2))

    def wrong_shapes():
        return setup()._replace(make_batch=lambda size: torch.randn(size, 15, dtype=torch.bfloat16))

    def learning_nothing():
        made = setup()
        made.optimizer.param_groups[0]["lr"] = 0.0
        return made
"""


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LEAST_SECONDS", 0.01)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


@dataclass
class Results:
    """A folder with the results of a plan and of a sweep, and what was printed."""

    folder: Path
    plan_out: str
    plan_err: str
    sweep_out: str
    sweep_err: str


@pytest.fixture(scope="module")
def results(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("results")
    plan = ["plan", f"{script}:setup", "--effective-batch", "48", "--largest-micro-batch", "8", "--noise-windows", "8"]
    sweep = sweep_command(script, "setup", "4,16,64", "--rules", "none,sqrt,linear", "--seeds", "0,1")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "LEAST_SECONDS", 0.01)
        for command in ([*plan, "--memory", "10MB"], [*sweep, "--target-loss", "8"]):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                assert main([*command, "--output", str(folder)]) == 0
            printed += [out.getvalue(), err.getvalue()]
    return Results(folder, *printed)


@pytest.fixture
def folder(results: Results) -> Path:
    return results.folder


def sweep_command(script: Path, function: str, batches: str, *more: str) -> list[str]:
    command = ["sweep", f"{script}:{function}", "--effective-batches", batches, "--samples", "256"]
    return [*command, "--micro-batch", "16", "--evaluations", "8", "--validation-samples", "32", *more]


# ---- the command line --------------------------------------------------------------------------------------------


def test_plan_prints_a_table_and_reasons(results: Results) -> None:
    assert "effective batch" in results.plan_out
    assert re.search(r"^ +8 +\d+ +\d+ +48 ", results.plan_out, re.MULTILINE)  # eight ranks
    for head in ("What fits:", "What is fast:", "Effective batch:", "What helps training:", "Accumulation:"):
        assert head in results.plan_out
    assert "Master weights: 'split32', because" in " ".join(results.plan_out.split())
    line = r"^accumkern.attach\(optimizer, 'split24', master_weights='split32', average_over=\d+\)$"
    assert re.search(line, results.plan_out, re.MULTILINE)
    assert "tokens/s" in results.plan_out
    assert results.plan_out.startswith("measured on: CPU, 1 thread\n")
    settings = " ".join(results.plan_out.partition("\nWhat to set: micro-batch ")[2].split())
    assert re.match(r"\d+, accumulation steps \d+, ranks 1: effective batch 48 accumkern.attach\(", settings)
    assert "• Learning rate: that of your recipe for an effective batch of 48" in settings
    assert settings.endswith("with batches of 48 (docs/any-batch.md).")
    assert "this is a plan for this machine's CPU with 10 MB" in " ".join(results.plan_out.split())
    assert "what fits: micro-batch 8:" in results.plan_err


def test_json_is_all_that_goes_to_stdout(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{script}:setup", "--predict", "--memory", "1GB", "--effective-batch", "64", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["choice"]["effective_batch"] == 64
    assert plan["fit"] is None
    assert plan["predictions"][0]["memory"]["total"] <= 0.9e9
    assert plan["machine"]["device"] == "none: predicted for a GPU on fake tensors"


@pytest.mark.parametrize(
    ("asked", "function", "master_weights", "reason"),
    [
        ("auto", "setup", "split32", "Master weights: 'split32', because"),
        ("split24", "setup", "split24", "Master weights: 'split24', because"),
        ("none", "setup", None, "Master weights: none were asked for"),
        ("auto", "refused", None, "SGD cannot step FP32 weights: gradient_release is on"),
    ],
)
def test_master_weights_are_an_option(
    script: Path,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    function: str,
    master_weights: str | None,
    reason: str,
) -> None:
    command = [
        "plan",
        f"{script}:{function}",
        "--predict",
        "--device",
        "cpu",
        "--memory",
        "1MB",
        "--effective-batch",
        "64",
    ]
    assert main([*command, "--master-weights", asked, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["master_weights"] == master_weights
    assert any(reason in text for text in plan["reasons"])
    numel = 16 * 64 + 64 + 64 + 1
    each = {"split24": 1, "split32": 2, None: 0}[master_weights]
    assert plan["predictions"][0]["memory"]["master_residuals"] == each * numel
    assert plan["bfloat16_numel"] == numel
    line = f"accumkern.attach(optimizer, 'split24', master_weights={master_weights!r}"
    assert (plan["attach_line"] or "").startswith(line) == (master_weights is not None)
    assert plan["attach"] == (plan["attach_line"] is not None)


def test_sweep_prints_a_table_and_fails_where_nothing_was_learnt(
    results: Results, script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "tokens to" in results.sweep_out
    assert "Fastest to the loss 8:" in results.sweep_out
    assert "batch 64, sqrt, seed 0: finished: last loss" in results.sweep_err
    assert "All runs stepped FP32 master weights" in results.sweep_out
    assert main([*sweep_command(script, "learning_nothing", "64"), "--output", str(tmp_path)]) == 1
    assert "Nothing was learnt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "{script}:raising"], "accumkern plan: setup() raised ZeroDivisionError: division by zero"),
        (["plan", "{script}:raising"], "script.py:17: return 1 / 0"),
        (["plan", "{script}:refused", "--master-weights", "split32"], "is 'split32', and SGD cannot step FP32 weights"),
        (["plan", "{script}:wrong_shapes"], "loss of setup() raised RuntimeError: mat1 and mat2 shapes cannot be"),
        (["plan", "{script}:wrong_shapes"], "script.py:12: lambda model, batch: (model(batch)"),
        (["plan", "{script}:none"], "script.py has no 'none'; name a function that returns model, optimizer"),
        (["plan", "{script}"], "it must be a script and a name in it"),
        (["plan", "nowhere.py:setup"], "there is no script 'nowhere.py'"),
        (["plan", "{script}:setup", "--memory", "1kB"], "less than what the model and its optimizer hold"),
        (["plan", "{script}:setup", "--memory", "12 kB"], "no micro-batch fits"),
        (["plan", "{script}:setup", "--predict", "--memory", "5kB"], "no micro-batch would fit into 5 kB"),
    ],
)
def test_errors_are_messages(
    script: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(script=script) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert message in " ".join(err.split())
    assert out == ""
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_written_is_named_at_once(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{script}:setup", "--output", str(script / "out")]) == 2
    err = capsys.readouterr().err
    assert "Not a directory" in err
    assert "what fits" not in err
    assert "raised at" not in err


def test_an_error_in_the_script_is_located(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{script}:raising"]) == 2
    assert "return 1 / 0" in capsys.readouterr().err


LIBRARIES = ("rich", "matplotlib", "jinja2")
WITHOUT = f"""
    import json, sys
    sys.modules.update(dict.fromkeys({LIBRARIES}))  # None: not to be found
    from accumkern.__main__ import main
    statuses = {{"doctor": main(["doctor"])}}
    for missing in {LIBRARIES}:
        print("without", missing, file=sys.stderr)
        for name in {LIBRARIES}:
            sys.modules.pop(name, None)
        sys.modules[missing] = None
        statuses[missing] = main(sys.argv[1:])
        for name in [name for name in sys.modules if name.startswith("accumkern.planning")]:
            del sys.modules[name]
    print(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def without(script: Path) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return the exit status of doctor without any of the libraries, and of plan without each, and what plan said."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT), "plan", f"{script}:setup"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    parts = [part.splitlines() for part in done.stderr.split("without ")[1:]]
    return json.loads(done.stdout.splitlines()[-1]), {lines[0]: lines[1:] for lines in parts}


@pytest.mark.parametrize("missing", LIBRARIES)
def test_what_is_missing_is_named_and_doctor_works_without(
    without: tuple[dict[str, int], dict[str, list[str]]], missing: str
) -> None:
    statuses, said = without
    assert statuses["doctor"] == 0
    assert statuses[missing] == 2
    assert said[missing][-1] == f"accumkern plan needs {missing}: pip install 'accumkern[plan]'"


# ---- files -------------------------------------------------------------------------------------------------------


def test_a_folder_holds_every_form(folder: Path) -> None:
    names = {"plan.json", "plan.csv", "results.json", "results.csv", "report.html", "sweep.json"}
    names |= {"memory.png", "throughput.png", "batches.png", "loss-by-samples.png", "loss-by-time.png"}
    assert names <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob(".*"))  # nothing half written
    with (folder / "plan.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    plan = json.loads((folder / "plan.json").read_text())
    assert {1, 2, 4, 8} <= {int(row["micro_batch"]) for row in rows}
    assert {row["predicted_master_residuals_bytes"] for row in rows} - {""} == {str(2 * (16 * 64 + 64 + 64 + 1))}
    for row in rows:
        if row["predicted_total_bytes"] and row["measured_peak_bytes"]:
            assert int(row["predicted_total_bytes"]) <= int(row["measured_peak_bytes"])
    assert float(rows[0]["samples_per_second"]) == pytest.approx(1 / plan["speeds"][0]["seconds"])
    with (folder / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["effective_batch"], row["rule"]) for row in rows] == [
        ("4", "none"),
        *((batch, rule) for batch in ("16", "64") for rule in ("linear", "none", "sqrt")),
    ]
    assert {row["runs"] for row in rows} == {"2"}


def overlaps(figure: Figure) -> list[str]:
    """Return texts of a figure that lie over one another or outside of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = []
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, axes._left_title]  # type: ignore[attr-defined]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        if axes.get_legend():
            texts += axes.get_legend().get_texts()
    for legend in figure.legends:
        texts += legend.get_texts()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    whole = figure.bbox
    outside = [f"{name} is outside" for name, box in boxes if not (box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1)]
    return outside + [
        f"{a} and {b}"
        for i, (a, box) in enumerate(boxes)
        for b, other in boxes[i + 1 :]
        if min(box.x1, other.x1) - max(box.x0, other.x0) > 1 and min(box.y1, other.y1) - max(box.y0, other.y0) > 1
    ]


def test_no_text_of_a_figure_lies_over_another(folder: Path) -> None:
    plan, sweep = (json.loads((folder / name).read_text()) for name in ("plan.json", "results.json"))
    figures = plan_figures(plan) | sweep_figures(sweep)
    assert set(figures) == {"memory", "throughput", "batches", "loss-by-samples", "loss-by-time"}
    for name, figure in figures.items():
        assert overlaps(figure) == [], name
        for axes in figure.axes:
            assert axes.get_xlabel(), name
            assert axes.get_ylabel(), name


def test_figures_of_a_plan_without_measurements(script: Path, tmp_path: Path) -> None:
    command = ["plan", f"{script}:setup", "--predict", "--device", "cpu", "--memory", "40kB"]
    assert main([*command, "--effective-batch", "4096", "--output", str(tmp_path)]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    figures = plan_figures(plan)
    assert list(figures) == ["memory"]
    assert overlaps(figures["memory"]) == []
    plan["predictions"] = []
    plan["fit"] = {"trials": [{"micro_batch": 1, "fits": True, "peak_bytes": 20000}]}
    assert overlaps(plan_figures(plan)["memory"]) == []


class Page(HTMLParser):
    """What a page refers to, and its images."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images: dict[str, bytes] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag == "img":
            self.images[str(found["id"])] = base64.b64decode(str(found["src"]).removeprefix("data:image/png;base64,"))
        assert tag not in ("script", "link", "iframe")


def test_the_page_holds_everything_itself(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"url\(|@import|https?://", text)
    assert list(page.images) == ["memory", "batches", "throughput", "loss-by-samples", "loss-by-time"]
    for name, content in page.images.items():
        assert content == (folder / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")


def test_the_page_and_its_bars_have_master_weights(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    page = (folder / "report.html").read_text()
    assert f"<pre>{plan['attach_line'].replace(chr(39), '&#39;')}</pre>" in page
    settings = re.search(r'<ul id="settings">(.*?)</ul>', page, re.DOTALL)
    assert settings is not None
    assert settings[1].count("<li>") == len(plan["settings"]) == 4
    assert '<p class="sub">measured on: CPU, 1 thread</p>' in page
    assert "<li><b>Master weights:</b> &#39;split32&#39;, because without them" in page
    (axes,) = plan_figures(plan)["memory"].axes
    labels = [text.get_text() for legend in axes.figure.legends for text in legend.get_texts()]  # type: ignore[union-attr]
    assert "master residuals" in labels


def test_what_a_page_quotes_is_escaped(folder: Path, tmp_path: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["warnings"] = ["<script>alert(1)</script> & more"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    text = write_page(tmp_path).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
PROBE = """<script>
  window.addEventListener("load", () => {
    const images = [...document.images].map(i => [i.id, i.naturalWidth, Math.round(i.getBoundingClientRect().width)]);
    const cells = [...document.querySelectorAll("td, th, li, .number b")];
    const text = {
      images, cut: cells.filter(e => e.scrollWidth > e.clientWidth + 1).length,
      wide: document.documentElement.scrollWidth - window.innerWidth,
      microBatch: document.getElementById("micro-batch").innerText,
      reasons: document.querySelectorAll("#reasons li").length,
      findings: document.querySelectorAll("#findings li").length,
      loaded: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
    };
    document.body.innerHTML = "<pre id=probe>" + JSON.stringify(text) + "</pre>";
  });
</script></body>"""


def browse(*arguments: str, profile: Path) -> str:
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={profile}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_browser
@pytest.mark.parametrize("width", [1200, 600])
def test_the_page_in_a_browser(folder: Path, tmp_path: Path, width: int) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text((folder / "report.html").read_text().replace("</body>", PROBE))
    dom = browse("--dump-dom", f"--window-size={width},1600", probed.as_uri(), profile=tmp_path / "profile")
    found = re.search(r"<pre id=\"probe\">(.*?)</pre>", dom)
    assert found is not None, dom[-2000:]
    probe: dict[str, Any] = json.loads(found[1])
    plan = json.loads((folder / "plan.json").read_text())
    assert [image[0] for image in probe["images"]] == [
        "memory",
        "batches",
        "throughput",
        "loss-by-samples",
        "loss-by-time",
    ]
    assert all(natural > 900 and 300 < shown <= natural for _, natural, shown in probe["images"])
    assert probe["wide"] <= 0  # nothing to scroll sideways
    assert probe["cut"] == 0
    assert probe["loaded"] == 0
    assert probe["microBatch"] == str(plan["choice"]["micro_batch"])
    assert probe["reasons"] == len(plan["reasons"])
    assert probe["findings"] >= 2


@needs_browser
def test_a_screenshot_of_the_page_is_not_blank(folder: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    page = (folder / "report.html").as_uri()
    browse(f"--screenshot={shot}", "--window-size=1200,3000", "--hide-scrollbars", page, profile=tmp_path / "profile")
    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (3000, 1200)
    for part in range(0, 2400, 400):
        assert pixels[part : part + 400].std() > 0.02
