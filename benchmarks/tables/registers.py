"""Registers of the GPU kernels."""

from __future__ import annotations

from tables.parts import Content, paragraph, table


def registers_tables(content: Content) -> list[str]:
    """Return a table of the registers that each GPU kernel takes."""
    rows = []
    for result in content["results"]:
        if "error" in result:
            rows.append([f"{result['backend']}, {result['architecture']}", result["error"], "", ""])
        else:
            name = f"{result['backend']}, {result['architecture']}: {result['kernel']}, {result['format']}"
            rows.append([name, *(str(result[key]) for key in ("registers", "stack_bytes", "spill_instructions"))])
    return [
        *paragraph(
            "The machine code of the GPU kernels, compiled ahead of time: registers of a thread, and what does not fit "
            "there (stack bytes of a thread, loads and stores of them)."
        ),
        *table(["kernel", "registers", "stack bytes", "spill instructions"], rows),
    ]
