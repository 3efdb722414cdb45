"""The README's compatibility matrix is what the marked tests have shown, for every marked feature."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import compatibility
import pytest

TESTS = Path(__file__).resolve().parent


def line(feature: str, tests: int = 1, **changes: Any) -> dict[str, Any]:
    return {**compatibility.new_line(feature), "tests": tests, **changes}


def test_readme_shows_the_record() -> None:
    readme = compatibility.README.read_text()
    assert readme == compatibility.with_table(readme, compatibility.load())


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


def test_table_names_the_reason_of_a_refusal() -> None:
    readme = f"a{compatibility.BEGIN}old{compatibility.END}z"
    text = compatibility.with_table(readme, [line("C", library="thing", version="1.0", result="refused", reason="no")])
    assert "| C | thing 1.0, torch " in text
    assert "| refused: no | 1 |" in text
    assert "old" not in text
    with pytest.raises(ValueError, match=r"README\.md lacks"):
        compatibility.with_table("nothing", [])
