"""Lines that must hold as the code grows: imports point one way, public names are what they are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import surgeon

PACKAGE = Path(surgeon.__file__).parent

# Each module may import (at run time) from groups before its own, and within its own package.
LEVELS = [
    ["errors"],
    ["structures"],
    ["config"],
    ["linalg"],
    ["kronsum"],
    ["layers", "data"],
    ["models"],
    ["evaluation"],
    ["curvature"],
    ["costs"],
    ["update"],
    ["select", "schedule"],
    ["layerwise", "adapters"],
    ["heal"],
    ["operations"],
    ["progress"],
    ["session"],
    ["checkpoint", "export", "report"],
    ["runner"],
    ["cli"],
    ["__main__", "__init__"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


OPTIONS = {
    "prune": """
        model -o --out --structure --sparsity --target-parameters --target-size --method --shots --calibration
        --samples --sequence-length --test-data --test-samples --seed --device --precision --batch-tokens
        --damping-g --damping-a --rounds --curvature --fisher --fisher-samples --kronecker-terms --update --chunk
        --rank-by --heal --heal-epochs --correction-epochs --lora-rank --lora-learning-rate
        --resume --config --json
    """,
    "evaluate": "models --data --sequence-length --test-samples --device --precision --json",
}


def runtime_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.body
        for inner in ast.walk(child)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "surgeon":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("surgeon."):
            found.add(node.module.split(".")[1])
    return found


def test_imports_point_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert own in LEVEL, f"{path}: give the new module its level"
        for name in runtime_imports(path) - {"_core", "__version__", own}:
            assert LEVEL[name] < LEVEL[own], f"{path} imports {name}"


def test_only_these_call_the_core() -> None:
    callers = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "_core" in runtime_imports(p)}
    assert callers == {"select.py", "schedule.py"}


def test_files_can_be_read_in_a_sitting() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 380, path


def test_public_names_are_frozen() -> None:
    assert surgeon.__all__ == [
        "Evaluation",
        "Method",
        "Observer",
        "PruneConfig",
        "PruneResult",
        "Structure",
        "SurgeonError",
        "__version__",
        "evaluate",
        "prune",
    ]
    for name in surgeon.__all__:
        assert getattr(surgeon, name) is not None


def test_command_line_options_are_frozen() -> None:
    import typer

    from surgeon.cli import app

    group = typer.main.get_command(app)
    options = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert options == {name: sorted(words.split()) for name, words in OPTIONS.items()}


def test_import_is_light() -> None:
    code = (
        "import sys, surgeon, surgeon.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
