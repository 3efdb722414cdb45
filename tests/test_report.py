"""README, docs and figures show the committed results, and every result says where it comes from."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("jsonschema", "matplotlib", "rich"):  # a GPU machine may lack them
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402
import headlines  # noqa: E402
import report  # noqa: E402
from headlines import HEADLINES  # noqa: E402

SOURCE = {
    "machine": "CPU Toy, 1 cores",
    "driver": None,
    "cuda": None,
    "torch": "2.13.0",
    "triton": None,
    "python": "3.12.1",
    "accumkern": "0.1.0",
    "backends": ["cpu", "eager"],
    "cpu_threads": 1,
    "environment": {"OMP_NUM_THREADS": "1"},
    "commit": "a" * 40,
    "uncommitted_changes": False,
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python benchmarks/bench_accuracy.py",
}
RESULT = {
    "accumulator": "split24",
    "mean_over_std": 3.0,
    "micro_batches": 8,
    "error_of_sum": 1e-9,
    "error_of_grad": 2e-3,
}


def put(folder: Path, machine_folder: str, content: Any, name: str = "accuracy.json") -> None:
    (folder / machine_folder).mkdir(parents=True, exist_ok=True)
    (folder / machine_folder / name).write_text(json.dumps(content))


def content(**source: Any) -> dict[str, Any]:
    return copy.deepcopy({"provenance": SOURCE | source, "method": {"how": "by hand"}, "results": [RESULT]})


def test_readme_docs_and_figures_show_the_committed_results() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_every_result_was_measured_on_a_commit() -> None:
    results = report.load_results()
    assert results
    for benchmarks in results.values():
        for of_benchmark in benchmarks.values():
            assert of_benchmark["provenance"]["uncommitted_changes"] is False
            assert "--quick" not in of_benchmark["provenance"]["command"]
            assert "--results" not in of_benchmark["provenance"]["command"]  # a path of the machine


@pytest.mark.parametrize("missing", sorted(SOURCE))
def test_a_result_without_provenance_is_refused(missing: str, tmp_path: Path) -> None:
    lacking = content()
    del lacking["provenance"][missing]
    put(tmp_path, "cpu-toy-1-cores", lacking)
    with pytest.raises(ValueError, match=rf"accuracy.json breaks schemas/file.json at \$.provenance: '{missing}'"):
        report.load_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("method"), "'method' is a required property"),
        (lambda c: c["results"].clear(), r"file.json at \$.results"),
        (lambda c: c["results"][0].pop("error_of_sum"), r"results\[0\] breaks schemas/accuracy.json at \$: 'error_of"),
        (lambda c: c["results"][0].update(micro_batches=0), r"schemas/accuracy.json at \$.micro_batches"),
        (lambda c: c["results"][0].update(speed=1), "'speed' was unexpected"),
        (lambda c: c["provenance"].update(commit="unknown"), r"at \$.provenance.commit"),
        (lambda c: c["provenance"].update(machine="CPU Other"), "belongs in cpu-other/"),
    ],
    ids=["no method", "no results", "field missing", "value wrong", "field unknown", "no commit", "folder wrong"],
)
def test_a_result_that_breaks_its_schema_is_refused(change: Any, match: str, tmp_path: Path) -> None:
    broken = content()
    change(broken)
    put(tmp_path, "cpu-toy-1-cores", broken)
    with pytest.raises(ValueError, match=match):
        report.load_results(tmp_path)


def test_a_file_of_no_benchmark_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "cpu-toy-1-cores", content(), name="speed.json")
    with pytest.raises(ValueError, match=r"cpu-toy-1-cores/speed.json is of no benchmark; there are kernels"):
        report.load_results(tmp_path)


def test_every_schema_is_one() -> None:
    for path in report.SCHEMAS.glob("*.json"):
        report.Draft202012Validator.check_schema(json.loads(path.read_text()))


def test_without_a_gpu_result_the_texts_say_not_measured() -> None:
    results = report.load_results()
    has_gpu = any(folder.startswith("nvidia") for folder in results)
    for text in (report.readme_block(results, set()), report.document(results, set())):
        assert (report.NOT_MEASURED in text) == (not has_gpu)


def test_several_machines_stand_one_after_the_other_gpus_first(tmp_path: Path) -> None:
    put(tmp_path, "cpu-toy-1-cores", content())
    put(tmp_path, "nvidia-toy", content(machine="NVIDIA Toy", driver="1", cuda="13.0", torch="2.14.0"))
    results = report.load_results(tmp_path)
    assert list(results) == ["nvidia-toy", "cpu-toy-1-cores"]
    readme, document = report.readme_block(results, set()), report.document(results, set())
    for text in (readme, document):
        first = text.index("**NVIDIA Toy**, torch 2.14.0, 2026-01-02")
        assert first < text.index("**CPU Toy, 1 cores**, torch 2.13.0")
        assert report.NOT_MEASURED not in text
    assert "|  | NVIDIA Toy | CPU Toy, 1 cores |" in readme
    assert document.index("## NVIDIA Toy") < document.index("## CPU Toy, 1 cores")
    assert document.count("| split24 | 1e-09 |") == 4  # in short and in full
    assert document.count("Not measured on this machine: One fold of a gradient; ") == 2


def test_the_readme_says_what_was_not_measured(tmp_path: Path) -> None:
    put(tmp_path, "nvidia-toy", content(machine="NVIDIA Toy"))
    results = report.load_results(tmp_path)
    readme = report.readme_block(results, set())
    lines = [line for line in readme.splitlines() if line.startswith("| **")]
    assert len(lines) == len(HEADLINES) == 6
    assert all(line.endswith("| not measured |") for line in lines)


def step_result(**changes: Any) -> dict[str, Any]:
    ratio = {"median": 0.5, "low": 0.4, "high": 0.6, "confidence": 0.95, "n": 9}
    kinds = ("weights", "masters", "gradients", "residuals", "optimizer_state", "bucket")
    return {
        "numel": 100,
        "tensors": 4,
        "design": "split24_masters",
        "label": "accumkern split24 + masters",
        "bucket_bytes": None,
        "end": "step",
        "copy_gb_per_s": 9.0,
        "median_ms": 1.0,
        "p20_ms": 1.0,
        "p80_ms": 1.0,
        "n": 9,
        "held_bytes": dict(zip(kinds, (200, 200, 200, 100, 800, 0), strict=True)),
        "peak_bytes": 0,
        "over_fp32_masters": ratio,
    } | changes


def test_headlines_answer_from_the_files() -> None:
    method = {"backend": "cpu"}
    kernel = {"case": "2^10", "tensors": 1, "numel": 1024}
    fold = [
        {**kernel, "variant": "split24 cpu", "median_ms": 2.0},
        {**kernel, "variant": "fp32.add_(bf16)", "median_ms": 7.0},
        {**kernel, "variant": "fp32.add_(bf16.float())", "median_ms": 6.0},
        {**kernel, "variant": "torch.compile(fp32 += bf16)", "error": "OOM"},
        {**kernel, "case": "2^9", "numel": 512, "variant": "fp32.add_(bf16)", "median_ms": 100.0},
    ]
    assert headlines.fold({"method": method, "results": fold}) == "**3.00 times** as fast (2^10 elements)"
    assert headlines.fold({"method": method, "results": fold[1:]}) is None
    loss = {"design": "stock_bf16", "learning_rate": 0.1, "micro_batches": 8, "median_loss": 2.5}
    said = "learning rate 0.1: stock bf16 2.500, split24 sums alone not measured, "
    answer = headlines.loss({"results": [loss, {**loss, "micro_batches": 64, "median_loss": 9.0}]})
    assert answer is not None
    assert answer.startswith(said)
    answer = headlines.loss({"results": [{**loss, "parameters": 28_844_544}]})
    assert answer is not None
    assert answer.startswith(f"28.8 million weights, {said}")
    steps = [step_result(), step_result(tensors=1), step_result(bucket_bytes=8), step_result(end="mean, step")]
    assert headlines.step({"results": steps}) == "0.50 for weights in 4 tensors, 0.50 for weights in 1 tensor"
    assert headlines.step({"results": [step_result(design="other")]}) is None
    for faster, name in (("split24_masters", "finish()"), ("split24_masters_deferred", "finish(defer=True)")):
        ratio = {**step_result()["over_fp32_masters"], "median": 0.7}
        found = [
            step_result(design=design, end="mean, clip, step", median_ms=1.0 if design == faster else 2.0)
            for design in ("split24_masters", "split24_masters_deferred", "split24_masters24")
        ]
        found[2]["median_ms"] = 0.1  # other masters are another thing
        next(r for r in found if r["design"] == faster)["over_fp32_masters"] = ratio
        said = f"0.50 for weights in 4 tensors; with mean and clipping by `{name}` 0.70"
        assert headlines.step({"results": [step_result(), *found]}) == said
    training = {
        "regime": "launch",
        "design": "split24",
        "micro_batch_over": {"stock_bf16": {"median": 1.2, "low": 1.1, "high": 1.3}},
    }
    said = "large micro-batches not measured, tiny ones 1.200 (1.100-1.300)"
    assert headlines.training_time({"results": [training]}) == said
    tiny = {"model": "training", "variant": "cpu", "stretch": "micro-batch", "clock": "host"}
    tiny_over = [
        {**tiny, "over": {"stock": {"median": 1.4, "low": 1.3, "high": 1.5}}},
        {**tiny, "stretch": "window", "over": {"stock": {"median": 9.0, "low": 9.0, "high": 9.0}}},
        {**tiny, "variant": "other", "over": {"stock": {"median": 9.0, "low": 9.0, "high": 9.0}}},
        {"model": "bare", "variant": "cpu"},
    ]
    overhead = {"method": method, "results": tiny_over}
    assert headlines.training_time({"results": [training]}, overhead) == said  # its own is the first
    paired = {**training, "regime": "paired"}
    answer = headlines.training_time({"results": [paired]}, overhead)
    assert answer == "large micro-batches 1.200 (1.100-1.300), tiny ones 1.400 (1.300-1.500)"
    on_gpu = {**tiny, "clock": "done", "over": {"stock": {"median": 1.7, "low": 1.6, "high": 1.8}}}
    answer = headlines.training_time(None, {"method": method, "results": [*tiny_over, on_gpu]})
    assert answer == "large micro-batches not measured, tiny ones 1.700 (1.600-1.800)"
    assert headlines.training_time(None, {"method": method, "results": tiny_over[3:]}) is None
    assert headlines.training_memory({"results": [training]}) is None
    assert headlines.training_window({"results": [training]}) is None
    over = {"stock_fp32_masters": {"median": 0.9, "low": 0.8, "high": 1.0}}
    window = {**training, "regime": "compute", "design": "split24_masters", "window_over": over}
    assert headlines.training_window({"results": [training, window]}) == "0.900 (0.800-1.000)"


# ---- notes on files of an older commit ---------------------------------------------------------------------------


def test_a_note_is_shown_and_renames_what_was_called_otherwise(tmp_path: Path) -> None:
    put(tmp_path, "cpu-toy-1-cores", content())
    old = {**content(), "results": [step_result()]}
    put(tmp_path, "cpu-toy-1-cores", old, name="step.json")
    names = {"split24_masters": {"design": "copies", "label": "accumkern split24 + copies"}}
    notes = {"a" * 40: {"step": {"note": "the step was another", "designs": names}}}
    (tmp_path / "notes.json").write_text(json.dumps(notes))
    results = report.load_results(tmp_path)
    (found,) = results["cpu-toy-1-cores"]["step"]["results"]
    assert found == step_result(design="copies", label="accumkern split24 + copies")
    assert "note" not in results["cpu-toy-1-cores"]["accuracy"]
    readme, document = report.readme_block(results, set()), report.document(results, set())
    assert "an older one ([what has changed](docs/benchmarks.md#cpu-toy-1-cores))" in " ".join(readme.split())
    assert "an older one. What has changed since:\n\n*The step*: the step was another\n" in document
    assert "accumkern split24 + copies" in document
    assert "+ masters |" not in "".join(line for line in document.splitlines() if line.startswith("| **"))


@pytest.mark.parametrize(
    ("notes", "match"),
    [
        ({"b" * 40: {"accuracy": {"note": "x"}}}, "a note on accuracy of commit bbbbbbbbb, of which there is no file"),
        ({"a" * 40: {"kernels": {"note": "x"}}}, "a note on kernels of commit aaaaaaaaa, of which there is no file"),
        ({"a" * 40: {"accuracy": {"text": "x"}}}, "notes.json breaks schemas/notes.json"),
    ],
    ids=["other commit", "other benchmark", "no note"],
)
def test_a_note_of_no_file_is_refused(notes: Any, match: str, tmp_path: Path) -> None:
    put(tmp_path, "cpu-toy-1-cores", content())
    (tmp_path / "notes.json").write_text(json.dumps(notes))
    with pytest.raises(ValueError, match=match):
        report.load_results(tmp_path)


# ---- the figure of bytes -----------------------------------------------------------------------------------------


def test_the_figure_of_bytes_shows_every_design_of_the_file() -> None:
    results = [
        step_result(),
        step_result(end="mean, step", held_bytes=dict.fromkeys(step_result()["held_bytes"], 9)),  # another end
        step_result(design="of tomorrow", label="of tomorrow", end="mean, step"),  # its first end is another
        step_result(design="one", label="in one tensor", tensors=1),
        step_result(design="bucket", label="with a bucket", bucket_bytes=8),
        {"design": "broken", "label": "broken", "end": "step", "tensors": 4, "bucket_bytes": None, "error": "OOM"},
    ]
    figure = figures.step_memory("a machine", {"results": results})
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["accumkern split24 + masters", "of tomorrow"]
    assert [text.get_text() for text in axes.texts if text.get_weight() == "bold"] == ["15", "15"]
    assert figures.step_memory("a machine", {"results": results[-1:]}) is None


def test_what_does_not_show_the_results_is_found(tmp_path: Path) -> None:
    put(tmp_path / "results", "cpu-toy-1-cores", content())
    results = report.load_results(tmp_path / "results")
    readme, of_ranks = tmp_path / "README.md", tmp_path / "docs" / "distributed.md"
    of_ranks.parent.mkdir()
    for page in (readme, of_ranks):
        page.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    figure = "docs/figures/benchmarks/cpu-toy-1-cores-error.png"
    stale = [figure, "README.md", "docs/distributed.md", "docs/benchmarks.md"]
    assert report.differences(results, tmp_path) == stale
    report.write(results, tmp_path)
    assert report.differences(results, tmp_path) == []
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")

    changed = copy.deepcopy(results)
    changed["cpu-toy-1-cores"]["accuracy"]["results"][0]["error_of_sum"] = 1e-7
    assert report.differences(changed, tmp_path) == [figure, "docs/benchmarks.md"]
    edited = readme.read_text().replace("not measured", "fast")
    readme.write_text(edited)
    assert report.differences(results, tmp_path) == ["README.md"]

    left_over = tmp_path / "docs" / "figures" / "benchmarks" / "other-error.png"
    left_over.write_bytes(b"")
    assert str(left_over.relative_to(tmp_path)) in report.differences(results, tmp_path)
    report.write(results, tmp_path)
    assert not left_over.exists()
    assert report.differences(results, tmp_path) == []
