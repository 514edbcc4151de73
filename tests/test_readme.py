"""What the README shows is what works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    exec(compile(example, str(README), "exec"), {})
    assert float(capsys.readouterr().out) > 1
    assert (tmp_path / "demo-small" / "config.json").exists()


def test_every_surgeon_command_parses() -> None:
    """All options of the shown commands exist and their values pass the checks."""
    import typer

    from surgeon.cli import app
    from surgeon.config import PruneConfig

    group = typer.main.get_command(app)
    seen = 0
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part)
                if not words or Path(words[0]).name != "surgeon":
                    continue
                command = group.commands[words[1]]  # type: ignore[attr-defined]
                context = command.make_context(words[1], words[2:])
                if words[1] == "prune":
                    skipped = {"out", "config", "resume", "as_json"}
                    given = {k: v for k, v in context.params.items() if v is not None and k not in skipped}
                    assert PruneConfig.from_dict(given)
                seen += 1
    assert seen >= 4
