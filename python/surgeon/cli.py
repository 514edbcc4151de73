"""The command line: ``surgeon prune`` and ``surgeon evaluate``.

Progress goes to stderr, results to stdout. Exit codes: 0 done, 2 wrong use, 1 failed run. Nothing
heavy is imported before the options have been read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from surgeon.config import BUDGETS, DEFAULT_SHOTS, DEFAULT_SPARSITY, PruneConfig, load_toml
from surgeon.errors import ConfigError, SurgeonError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from surgeon.progress import Observer

app = typer.Typer(
    name="surgeon",
    help="Prune pretrained language models by the curvature of their loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DATA = "wiki-mini, wikitext2, c4, hub:NAME[:CONFIG][:COLUMN] or a .txt, .jsonl, .parquet, .safetensors file"


def _default(name: str) -> str:
    field = next(f for f in dataclasses.fields(PruneConfig) if f.name == name)
    return str(field.default)


# Options of `prune` that are settings of the run, by their Python names.
_SETTINGS = frozenset(field.name for field in dataclasses.fields(PruneConfig))


def _print_version(value: bool) -> None:  # noqa: FBT001
    if value:
        from surgeon import __version__

        typer.echo(f"surgeon {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command("prune")
def prune_command(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, hub id or 'demo'.", show_default="demo")
    ] = None,
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the pruned checkpoint; new or empty.")],
    structure: Annotated[
        str | None,
        typer.Option(
            help="rows-columns, rows, columns, neurons, heads, neurons,heads, weights or N:M such as 2:4.",
            show_default=_default("structure"),
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the blocks' linear parameters that go.",
            show_default=f"{DEFAULT_SPARSITY}; all groups for N:M",
        ),
    ] = None,
    target_parameters: Annotated[
        str | None, typer.Option(help="Instead: parameters the whole model may keep, e.g. 5e9.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="Instead: the same as bytes of the checkpoint's dtype.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="surgeon, k-obd, l-obd, magnitude, sparsegpt or wanda.", show_default=_default("method")),
    ] = None,
    curvature: Annotated[
        str | None, typer.Option(help="kfac, kron (nearest Kronecker) or activations.", show_default="the method's")
    ] = None,
    fisher: Annotated[
        str | None,
        typer.Option(help="empirical, or mc: next tokens drawn from the model.", show_default=_default("fisher")),
    ] = None,
    fisher_samples: Annotated[
        int | None, typer.Option(help="Draws a token for mc.", show_default=_default("fisher_samples"))
    ] = None,
    kronecker_terms: Annotated[
        int | None, typer.Option(help="Products that kron adds up.", show_default=_default("kronecker_terms"))
    ] = None,
    update: Annotated[
        str | None, typer.Option(help="Of what stays: joint, chunked or none.", show_default="the method's")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Weights of one solve of chunked.", show_default=_default("chunk"))
    ] = None,
    rank_by: Annotated[
        str | None,
        typer.Option(help="What units compete by: cost or cost-per-parameter.", show_default="cost-per-parameter"),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            help="Estimates of the curvature, each followed by removal.",
            show_default=f"{DEFAULT_SHOTS}; 1 for sparsegpt, wanda",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Selections a shot, with the same curvature.", show_default=_default("rounds")),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help=f"Text for the curvature: {_DATA}.", show_default=_default("calibration")),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.", show_default=_default("samples"))] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens a window.", show_default="2048, or the model's positions if fewer"),
    ] = None,
    test_data: Annotated[
        str | None,
        typer.Option(help="Text for the perplexity, like --calibration.", show_default=_default("test_data")),
    ] = None,
    test_samples: Annotated[int | None, typer.Option(help="Test windows, from the start.", show_default="all")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Draws the calibration windows.", show_default=_default("seed"))
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default=_default("device"))
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Arithmetic while pruning: float32 or float64.", show_default=_default("precision")),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens a batch: speed and memory.", show_default=_default("batch_tokens")),
    ] = None,
    damping_g: Annotated[
        float | None, typer.Option(help="Relative damping of G.", show_default=_default("damping_g"))
    ] = None,
    damping_a: Annotated[
        float | None, typer.Option(help="Relative damping of A.", show_default=_default("damping_a"))
    ] = None,
    heal: Annotated[
        bool | None,
        typer.Option(
            "--heal/--no-heal", help="Fit and merge low-rank adapters after the last shot.", show_default="no"
        ),
    ] = None,
    heal_epochs: Annotated[
        float | None, typer.Option(help="Passes of that fit.", show_default=_default("heal_epochs"))
    ] = None,
    correction_epochs: Annotated[
        float | None,
        typer.Option(help="Passes of such a fit after every other shot.", show_default=_default("correction_epochs")),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of the adapters.", show_default=_default("lora_rank"))
    ] = None,
    lora_learning_rate: Annotated[
        float | None, typer.Option(help="Of their Adam; it falls to zero.", show_default=_default("lora_learning_rate"))
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished run of this OUT.")] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file with these settings; options win.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print surgeon.json to stdout.")] = False,
) -> None:
    """Prune a model over several shots and write a checkpoint that transformers loads.

    Example: surgeon prune models/smollm2-135m -o pruned --sparsity 0.3 --shots 5
    """
    given: dict[str, Any] = {key: value for key, value in locals().items() if key in _SETTINGS}
    given["target_parameters"] = None if target_parameters is None else _count(target_parameters)
    values: dict[str, Any] = {} if config is None else load_toml(config)
    values = {key.replace("-", "_"): value for key, value in values.items()}
    if any(given[name] is not None for name in BUDGETS):
        values = {key: value for key, value in values.items() if key not in BUDGETS}
    values.update({key: value for key, value in given.items() if value is not None})
    settings = PruneConfig.from_dict(values)
    from surgeon.runner import prune

    with _observer() as observer:
        result = prune(settings, out, resume=resume, observer=observer)
    if as_json:
        typer.echo(json.dumps(result.report, indent=2))
        return
    final, dense = result.report["final"], result.report["dense"]["perplexity"]
    typer.echo(f"pruned model: {out}")
    typer.echo(f"numbers:      {out / 'surgeon.json'}")
    typer.echo(
        f"removed {final['removed_parameters']:,} of {final['prunable_parameters']:,} prunable parameters "
        f"({final['sparsity']:.2%}); perplexity {_shown(dense)} -> {_shown(final['perplexity'])}"
    )
    typer.echo(_protocol(result.report["protocol"]["test"]))


@app.command("evaluate")
def evaluate_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoint folders, hub ids or 'demo'.")],
    *,
    data: Annotated[str, typer.Option(help=_DATA)] = "wiki-mini",
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens a window.", show_default="2048, or the model's positions if fewer"),
    ] = None,
    test_samples: Annotated[int | None, typer.Option(help="Windows, from the start.", show_default="all")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of one or several models on the same text."""
    from surgeon.runner import evaluate

    results: list[dict[str, Any]] = []
    for model in models:
        with _observer() as observer:
            result, windows = evaluate(
                model,
                data_source=data,
                sequence_length=sequence_length,
                samples=test_samples,
                device=device,
                precision=precision,
                observer=observer,
            )
        row = {
            "model": model,
            "perplexity": result.perplexity,
            "loss": result.loss,
            "test": {
                "source": data,
                "windows": len(windows),
                "length": windows.length,
                "digest": windows.digest,
            },
        }
        results.append(row)
        if not as_json:
            typer.echo(f"{_shown(result.perplexity):>10}  {model}")
    if as_json:
        from surgeon.progress import finite

        typer.echo(json.dumps(finite({"results": results}), indent=2, allow_nan=False))
    else:
        for line in dict.fromkeys(_protocol(row["test"]) for row in results):
            typer.echo(line)


# Every error of the command line's own parsing; typer exports children of it only.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
_INTERRUPTED = 130
_STOPPED = "stopped; if a shot was finished, --resume continues after it"
_NO_MEMORY = "out of memory: lower --batch-tokens or --sequence-length; --resume continues after the last finished shot"


def main() -> None:
    """Entry point of ``surgeon`` and ``python -m surgeon``."""
    _quiet_libraries()
    try:
        code = app(prog_name="surgeon", standalone_mode=False)
    except SurgeonError as error:
        _fail(str(error), error.exit_code)
    except _USAGE_ERROR as error:
        _fail(f"{error.format_message().rstrip('.')} (see surgeon --help)", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail(_STOPPED, 1)
    except MemoryError:
        _fail(_NO_MEMORY, 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch for it
            raise
        _fail(_NO_MEMORY, 1)
    except OSError as error:
        _fail(str(error), 1)
    if code == _INTERRUPTED:
        _fail(_STOPPED, 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    typer.echo(f"surgeon: error: {line}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def _observer() -> Iterator[Observer]:
    """A live display on a terminal, plain lines elsewhere; both on stderr."""
    from rich.console import Console

    from surgeon.progress import LiveProgress, PlainProgress

    console: Console = Console(stderr=True)
    if console.is_terminal:
        with LiveProgress(console) as live:
            yield live
    else:
        yield PlainProgress(console)


def _quiet_libraries() -> None:
    """Our own progress and errors instead of the libraries' bars and warnings."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _count(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"target-parameters is {text!r}: write a number like 5e9") from None
    if not 0 < value < 1e18:
        raise ConfigError(f"target-parameters is {text}: it must be positive")
    return int(value)


def _protocol(test: dict[str, Any]) -> str:
    return f"protocol: {test['source']} test, {test['windows']} windows of {test['length']} tokens side by side"


def _shown(perplexity: float | None) -> str:
    return "inf" if perplexity is None else f"{perplexity:.3f}"
