"""The compatibility matrix is what the marked tests have shown, for every marked feature."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import compatibility

TESTS = Path(__file__).resolve().parent


def line(feature: str, tests: int = 1, **changes: Any) -> dict[str, Any]:
    return {**compatibility.new_line(feature), "tests": tests, **changes}


def test_the_page_shows_the_record() -> None:
    assert compatibility.PAGE.read_text() == compatibility.page(compatibility.load())


def test_every_marked_feature_has_a_line_and_every_line_a_test() -> None:
    marked = set()
    for path in TESTS.rglob("test_*.py"):
        marked |= set(re.findall(r'mark\.integration\(\s*"([^"]+)"', path.read_text()))
    assert marked == {line["feature"] for line in compatibility.load()}


def test_every_feature_was_run_with_the_versions_that_ci_installs() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (compatibility.ROOT / "constraints.txt").read_text(), re.MULTILINE))
    by_feature: dict[str, list[dict[str, Any]]] = {}
    for entry in compatibility.load():
        by_feature.setdefault(entry["feature"], []).append(entry)
    for feature, entries in by_feature.items():
        if all(entry["result"] == "not run" for entry in entries):
            continue
        library = entries[0]["library"]
        assert library in pins, f"{feature}: {library} is not pinned in constraints.txt"
        tested = {(entry["version"], entry["torch"]) for entry in entries if entry["result"] != "not run"}
        assert (pins[library], pins["torch"]) in tested, f"{feature} was run with {tested}; run it again"


def test_new_results_replace_those_of_the_same_versions_only() -> None:
    old, other = line("A", tests=1), line("A", tests=7, torch="1.0.0")
    merged = compatibility.merge([old, other], [line("A", tests=3)])
    assert [(entry["torch"], entry["tests"]) for entry in merged] == [
        ("1.0.0", 7),
        (importlib.metadata.version("torch").partition("+")[0], 3),
    ]


def test_skipped_features_say_so_until_they_run_somewhere() -> None:
    skipped = line("B", tests=0, reason="needs a GPU: none here")
    (entry,) = compatibility.merge([], [skipped])
    assert (entry["result"], entry["reason"]) == ("not run", "needs a GPU: none here")
    ran = line("B", device="some GPU")
    assert [e["result"] for e in compatibility.merge([entry], [ran])] == ["works"]
    assert [e["result"] for e in compatibility.merge([ran], [skipped])] == ["works"]


def rows(*lines: dict[str, Any]) -> list[str]:
    return compatibility.page(list(lines)).removeprefix(compatibility.HEAD).splitlines()


def test_the_page_has_a_row_for_each_feature_and_a_column_for_each_torch_and_device() -> None:
    old, new = {"torch": "2.9.0", "device": "CPU"}, {"torch": "2.13.0", "device": "CPU"}
    gpu = {"torch": "2.13.0", "device": "some GPU"}
    thing = {"library": "thing", "version": "1.0"}
    refused = {"result": "refused", "reason": "it cannot be right"}
    skipped = {"result": "not run", "reason": "needs a GPU"}
    found = rows(
        line("A", 7, **new, **thing),
        line("A", 3, **old, **thing),
        line("B", 2, **new, **refused),
        line("B", 1, **gpu, **refused),
        line("C", 0, **new, **skipped),
    )
    assert found == [
        "| feature | with | torch 2.9.0, CPU | torch 2.13.0, CPU | torch 2.13.0, some GPU |",
        "| --- | --- | --- | --- | --- |",
        "| A | thing 1.0 | works, 3 | works, 7 |  |",
        "| B<br>refused: it cannot be right |  |  | refused, 2 | refused, 1 |",
        "| C<br>not run: needs a GPU |  |  | not run |  |",
    ]


def test_the_page_tells_versions_of_a_library_apart() -> None:
    of_one = {"library": "thing", "torch": "2.13.0"}
    found = rows(line("A", 1, **of_one, version="1.10"), line("A", 2, **of_one, version="1.9"))
    assert found[2:] == ["| A | thing 1.9, 1.10 | works, 1 (1.10); works, 2 (1.9) |"]
