"""The low-rank fit: equal to a slow truth, masks kept to the bit, and no trace of it but the weights."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from surgeon import adapters
from surgeon import heal as heal_module
from surgeon.data import Windows
from surgeon.errors import ConfigError, NonFiniteError, SurgeonError
from surgeon.heal import HealRecord, HealSettings, heal, planned_windows, require_peft
from surgeon.layers import PrunableLayer
from surgeon.models import match_layers

from .conftest import VOCABULARY, tiny_llama, tiny_opt

peft = pytest.importorskip("peft")

# Few layers, few windows, long steps: a fit that visibly changes the weights in a fraction of a second.
SETTINGS = HealSettings(rank=3, learning_rate=1e-2, epochs=1.0, seed=5)


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=4, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": tiny_llama, "opt": tiny_opt, "gpt2": tiny_gpt2}
MASKS = ("none", "rows-columns", "elements", "2:4", "mixed")


def find_layers(model: PreTrainedModel) -> tuple[PrunableLayer, ...]:
    if not isinstance(model, GPT2LMHeadModel):
        return match_layers(model).layers
    paths = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = [(f"transformer.h.{block}.{path}", block) for block in range(2) for path in paths]
    return tuple(
        PrunableLayer(name, name.rpartition(".")[2], block, model.get_submodule(name), transposed=True)
        for name, block in names
    )


def kept_mask(kind: str, layer: PrunableLayer, index: int) -> Tensor:
    """``[R, inputs]`` bool of the kind."""
    generator = torch.Generator().manual_seed(100 + index)
    R, C = layer.rows, layer.inputs
    if kind == "mixed":
        kind = MASKS[1 + index % 3]
    if kind == "rows-columns":
        return (torch.rand(R, 1, generator=generator) > 0.3) & (torch.rand(1, C, generator=generator) > 0.3)
    if kind == "elements":
        return torch.rand(R, C, generator=generator) > 0.5
    if kind == "2:4":
        scores = torch.rand(R, C // 4, 4, generator=generator)
        return (scores.argsort(-1).argsort(-1) < 2).reshape(R, C)
    return torch.ones(R, C, dtype=torch.bool)


def pruned(family: str, kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = MODELS[family]().to(dtype)
    for index, layer in enumerate(find_layers(model)):
        keep = kept_mask(kind, layer, index)
        # In a removed row the bias went too; a removed weight is -0.0 here to see that it comes out as +0.0.
        layer.weight.masked_fill_(~keep, -0.0)
        if layer.bias is not None:
            layer.bias.masked_fill_(~keep.any(1), 0.0)
    return model


def counting_windows(count: int = 9, length: int = 12) -> Windows:
    """Counting modulo five from a random start: what is learnt in one window holds in the others."""
    starts = torch.randint(0, 5, (count, 1), generator=torch.Generator().manual_seed(3))
    return Windows((starts + torch.arange(length)) % 5, "counting")


def run(model: PreTrainedModel, windows: Windows | None = None, **options: Any) -> HealRecord:
    options = {"settings": SETTINGS, "batch_tokens": 2048, **options}
    return heal(model, find_layers(model), windows or counting_windows(), **options)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, t in model.state_dict().items()
    }


class Anatomy:
    """What a model is built of, by identity."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
        self.parameters = [(name, id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)]
        self.attributes = set(vars(model))

    def check(self, model: PreTrainedModel) -> None:
        now = Anatomy(model)
        assert now.modules == self.modules
        assert now.parameters == self.parameters
        assert now.attributes == self.attributes
        for module in model.modules():
            assert not module.training
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks
            assert "forward" not in vars(module)
        for parameter in model.parameters():
            assert not parameter.requires_grad
            assert parameter.grad is None
            assert not parameter._backward_hooks


def slow_truth(model: PreTrainedModel, windows: Windows, settings: HealSettings) -> dict[str, Tensor]:
    """The weights after a fit, by whole matrices and Adam spelt out; ``{parameter name: [R, inputs]}``."""
    layers = find_layers(model)
    _, visits = heal_module._plan(len(windows), settings)
    generator = torch.Generator().manual_seed(settings.seed)
    W, M, A, B = [], [], [], []
    for layer in layers:
        W.append(layer.weight.clone())
        M.append((layer.weight != 0).to(W[-1].dtype))
        bound = layer.inputs**-0.5
        drawn = torch.empty(settings.rank, layer.inputs, dtype=torch.float64).uniform_(
            -bound, bound, generator=generator
        )
        # A column without a weight never counts; a zero there says the same.
        A.append((drawn * M[-1].amax(0)).to(W[-1].dtype).requires_grad_())
        B.append(W[-1].new_zeros(layer.rows, settings.rank).requires_grad_())
    state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for pair in zip(A, B, strict=True) for p in pair]

    def weights() -> dict[str, Tensor]:
        return {f"{x.name}.weight": w + m * (b @ a) for x, w, m, a, b in zip(layers, W, M, A, B, strict=True)}

    parts = visits.split(settings.step_windows)
    for step, chosen in enumerate(parts, 1):
        total, count = W[0].new_zeros(()), 0
        for window in chosen.tolist():
            ids = windows.ids[window : window + 1]
            live = {x.name: x for x in layers}
            new = {name: w.T if live[name.removesuffix(".weight")].transposed else w for name, w in weights().items()}
            logits = torch.func.functional_call(model, new, kwargs={"input_ids": ids, "use_cache": False}).logits[0]
            for t in range(ids.shape[1] - 1):
                total = total - torch.log_softmax(logits[t], 0)[ids[0, t + 1]]
                count += 1
        (total / count).backward()
        for p, m, v in state:
            m.mul_(0.9).add_(0.1 * p.grad)
            v.mul_(0.999).add_(0.001 * p.grad**2)
            change = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            p.data -= settings.learning_rate * (1 - (step - 1) / len(parts)) * change
            p.grad = None
    return {name: w.detach() for name, w in weights().items()}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("family", sorted(MODELS))
def test_equals_the_slow_truth(family: str, kind: str) -> None:
    model, windows = pruned(family, kind), counting_windows()
    settings = HealSettings(rank=3, learning_rate=1e-2, epochs=0.9, step_windows=2, seed=7)
    before = {layer.name: layer.weight.clone() for layer in find_layers(model)}
    expected = slow_truth(pruned(family, kind), windows, settings)
    record = run(model, windows, settings=settings, batch_tokens=12)
    assert record.kept
    assert record.steps == 4  # 0.9 of the 8 windows that are not held out, two a step
    for layer in find_layers(model):
        assert not torch.equal(layer.weight, before[layer.name])
        # Adam divides by the root of tiny second moments: rounding grows there.
        torch.testing.assert_close(layer.weight, expected[f"{layer.name}.weight"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float64) for kind in MASKS), ("mixed", torch.float32), ("none", torch.float32)]
)
@pytest.mark.parametrize("family", sorted(MODELS))
def test_what_is_fitted_is_what_is_merged(family: str, kind: str, dtype: torch.dtype) -> None:
    model, windows = pruned(family, kind, dtype), counting_windows()
    last = planned_windows(len(windows), SETTINGS)
    seen = 0
    fitted: list[Tensor] = []

    def advance(count: int) -> None:
        nonlocal seen
        seen += count
        if seen == last:  # the last thing before the merge is the loss of the held out windows
            with torch.no_grad():
                fitted.append(model(input_ids=windows.ids, use_cache=False).logits)

    dense = model(input_ids=windows.ids, use_cache=False).logits.detach()
    assert run(model, windows, advance=advance).kept
    merged = model(input_ids=windows.ids, use_cache=False).logits
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    scale = float(merged.abs().max())
    assert float((merged - fitted[0]).abs().max()) < tolerance * scale
    assert float((merged - dense).abs().max()) > 1e-2 * scale


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("family", sorted(MODELS))
def test_masks_stay_to_the_bit(family: str, kind: str) -> None:
    model = pruned(family, kind, torch.float32)
    layers = find_layers(model)
    others = {layer.name + ".weight" for layer in layers}
    biases = {layer.name: None if layer.bias is None else layer.bias.clone() for layer in layers}
    before = bits(model)
    assert run(model).kept
    after = bits(model)
    assert {name for name in before if before[name] != after[name]} == others
    for index, layer in enumerate(layers):
        keep = kept_mask(kind, layer, index)
        gone = layer.weight[~keep]
        assert torch.equal(gone, torch.zeros_like(gone))
        assert not torch.signbit(gone).any()
        assert (layer.weight[keep] != 0).all()
        if kind == "2:4":
            assert (((layer.weight != 0).reshape(layer.rows, -1, 4)).sum(-1) == 2).all()
        if layer.bias is not None:
            assert torch.equal(layer.bias, biases[layer.name])


@pytest.mark.parametrize("family", sorted(MODELS))
def test_the_model_is_built_as_before(family: str) -> None:
    model = pruned(family, "mixed", torch.float32)
    layers = find_layers(model)
    anatomy = Anatomy(model)
    generator_state = torch.get_rng_state()
    model.train()
    model.requires_grad_(True)
    assert heal(model, layers, counting_windows(), settings=SETTINGS, batch_tokens=2048).kept
    anatomy.check(model)
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert all(model.get_submodule(layer.name) is layer.module for layer in layers)
    # And it can be done again.
    assert run(model, settings=HealSettings(rank=2, learning_rate=1e-3)).windows == 8
    anatomy.check(model)


@pytest.mark.parametrize("moment", [1, 2, 5, 9, 10])
def test_an_interruption_leaves_nothing_behind(moment: int) -> None:
    """Of ten windows told of: one before the fit, eight in it, one after it."""
    model = pruned("opt", "mixed", torch.float32)
    anatomy, before = Anatomy(model), bits(model)
    told = 0

    def advance(count: int) -> None:
        nonlocal told
        told += count
        if told >= moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, advance=advance)
    assert bits(model) == before
    if moment > 1:
        anatomy.check(model)


def test_an_interruption_while_merging_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned("opt", "mixed", torch.float32)
    anatomy, before = Anatomy(model), bits(model)
    write, written = PrunableLayer.write, 0

    def stop(layer: PrunableLayer, W_RC: Tensor) -> None:
        nonlocal written
        write(layer, W_RC)
        written += 1
        if written == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(PrunableLayer, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert written == 3
    assert bits(model) == before
    anatomy.check(model)


@pytest.mark.parametrize("injected", [False, True])
def test_trouble_in_peft_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, injected: bool) -> None:
    inject = peft.inject_adapter_in_model

    def trouble(config: Any, model: nn.Module, name: str) -> None:
        if injected:
            inject(config, model, name)
            raise KeyboardInterrupt

    monkeypatch.setattr(peft, "inject_adapter_in_model", trouble)
    model = pruned("llama", "mixed", torch.float32)
    anatomy, before = Anatomy(model), bits(model)
    with pytest.raises(KeyboardInterrupt if injected else SurgeonError, match=None if injected else "no adapter on"):
        run(model)
    assert bits(model) == before
    anatomy.check(model)


def test_a_fit_that_does_not_help_is_not_kept() -> None:
    model, windows = pruned("llama", "mixed", torch.float32), counting_windows()
    anatomy, before = Anatomy(model), bits(model)
    held, _ = heal_module._plan(len(windows), SETTINGS)
    ids = windows.ids.clone()
    ids[held] = VOCABULARY - 1 - ids[held]  # what is learnt is wrong here
    record = run(model, Windows(ids, "w"))
    assert not record.kept
    assert record.loss_after > record.loss_before
    assert record.steps == record.windows == 8
    assert bits(model) == before
    anatomy.check(model)


def test_a_loss_that_is_not_finite_is_named() -> None:
    windows, settings = counting_windows(), HealSettings(seed=2)
    held, visits = heal_module._plan(len(windows), settings)
    for culprit, what in (
        (int(visits[3]), "step 4 of healing"),
        (int(held[0]), f"loss of calibration window {int(held[0])}"),
    ):
        model = pruned("opt", "mixed", torch.float32)
        # A token of its own in one window, whose embedding is not a number.
        ids = windows.ids.clone()
        ids[ids == VOCABULARY - 1] = 0
        ids[culprit, 0] = VOCABULARY - 1
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied
        model.get_input_embeddings().weight.data[VOCABULARY - 1] = math.nan
        anatomy, before = Anatomy(model), bits(model)
        with pytest.raises(NonFiniteError, match=what) as caught:
            run(model, Windows(ids, "w"), settings=settings)
        assert caught.value.index == culprit
        assert f"window {culprit}" in str(caught.value)
        assert bits(model) == before
        if culprit != int(held[0]):
            anatomy.check(model)


def test_an_adapter_that_is_not_finite_is_named() -> None:
    model = pruned("llama", "mixed", torch.float32)
    anatomy, before = Anatomy(model), bits(model)
    head = model.get_output_embeddings()

    def spoil(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad:
            args[0].register_hook(lambda gradient: gradient * math.nan)

    handle = head.register_forward_pre_hook(spoil)
    # A single step: the loss is fine, nothing has run yet with what it made.
    with pytest.raises(NonFiniteError, match=r"adapter of layer model\.layers\.0\.self_attn\.q_proj .* after step 1"):
        run(model, settings=HealSettings(epochs=0.1))
    with pytest.raises(NonFiniteError, match="loss of step 2 of healing is not finite"):
        run(model)
    handle.remove()
    assert bits(model) == before
    anatomy.check(model)


def test_a_seed_is_a_result() -> None:
    results = []
    for seed, batch_tokens in ((1, 2048), (1, 2048), (1, 12), (2, 2048)):
        model = pruned("llama", "mixed")
        torch.manual_seed(len(results))  # of no concern
        record = run(
            model,
            settings=HealSettings(rank=3, learning_rate=1e-2, step_windows=3, seed=seed),
            batch_tokens=batch_tokens,
        )
        results.append((record, bits(model), torch.cat([layer.weight.flatten() for layer in find_layers(model)])))
    assert results[0][0] == results[1][0]
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][2], results[2][2], rtol=1e-7, atol=1e-9)
    assert not torch.allclose(results[0][2], results[3][2], rtol=1e-3)


def test_padding_has_no_say() -> None:
    windows = counting_windows(5)
    mask = torch.ones_like(windows.ids, dtype=torch.bool)
    mask[:, 9:] = False
    weights = []
    for filler in (0, 11):
        model = pruned("llama", "elements")
        ids = torch.where(mask, windows.ids, filler)
        assert run(model, Windows(ids, "padded", mask)).kept
        weights.append(torch.cat([layer.weight.flatten() for layer in find_layers(model)]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)
    model = pruned("llama", "elements")
    assert run(model, Windows(windows.ids[:, :9], "short")).kept
    short = torch.cat([layer.weight.flatten() for layer in find_layers(model)])
    torch.testing.assert_close(weights[0], short, rtol=1e-7, atol=1e-9)


def test_keeps_say_what_may_change() -> None:
    model = pruned("opt", "rows-columns")
    layers = find_layers(model)
    keeps = [kept_mask("rows-columns", layer, index) for index, layer in enumerate(layers)]
    accidents = []
    for layer, keep in zip(layers, keeps, strict=True):
        row, column = (int(i) for i in keep.nonzero()[0])
        layer.weight[row, column] = 0.0
        accidents.append((row, column))
    stand_ins = []

    def look(_count: int) -> None:
        stand_ins.append(sum(isinstance(module, adapters._MaskedLinear) for module in model.modules()))

    def with_bias_column(index: int) -> Tensor:
        return torch.cat([keeps[index], keeps[index].any(1, keepdim=True)], 1)

    assert run(model, keeps=with_bias_column, advance=look).kept
    assert set(stand_ins) == {0}  # all of them the cheap way
    for layer, keep in zip(layers, keeps, strict=True):
        assert not layer.weight[~keep].any()
    # (Not all: where a neuron never fires there is nothing to learn.)
    assert sum(bool(layer.weight[accident]) for layer, accident in zip(layers, accidents, strict=True)) > 6
    # A row or column that is all zero is dead, whatever the mask says of it.
    model = pruned("opt", "rows-columns")
    assert run(model, keeps=lambda index: torch.ones(layers[index].shape, dtype=torch.bool)).kept
    assert not any(layer.weight[~keep].any() for layer, keep in zip(find_layers(model), keeps, strict=True))
    # Left to itself it takes each zero for a removed weight.
    model = pruned("opt", "rows-columns")
    for layer, accident in zip(find_layers(model), accidents, strict=True):
        layer.weight[accident] = 0.0
    stand_ins.clear()
    assert run(model, advance=look).kept
    assert max(stand_ins) == len(layers)
    assert not any(layer.weight[accident] for layer, accident in zip(find_layers(model), accidents, strict=True))


def test_half_precision_is_fitted_in_single() -> None:
    model = pruned("llama", "mixed", torch.bfloat16)
    windows = counting_windows()
    dtypes: set[torch.dtype] = set()

    def look(_count: int) -> None:
        dtypes.update(
            p.dtype for m in model.modules() if isinstance(m, adapters._MaskedLinear) for p in (m._fit.A, m._fit.B)
        )

    record = run(model, windows, advance=look)
    assert record.kept
    assert dtypes == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for index, layer in enumerate(find_layers(model)):
        assert not layer.weight[~kept_mask("mixed", layer, index)].any()


def test_the_masked_product_has_the_right_gradients() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X, W, A, B = draw(2, 3, 5), draw(4, 5), draw(2, 5), draw(4, 2)
    mask = draw(4, 5) > 0
    torch.testing.assert_close(
        adapters._MaskedProduct.apply(X, W, mask, A, B),
        functional.linear(X, W + mask * (B @ A)),
        rtol=1e-13,
        atol=1e-13,
    )
    X, A, B = (t.requires_grad_() for t in (X, A, B))
    assert torch.autograd.gradcheck(lambda x, a, b: adapters._MaskedProduct.apply(x, W, mask, a, b), (X, A, B))


@pytest.mark.parametrize(
    ("count", "epochs", "held", "visits"),
    [
        (1, 1.0, 1, 1),
        (2, 1.0, 1, 1),
        (9, 1.0, 1, 8),
        (32, 1.0, 4, 28),
        (128, 0.025, 3, 3),
        (128, 5.0, 16, 560),
        (16, 1.5, 2, 21),
        (4, 1e-6, 1, 1),
    ],
)
def test_plan(count: int, epochs: float, held: int, visits: int) -> None:
    settings = HealSettings(epochs=epochs, seed=count)
    out, order = heal_module._plan(count, settings)
    assert (len(out), len(order)) == (held, visits)
    assert planned_windows(count, settings) == 2 * held + visits
    if count > 1:
        assert not set(out.tolist()) & set(order.tolist())
        rest = count - held
        for first in range(0, visits - rest + 1, rest):
            assert len(set(order[first : first + rest].tolist())) == rest  # every one once a pass
    windows = Windows(counting_windows(count, 4).ids, "w")
    if visits < 30:
        told: list[int] = []
        record = run(tiny_llama(), windows, settings=settings, advance=told.append)
        assert sum(told) == planned_windows(count, settings)
        assert (record.held_out, record.windows) == (held, visits)


def test_without_peft_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_peft()
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny_llama()
    before = bits(model)
    for call in (require_peft, lambda: run(model)):
        with pytest.raises(ConfigError, match=r"pip install 'llm-surgeon\[heal\]'"):
            call()
    monkeypatch.setattr(heal_module, "find_spec", lambda _name: object())  # installed, and broken
    with pytest.raises(ConfigError, match=r"pip install 'llm-surgeon\[heal\]'"):
        run(model)
    assert bits(model) == before


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"epochs": -1.0},
        {"epochs": math.inf},
        {"step_windows": 0},
        {"seed": -1},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad)).replace("_", "-")):
        HealSettings(**bad)
