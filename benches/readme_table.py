"""Print the README's result table from the committed result file.

python benches/readme_table.py benches/results/smollm2-rows-columns.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    value = json.loads(parser.parse_args().result.read_text(encoding="utf-8"))
    public = value["public_implementation"]
    print("| removed | surgeon | the paper's public implementation |")
    print("|---|---|---|")
    print(f"| dense | {value['dense']['perplexity']:.2f} | {public['dense']:.2f} |")
    for shot, theirs in zip(value["shots"], public["perplexity"], strict=True):
        print(f"| {shot['sparsity']:.0%} | {shot['perplexity']:.2f} | {theirs:.2f} |")


if __name__ == "__main__":
    main()
