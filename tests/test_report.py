"""The README shows the committed results, and every result says where it comes from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402


def test_readme_shows_the_committed_results() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_every_result_says_where_it_comes_from() -> None:
    results = report.load_results()
    assert results
    for benchmarks in results.values():
        for content in benchmarks.values():
            assert content["provenance"]["uncommitted_changes"] is False


def test_a_result_without_provenance_is_refused(tmp_path: Path) -> None:
    (tmp_path / "machine").mkdir()
    path = tmp_path / "machine" / "kernels.json"
    path.write_text(json.dumps({"provenance": {"machine": "m"}, "method": {"how": "so"}, "results": [{}]}))
    with pytest.raises(ValueError, match=r"machine/kernels.json breaks schemas/file.json at \$.provenance"):
        report.load_results(tmp_path)


def test_without_a_gpu_result_the_readme_says_not_measured() -> None:
    results = report.load_results()
    has_gpu = any(folder.startswith("nvidia") for folder in results)
    for text in (report.readme_block(results, set()), report.document(results, set())):
        assert ("On a GPU: not measured." in text) == (not has_gpu)
