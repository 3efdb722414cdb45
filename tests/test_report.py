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

import report  # noqa: E402

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
    assert readme.index("**NVIDIA Toy**, torch 2.14.0, 2026-01-02") < readme.index("**CPU Toy, 1 cores**, torch 2.13.0")
    assert document.index("## NVIDIA Toy") < document.index("## CPU Toy, 1 cores")
    assert report.NOT_MEASURED not in readme + document
    assert document.count("| split24 | 1e-09 |") == readme.count("| split24 | 1e-09 |") == 2


def test_what_does_not_show_the_results_is_found(tmp_path: Path) -> None:
    put(tmp_path / "results", "cpu-toy-1-cores", content())
    results = report.load_results(tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    figure = "docs/figures/benchmarks/cpu-toy-1-cores-error.png"
    assert report.differences(results, tmp_path) == [figure, "README.md", "docs/benchmarks.md"]
    report.write(results, tmp_path)
    assert report.differences(results, tmp_path) == []
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")

    changed = copy.deepcopy(results)
    changed["cpu-toy-1-cores"]["accuracy"]["results"][0]["error_of_sum"] = 1e-7
    assert report.differences(changed, tmp_path) == [figure, "README.md", "docs/benchmarks.md"]
    edited = readme.read_text().replace("1e-09", "1e-10")
    readme.write_text(edited)
    assert report.differences(results, tmp_path) == ["README.md"]

    left_over = tmp_path / "docs" / "figures" / "benchmarks" / "other-error.png"
    left_over.write_bytes(b"")
    assert str(left_over.relative_to(tmp_path)) in report.differences(results, tmp_path)
    report.write(results, tmp_path)
    assert not left_over.exists()
    assert report.differences(results, tmp_path) == []
