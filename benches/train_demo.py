"""Train the two demo models that ship inside the package, from scratch, on wiki-mini.

    python benches/train_demo.py                  both models, into python/surgeon/assets
    python benches/train_demo.py --model demo-opt --steps 200 --assets /tmp/assets --results /tmp/demo.json

A run that was cut off goes on from its last state when the same command is given again. Weights are chosen by
the held-out end of train.txt; test.txt is only ever measured.
"""

import argparse
import json
import math
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
HIDDEN = 192
POSITIONS = 512
WINDOW = 256
HELD_OUT = 0.05  # the last part of train.txt


@dataclass(frozen=True, kw_only=True)
class Recipe:
    steps: int
    tokens_per_step: int = 16 * WINDOW
    long_windows: float = 0.25  # share of the steps that train all positions instead of the first WINDOW
    learning_rate: float = 8e-3
    warmup: int = 60
    weight_decay: float = 0.1
    dropout: float = 0.1
    seed: int = 0
    evaluate_every: int = 100


@dataclass
class Progress:
    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0


SPECIAL_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": True,
    **SPECIAL_IDS,
}


def llama() -> PreTrainedModel:
    config = transformers.LlamaConfig(intermediate_size=512, num_key_value_heads=2, **SHARED)
    return transformers.LlamaForCausalLM(config)


def opt() -> PreTrainedModel:
    config = transformers.OPTConfig(ffn_dim=768, word_embed_proj_dim=HIDDEN, dropout=0.0, **SHARED)
    model = transformers.OPTForCausalLM(config)
    # Attention by distance is there from the start: so little text would not teach it to a random table.
    table = model.model.decoder.embed_positions.weight.data
    angles = torch.arange(len(table))[:, None] * POSITIONS ** -torch.linspace(0, 1, HIDDEN // 2)
    table.copy_(0.1 * torch.cat([angles.sin(), angles.cos()], dim=1))
    return model


STEPS = {"demo": 1400, "demo-opt": 900}
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {"demo": llama, "demo-opt": opt}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; no token is added and no length is a limit, for a text is encoded whole, then cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
    )


def encode(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text)["input_ids"])


def unigram_perplexity(train: Tensor, test: Tensor) -> float:
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[test].mean().item())


def next_token_loss(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    logits_NTV = model(input_ids=tokens_NT, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits_NTV.flatten(0, 1), tokens_NT[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: Tensor, *, window: int = WINDOW) -> float:
    """Mean next-token loss of the non-overlapping windows from the start of the tokens."""
    training = model.training
    model.eval()
    windows_NT = tokens[: len(tokens) // window * window].view(-1, window)
    total = sum(next_token_loss(model, batch).item() * len(batch) for batch in windows_NT.split(16))
    model.train(training)
    return total / len(windows_NT)


def add_dropout(model: nn.Module, probability: float) -> None:
    """Dropout on what joins the residual stream, in hooks: the configuration that ships has none."""

    def hook(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return functional.dropout(output, probability, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", ".o_proj", ".out_proj", ".down_proj", ".fc2")):
            module.register_forward_hook(hook)


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and biases."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if "embed_tokens" in n], "weight_decay": decay},
        {"params": [p for n, p in named if "embed_positions" in n], "weight_decay": 0, "rate": 0.05},
        {"params": [p for _, p in named if p.ndim != 2], "weight_decay": 0},
    ]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95)),
    ]


def learning_rate(recipe: Recipe, step: int) -> float:
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def draw(tokens: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    length = POSITIONS if torch.rand((), generator=generator).item() < recipe.long_windows else WINDOW
    starts = torch.randint(len(tokens) - length, (recipe.tokens_per_step // length,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def fit(name: str, recipe: Recipe, train: Tensor, held_out: Tensor, state: Path) -> tuple[Any, Progress]:
    torch.manual_seed(recipe.seed)
    model: Any = BUILDERS[name]()
    model.set_attn_implementation("eager")  # at this size quicker on a CPU than the fused kernel
    add_dropout(model, recipe.dropout)
    model.train()
    generator = torch.Generator().manual_seed(recipe.seed)
    steppers = optimizers(model, recipe)
    progress = Progress()
    best = {key: value.clone() for key, value in model.state_dict().items()}
    if state.exists():
        saved = torch.load(state)
        if saved["recipe"] != asdict(recipe):
            raise SystemExit(f"{state} is of another recipe: remove it or give another --state")
        model.load_state_dict(saved["model"])
        for stepper, values in zip(steppers, saved["optimizers"], strict=True):
            stepper.load_state_dict(values)
        generator.set_state(saved["generator"])
        torch.set_rng_state(saved["random"])
        progress, best = Progress(**saved["progress"]), saved["best"]
    began = time.monotonic() - progress.seconds
    while progress.step < recipe.steps:
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, draw(train, recipe, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = learning_rate(recipe, progress.step) * group.get("rate", 1)
            stepper.step()
            stepper.zero_grad()
        progress.step += 1
        if progress.step % recipe.evaluate_every and progress.step != recipe.steps:
            continue
        held_out_loss = mean_loss(model, held_out)
        if held_out_loss < progress.best_loss:
            progress.best_loss, progress.best_step = held_out_loss, progress.step
            best = {key: value.clone() for key, value in model.state_dict().items()}
        progress.seconds = time.monotonic() - began
        when = f"{name} step {progress.step} of {recipe.steps}, {progress.seconds:.0f} s"
        print(f"{when}: loss {loss.item():.3f}, held-out perplexity {math.exp(held_out_loss):.2f}", flush=True)
        partial = state.with_suffix(".partial")
        saved = {
            "recipe": asdict(recipe),
            "model": model.state_dict(),
            "optimizers": [stepper.state_dict() for stepper in steppers],
            "generator": generator.get_state(),
            "random": torch.get_rng_state(),
            "progress": asdict(progress),
            "best": best,
        }
        torch.save(saved, partial)
        partial.replace(state)
    model.load_state_dict(best)
    return model, progress


def ship(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = transformers.GenerationConfig(**SPECIAL_IDS)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone


def measure(folder: Path, text: str, train: Tensor, held_out: Tensor, test: Tensor) -> dict[str, Any]:
    """What users get: the stored files, loaded by the stock classes, computed in float32."""
    if not torch.equal(encode(AutoTokenizer.from_pretrained(folder), text), test):
        raise SystemExit(f"{folder}: the stored tokenizer does not encode as the trained one")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        "parameters": model.num_parameters(),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "train_perplexity": math.exp(mean_loss(model, train[: 128 * WINDOW])),
        "held_out_perplexity": math.exp(mean_loss(model, held_out)),
        "test_perplexity": math.exp(mean_loss(model, test)),
        f"test_perplexity_window_{POSITIONS}": math.exp(mean_loss(model, test, window=POSITIONS)),
    }


def processor() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", information.read_text()) if information.exists() else None
    return found[1] if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo models.")
    parser.add_argument("--model", action="append", choices=BUILDERS, help="default: both")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--assets", type=Path, default=ROOT / "python/surgeon/assets")
    parser.add_argument("--results", type=Path, default=ROOT / "benches/results/demo-models.json")
    parser.add_argument("--state", type=Path, default=ROOT / "target/train-demo", help="what resume needs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    corpus = ROOT / "python/surgeon/assets/wiki-mini"
    train_text, test_text = ((corpus / name).read_text("utf-8") for name in ("train.txt", "test.txt"))
    tokenizer = train_tokenizer(train_text)
    tokens, test = encode(tokenizer, train_text), encode(tokenizer, test_text)
    train, held_out = tokens.split([len(tokens) - int(HELD_OUT * len(tokens)), int(HELD_OUT * len(tokens))])
    for folder in (arguments.state, arguments.results.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.model or BUILDERS:
        recipe = Recipe(steps=arguments.steps or STEPS[name])
        model, progress = fit(name, recipe, train, held_out, arguments.state / f"{name}-{recipe.steps}.pt")
        folder = arguments.assets / name
        ship(model, tokenizer, folder)
        entry = {
            **measure(folder, test_text, train, held_out, test),
            "unigram_perplexity": unigram_perplexity(train, test),
            "tokens": {"train": len(train), "held_out": len(held_out), "test": len(test)},
            "recipe": asdict(recipe),
            "best_step": progress.best_step,
            "seconds": round(progress.seconds),
            "threads": arguments.threads,
            "device": processor(),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
            "date": datetime.now(UTC).date().isoformat(),
        }
        results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
        arguments.results.write_text(json.dumps({**results, name: entry}, indent=2, sort_keys=True) + "\n")
        print(name, json.dumps(entry, indent=2))


if __name__ == "__main__":
    main()
