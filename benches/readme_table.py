"""Print the README's result tables from the committed result files.

cd benches/results
python ../readme_table.py smollm2-rows-columns.json smollm2-rows-columns-by-cost.json
python ../readme_table.py smollm2-methods.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

METHODS = ("surgeon", "k-obd", "l-obd", "magnitude", "sparsegpt", "wanda")
COLUMNS = (
    *(("rows-columns", part) for part in ("10%", "20%", "30%")),
    *(("neurons,heads", part) for part in ("10%", "20%", "30%")),
    ("weights", "50%"),
    ("2:4", "50%"),
)


def shots_table(runs: list[tuple[str, dict[str, Any]]]) -> None:
    """Perplexity after every shot of some runs beside the paper's public implementation."""
    first = runs[0][1]
    public = first["public_implementation"]
    print("| removed | the paper's public implementation |", " | ".join(name for name, _ in runs), "|")
    print("|---|---|" + "---|" * len(runs))
    cells = [f"{value['dense']['perplexity']:.2f}" for _, value in runs]
    print(f"| dense | {public['dense']:.2f} |", " | ".join(cells), "|")
    for number, theirs in enumerate(public["perplexity"]):
        cells = [f"{value['shots'][number]['perplexity']:.2f}" for _, value in runs]
        print(f"| {first['shots'][number]['sparsity']:.0%} | {theirs:.2f} |", " | ".join(cells), "|")


def shown(row: dict[str, Any] | None, *, healed: bool) -> str:
    if row is None or (healed and row["healed"] is None):
        return "–"
    perplexity = row["healed"]["perplexity"] if healed else row["shots"][-1]["perplexity"]
    return "inf" if perplexity is None else f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:.2g}"


def methods_table(rows: dict[str, Any]) -> None:
    """Every method on every structure, one shot; and the same healed, where it was."""
    print("| |", " | ".join(f"{structure} {part}" for structure, part in COLUMNS), "|")
    print("|---|" + "---|" * len(COLUMNS))
    for method in METHODS:
        cells = [rows.get(f"{structure} {method} {part}") for structure, part in COLUMNS]
        print(f"| {method} |", " | ".join(shown(row, healed=False) for row in cells), "|")
        if any(row is not None and row["healed"] is not None for row in cells):
            print("| healed |", " | ".join(shown(row, healed=True) for row in cells), "|")
    for name, row in rows.items():
        if name.endswith("shots"):
            print(name, [f"{shot['sparsity']:.0%} {shot['perplexity']:.2f}" for shot in row["shots"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    values = [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in parser.parse_args().results]
    runs = [(name, value) for name, value in values if "shots" in value]
    if runs:
        shots_table(runs)
    for _, value in values:
        if "rows" in value:
            methods_table(value["rows"])


if __name__ == "__main__":
    main()
