"""Checks the committed result files; makes docs/benchmarks.md, docs/figures/ and parts of other pages from them.

``python benchmarks/report.py`` writes them; ``--check`` changes nothing, and exits with 1 if they are not what the
result files say. Every result file has to keep to its schema in ``schemas/`` and to say where it comes from. What is to
be known of files of an older commit stands in ``results/notes.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figures import FIGURES, Drawing, is_drawn_from, save
from headlines import headlines
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from matplotlib.figure import Figure
from provenance import folder_name
from tables import SECTIONS
from tables.parts import Content, paragraph

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = Path(__file__).resolve().parent / "schemas"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOT_MEASURED = "On a GPU: not measured."

#: A machine's folder -> benchmark -> content of its result file.
Results = dict[str, dict[str, Content]]


def load_results(folder: Path = ROOT / "benchmarks" / "results") -> Results:
    """Return every result file, GPUs first and benchmarks in the order of their sections.

    A content has a ``note`` where ``notes.json`` has one for its commit and benchmark; designs that the commit called
    like others of today have the names that stand there.

    Raises:
        ValueError: a file breaks its schema, does not say where it comes from, or lies where it does not belong; a note
            is of no file.
    """
    found: Results = {}
    path = folder / "notes.json"
    notes = json.loads(path.read_text()) if path.exists() else {}
    check(notes, "notes", path.name)
    unused = {(commit, benchmark) for commit, of_commit in notes.items() for benchmark in of_commit}
    for path in sorted(folder.glob("*/*.json")):
        where = f"{path.parent.name}/{path.name}"
        if path.stem not in SECTIONS:
            raise ValueError(f"{where} is of no benchmark; there are {', '.join(SECTIONS)}")
        content = json.loads(path.read_text())
        check(content, "file", where)
        for i, result in enumerate(content["results"]):
            check(result, path.stem, f"{where}: results[{i}]")
        machine = content["provenance"]["machine"]
        if path.parent.name != folder_name(machine):
            raise ValueError(f"{where} was measured on {machine!r} and belongs in {folder_name(machine)}/")
        commit = content["provenance"]["commit"]
        if path.stem in notes.get(commit, {}):
            unused.discard((commit, path.stem))
            _add_note(content, **notes[commit][path.stem])
        found.setdefault(path.parent.name, {})[path.stem] = content
    for commit, benchmark in sorted(unused):
        raise ValueError(f"notes.json has a note on {benchmark} of commit {commit[:9]}, of which there is no file")
    machines = sorted(found, key=lambda name: (not name.startswith("nvidia"), name))
    return {
        machine: {name: found[machine][name] for name in SECTIONS if name in found[machine]} for machine in machines
    }


def check(value: Any, schema: str, where: str) -> None:
    """Raise ValueError, which says where and why, unless a value keeps to ``schemas/<schema>.json``."""
    validator = Draft202012Validator(json.loads((SCHEMAS / f"{schema}.json").read_text()))
    error = best_match(validator.iter_errors(value))
    if error is not None:
        raise ValueError(f"{where} breaks schemas/{schema}.json at {error.json_path}: {error.message}")


def _add_note(content: Content, note: str, designs: dict[str, dict[str, str]] | None = None) -> None:
    content["note"] = note
    for result in content["results"]:
        result |= (designs or {}).get(result.get("design"), {})


def readme_block(results: Results, drawn: set[str]) -> str:
    """Return the generated part of the README; ``drawn`` are the figures that there are."""
    lines = [*_not_measured(results), *headlines(results)]
    for folder, benchmarks in results.items():
        changed = f", an older one ([what has changed](docs/benchmarks.md#{folder}))" if _is_older(benchmarks) else ""
        lines += paragraph(f"{_machine(benchmarks)}{changed}.")
    shown: set[str] = set()
    for folder, benchmarks in results.items():
        drawings = [d for name in benchmarks for d in FIGURES.get(name, []) if d.in_readme and d.name not in shown]
        lines += _links(folder, drawings, drawn, "docs/figures/benchmarks")
        shown |= {drawing.name for drawing in drawings}
    return "\n".join(lines).rstrip() + "\n"


def ranks_block(results: Results) -> str:
    """Return the generated part of docs/distributed.md: how one global batch was divided among ranks."""
    lines = []
    for benchmarks in results.values():
        if "parallel" in benchmarks:
            content = benchmarks["parallel"]
            lines += [*SECTIONS["parallel"].full(content), *paragraph(f"{_machine({'parallel': content})}.")]
    return "\n".join(lines or [NOT_MEASURED]).rstrip() + "\n"


def document(results: Results, drawn: set[str]) -> str:
    """Return docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python benchmarks/report.py` from the files under `benchmarks/results/`; do not edit. How it is",
        "measured and how to read it: [benchmarks/README.md](../benchmarks/README.md).",
        "",
    ]
    for folder, benchmarks in results.items():
        lines += [f"## {_name(benchmarks)}", "", *_in_short(benchmarks)]
        for name, content in benchmarks.items():
            source = content["provenance"]
            lines += [f"### {SECTIONS[name].title}", "", *SECTIONS[name].full(content)]
            lines += _links(folder, FIGURES.get(name, []), drawn, "figures/benchmarks")
            lines += [
                f"`{source['command']}`, torch {source['torch']}, triton {source['triton']}, {source['date'][:10]}, "
                f"commit {source['commit'][:9]}",
                "",
                *(f"- {key.replace('_', ' ')}: {value}" for key, value in content["method"].items()),
                "",
            ]
    if not _gpus(results):
        lines += ["## GPUs", "", NOT_MEASURED, ""]
    return "\n".join(lines).rstrip() + "\n"


def _in_short(benchmarks: dict[str, Content]) -> list[str]:
    """Return the notes on a machine's results, their summaries, and what was not measured on it."""
    older = ", an older one. What has changed since" if _is_older(benchmarks) else ""
    lines = paragraph(f"{_machine(benchmarks)}{older}{':' if older else '.'}")
    for name, content in benchmarks.items():
        lines += paragraph(f"*{SECTIONS[name].title}*: {content['note']}") if "note" in content else []
    for name, content in benchmarks.items():
        summary = SECTIONS[name].summary
        lines += summary(content) if summary else []
    missing = [section.title for name, section in SECTIONS.items() if name not in benchmarks]
    return lines + (paragraph(f"Not measured on this machine: {'; '.join(missing)}.") if missing else [])


def _gpus(results: Results) -> list[str]:
    return [folder for folder in results if folder.startswith("nvidia")]


def _not_measured(results: Results) -> list[str]:
    """Say plainly that nothing was measured on a GPU, where that is so."""
    return [] if _gpus(results) else [NOT_MEASURED, ""]


def _name(benchmarks: dict[str, Content]) -> str:
    return str(next(iter(benchmarks.values()))["provenance"]["machine"])


def _machine(benchmarks: dict[str, Content]) -> str:
    """Return a line that names a machine, its software, and the day and commit of its results."""
    sources = [content["provenance"] for content in benchmarks.values()]
    torches, dates, commits = (
        ", ".join(sorted({text(source) for source in sources}))
        for text in (lambda s: s["torch"], lambda s: s["date"][:10], lambda s: s["commit"][:9])
    )
    return f"**{sources[0]['machine']}**, torch {torches}, {dates}, commit {commits}"


def _is_older(benchmarks: dict[str, Content]) -> bool:
    return any("note" in content for content in benchmarks.values())


def _links(folder: str, drawings: list[Drawing], drawn: set[str], path: str) -> list[str]:
    files = {f"{folder}-{drawing.name}.png": drawing for drawing in drawings}
    return [line for file, d in files.items() if file in drawn for line in (f"![{d.alt}]({path}/{file})", "")]


def _figures_folder(root: Path) -> Path:
    """Return where figures go, and nothing else does."""
    return root / "docs" / "figures" / "benchmarks"


def figures(results: Results) -> Iterator[tuple[str, Figure, Content]]:
    """Yield the file name of each figure, the figure, and the content that it is drawn from."""
    for folder, benchmarks in results.items():
        for name, content in benchmarks.items():
            for drawing in FIGURES.get(name, []):
                figure = drawing.draw(content["provenance"]["machine"], content)
                if figure is not None:
                    yield f"{folder}-{drawing.name}.png", figure, content


def write(results: Results, root: Path = ROOT) -> None:
    """Write what is generated of each page, and the figures, and remove figures that are none of these."""
    folder = _figures_folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = set()
    for file, figure, content in figures(results):
        save(figure, folder / file, content)
        drawn.add(file)
    for path in folder.glob("*.png"):
        if path.name not in drawn:
            path.unlink()
    for path, text in _texts(results, drawn, root).items():
        path.write_text(text)


def differences(results: Results, root: Path = ROOT) -> list[str]:
    """Return which files are not what the result files say."""
    folder = _figures_folder(root)
    made = {file: content for file, _, content in figures(results)}
    stale = [
        f"docs/figures/benchmarks/{file}" for file, content in made.items() if not is_drawn_from(folder / file, content)
    ]
    stale += [f"docs/figures/benchmarks/{path.name}" for path in folder.glob("*.png") if path.name not in made]
    for path, text in _texts(results, set(made), root).items():
        if not path.exists() or path.read_text() != text:
            stale.append(str(path.relative_to(root)))
    return stale


def _texts(results: Results, drawn: set[str], root: Path) -> dict[Path, str]:
    blocks = {root / "README.md": readme_block(results, drawn), root / "docs" / "distributed.md": ranks_block(results)}
    return {path: _with_block(path.read_text(), block) for path, block in blocks.items()} | {
        root / "docs" / "benchmarks.md": document(results, drawn)
    }


def _with_block(text: str, block: str) -> str:
    """Return a text with another generated part."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{block}{END}{after}"


def main() -> int:
    """Write what is made from the result files, or check it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something is out of date")
    arguments = parser.parse_args()
    try:
        results = load_results()
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if not arguments.check:
        write(results)
        return 0
    stale = differences(results)
    if stale:
        print(f"{', '.join(stale)} do not show the result files; run python benchmarks/report.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
