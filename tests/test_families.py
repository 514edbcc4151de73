"""The contract of a model family, held by every one: matching, units, curvature, a pruned checkpoint and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN

from surgeon.config import PruneConfig
from surgeon.curvature import kfac
from surgeon.data import Windows
from surgeon.errors import ModelError
from surgeon.layers import PrunableLayer
from surgeon.models import LoadedModel, Matched, adapter_for, load_model, match_layers, supported_model_types
from surgeon.models.units import UnitGroup, unit_groups, zero_at_zero
from surgeon.session import Session
from tests.conftest import FAMILIES, VOCABULARY, tiny_llama, tiny_of
from tests.oracles.moments import naive_moments

# Names of a block's layers in forward order.
LLAMA_LIKE = (
    "model.layers",
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
)
NAMES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), LLAMA_LIKE),
    "opt": (
        "model.decoder.layers",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    ),
    "phi": (
        "model.layers",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense mlp.fc1 mlp.fc2",
    ),
    "phi3": ("model.layers", "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    "gpt2": ("transformer.h", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    "gpt_neox": (
        "gpt_neox.layers",
        "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    ),
}


def biased_llama() -> PreTrainedModel:
    """Gate and up rows with biases: what a neuron computes from a zero row is not nothing then."""
    torch.manual_seed(0)
    sizes = tiny_llama().config.to_dict() | {"attention_bias": True, "mlp_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def serial_neox() -> PreTrainedModel:
    return tiny_of("gpt_neox", use_parallel_residual=False)


def multi_query_gemma() -> PreTrainedModel:
    return tiny_of("gemma", num_key_value_heads=1, attention_bias=True)


CASES: dict[str, Callable[[], PreTrainedModel]] = {
    **FAMILIES,
    "llama, biased": biased_llama,
    "gemma, one key/value head": multi_query_gemma,
    "gpt_neox, serial": serial_neox,
}
BOTH = frozenset({"neuron", "head"})


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return CASES[request.param]().double().requires_grad_(False)


def windows(n: int = 4, length: int = 12, seed: int = 3) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(0, VOCABULARY, (n, length), generator=generator), "random")


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=windows(2).ids, use_cache=False).logits


def zero(layer: PrunableLayer, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    W = layer.read(torch.float64)
    if rows is not None:
        W[rows.flatten()] = 0
    if columns is not None:
        W[:, columns.flatten()] = 0
    layer.write(W)


def test_every_supported_type_is_held_to_the_contract() -> None:
    assert set(supported_model_types()) == set(FAMILIES) == set(NAMES)


# Matching.


def test_layers_are_these_in_the_order_of_the_forward_pass(model: PreTrainedModel) -> None:
    matched = match_layers(model)
    blocks, paths = NAMES[model.config.model_type]
    names = [layer.name for layer in matched.layers]
    assert names == [f"{blocks}.{block}.{path}" for block in range(2) for path in paths.split()]
    assert [layer.block for layer in matched.layers] == sorted(layer.block for layer in matched.layers)
    assert matched.skipped == ("lm_head",)
    reached: list[str] = []
    for layer in matched.layers:
        layer.module.register_forward_hook(lambda *_, name=layer.name: reached.append(name))
    logits(model)
    assert reached == names


def test_every_matrix_of_a_block_is_matched(model: PreTrainedModel) -> None:
    matched = match_layers(model)
    found = {id(layer.module.weight) for layer in matched.layers}
    assert found == {id(p) for block in matched.blocks for p in block.parameters() if p.ndim > 1}
    assert matched.parameters == sum(
        p.numel() for layer in matched.layers for p in layer.module.parameters(recurse=False)
    )


def test_a_linear_that_is_left_alone_is_named() -> None:
    matched = match_layers(tiny_of("gpt2", add_cross_attention=True))
    assert "transformer.h.1.crossattention.q_attn" in matched.skipped
    assert len(matched.layers) == 8


def test_a_layer_is_what_its_module_computes(model: PreTrainedModel) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = match_layers(model).layers
    for layer in layers:
        layer.module.register_forward_hook(
            lambda _m, args, out, name=layer.name: seen.__setitem__(name, (args[0], out))
        )
    logits(model)
    for layer in layers:
        X, Y = seen[layer.name]
        W = layer.read(torch.float64)
        assert W.is_contiguous()
        assert W.shape == layer.shape
        if layer.has_bias:
            X = torch.cat([X, torch.ones_like(X[..., :1])], -1)
        torch.testing.assert_close(X @ W.T, Y, rtol=1e-12, atol=1e-12)


def test_reading_and_writing_change_nothing(model: PreTrainedModel) -> None:
    before = logits(model)
    for layer in match_layers(model).layers:
        W = layer.read(torch.float64)
        layer.write(W)
        W.zero_()  # a copy, not the live weight
    assert torch.equal(logits(model), before)


# Units.


def groups_of(model: PreTrainedModel) -> tuple[Matched, tuple[UnitGroup, ...]]:
    matched = match_layers(model)
    return matched, unit_groups(matched, model.config, BOTH)


def test_units_part_the_width_and_the_heads(model: PreTrainedModel) -> None:
    """Every row of the inner layers and every input of the output layers is in exactly one unit."""
    matched, groups = groups_of(model)
    assert [(g.block, g.kind) for g in groups] == sorted((g.block, g.kind) for g in groups)
    rows: dict[int, list[int]] = {}
    columns: dict[int, list[int]] = {}
    for group in groups:
        columns.setdefault(group.output, []).extend(group.columns.flatten().tolist())
        for part in group.own:
            assert part.index.shape[0] == group.units
        for part in group.shared:
            assert part.index.shape[0] == 1
        for part in (*group.own, *group.shared):
            rows.setdefault(part.layer, []).extend(part.index.flatten().tolist())
    for of, size in ((rows, "rows"), (columns, "inputs")):
        for layer, indices in of.items():
            assert sorted(indices) == list(range(getattr(matched.layers[layer], size)))
    assert set(rows) | set(columns) == set(range(len(matched.layers)))
    heads = sum(g.units for g in groups if g.kind == "head")
    neurons = sum(g.units for g in groups if g.kind == "neuron")
    assert (heads, neurons) == (2 * 4, 2 * 24)
    freed = sum(g.units * g.unit_size(matched.layers) + g.shared_size(matched.layers) for g in groups)
    # All but the biases of the output layers, which belong to no unit.
    assert freed == matched.parameters - sum(matched.layers[i].rows for i in columns if matched.layers[i].has_bias)


def test_removing_a_unit_is_removing_its_columns(model: PreTrainedModel) -> None:
    """Whatever rows go along, the logits stay those of the model without the output columns."""
    matched, groups = groups_of(model)
    dense = logits(model)
    state = copy.deepcopy(model.state_dict())
    for group in groups:
        output = matched.layers[group.output]
        units = torch.arange(group.units)
        for chosen in (units[-1:], units[:: max(1, group.units // 2)], units):
            zero(output, columns=group.columns[chosen])
            expected = logits(model)
            if len(chosen) == group.units:  # a single neuron may be a ReLU that never fires
                assert not torch.allclose(expected, dense)
            for part in group.own:
                zero(matched.layers[part.layer], rows=part.index[chosen])
            if len(chosen) == group.units:
                for part in group.shared:
                    zero(matched.layers[part.layer], rows=part.index)
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
            model.load_state_dict(state)
    assert torch.equal(logits(model), dense)


def check_sources(model: PreTrainedModel, matched: Matched, groups: tuple[UnitGroup, ...]) -> None:
    """Each part alone makes a unit zero."""
    state = copy.deepcopy(model.state_dict())
    for group in groups:
        chosen = torch.tensor([1, group.units - 1]) if group.kind == "neuron" else torch.arange(group.units)
        zero(matched.layers[group.output], columns=group.columns[chosen])
        expected = logits(model)
        model.load_state_dict(state)
        for part in group.sources:
            # Values are one group's: shared by its heads.
            zero(matched.layers[part.layer], rows=part.index if group.kind == "head" else part.index[chosen])
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
            model.load_state_dict(state)


def test_without_its_sources_a_unit_is_gone(model: PreTrainedModel) -> None:
    matched, groups = groups_of(model)
    check_sources(model, matched, groups)
    for group in groups:
        assert group.sources == (group.own if group.kind == "neuron" else (*group.own, *group.shared)[-1:])


def test_only_the_kinds_asked_for() -> None:
    model = tiny_of("phi3")
    matched = match_layers(model)
    assert {g.kind for g in unit_groups(matched, model.config, frozenset({"head"}))} == {"head"}
    assert {g.kind for g in unit_groups(matched, model.config, frozenset({"neuron"}))} == {"neuron"}


@pytest.mark.parametrize("model_type", ["mistral", "phi3", "gpt_neox"])
def test_heads_that_do_not_fit_are_refused(model_type: str) -> None:
    model = tiny_of(model_type)
    model.config.num_key_value_heads = 3 if model_type == "mistral" else 1
    with pytest.raises(ModelError, match=r"layers\.0\..*does not fit 4 heads in"):
        unit_groups(match_layers(model), model.config, BOTH)


@pytest.mark.parametrize("model_type", ["gpt_neox", "phi3", "qwen2"])
def test_rows_under_an_activation_that_is_not_zero_at_zero_are_no_sources(model_type: str) -> None:
    """sigmoid(0) is ½ for every token: a neuron without its fc1 or gate row is still there."""
    model = tiny_of(model_type, hidden_act="sigmoid").double()
    matched, groups = groups_of(model)
    neurons = next(group for group in groups if group.kind == "neuron")
    assert neurons.sources == neurons.own[1:]  # the up rows, if there are any
    assert all(group.sources for group in groups if group.kind == "head")
    check_sources(model, matched, groups)
    zero(matched.layers[neurons.own[0].layer], rows=neurons.own[0].index[:1])
    rowless = logits(model)
    zero(matched.layers[neurons.output], columns=neurons.columns[:1])
    assert not torch.allclose(logits(model), rowless)


@pytest.mark.parametrize("name", sorted(set(ACT2FN)))
def test_zero_at_zero(name: str) -> None:
    value = float(ACT2FN[name].double()(torch.zeros(1, dtype=torch.float64)).detach())
    assert zero_at_zero(name) == (value == 0.0)
    if name in {"relu", "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu2"}:
        assert zero_at_zero(name)
    if name in {"sigmoid", "laplace", "xielu"}:
        assert not zero_at_zero(name)


def test_an_unknown_activation_is_not_trusted() -> None:
    assert not zero_at_zero("made-up")


# Curvature, pruning, files.


def test_curvature_equals_a_per_token_loop(model: PreTrainedModel) -> None:
    data = windows()
    layers = match_layers(model).layers
    factors = kfac(model, layers, data, batch_tokens=24, accumulate=torch.float64, advance=lambda _n: None)
    A, G = naive_moments(model, {layer.name: layer.module for layer in layers}, list(data.ids))  # type: ignore[misc]
    # Eager attention (soft-capped scores) takes its softmax in float32.
    close = 1e-5 if model.config._attn_implementation == "eager" else 1e-10
    keys: dict[tuple[int, str], str] = {}
    for layer, found in zip(layers, factors.layers, strict=True):
        assert found.A_CC is not None
        assert found.G_RR is not None
        torch.testing.assert_close(found.A_CC, A[layer.name], rtol=close, atol=1e-2 * close)
        torch.testing.assert_close(found.G_RR, G[layer.name], rtol=close, atol=1e-2 * close)
        keys[layer.block, layer.role] = found.a_key
    for group in (("q", "k", "v"), ("gate", "up")):
        for block in range(2):
            assert len({keys[block, role] for role in group if (block, role) in keys}) <= 1


def test_a_pruned_model_goes_to_disk_and_back(model: PreTrainedModel, tmp_path: Path) -> None:
    config = PruneConfig(precision="float64", sequence_length=12, shots=2, sparsity=0.3)
    dense = logits(model)
    run = Session(
        LoadedModel(model, torch.float64, "tiny"), match_layers(model), calibration=windows(), test=None, config=config
    )
    state = run.run()
    assert 0.3 <= state.ledger.sparsity < 0.32
    assert sum(int((layer.read(torch.float64) == 0).sum()) for layer in run.layers) >= state.ledger.removed
    pruned = logits(model)
    assert not torch.allclose(pruned, dense)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(again) is type(model)
    assert torch.equal(logits(again), pruned)
    ours = load_model(str(tmp_path), device=torch.device("cpu"), precision=torch.float64)
    assert torch.equal(logits(ours.model), pruned)
    assert ours.storage_dtype == torch.float64


@pytest.mark.parametrize(
    ("model_type", "renamed", "computed"),
    [
        # The hub's GPT-2 has no prefix and carries its causal masks.
        ("gpt2", ("transformer.", ""), ("h.0.attn.bias", "h.1.attn.bias")),
        # Pythia names the head embed_out.
        (
            "gpt_neox",
            ("lm_head.", "embed_out."),
            (
                "gpt_neox.layers.0.attention.bias",
                "gpt_neox.layers.0.attention.masked_bias",
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
            ),
        ),
    ],
)
def test_old_checkpoints_load(
    model_type: str, renamed: tuple[str, str], computed: tuple[str, ...], tmp_path: Path
) -> None:
    model = tiny_of(model_type)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {key.replace(*renamed): value for key, value in load_file(file).items()}
    weights |= {key: torch.ones(1, 1, 8, 8) for key in computed}
    save_file(weights, file, metadata={"format": "pt"})
    loaded = load_model(str(tmp_path), device=torch.device("cpu"), precision=torch.float32)
    assert torch.equal(logits(loaded.model), logits(model))


# Refusals.


MIXTURES = """
    mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 olmoe phimoe granitemoe gpt_oss dbrx llama4 llama4_text jamba
"""


@pytest.mark.parametrize("model_type", MIXTURES.split())
def test_mixtures_of_experts_are_refused_as_such(model_type: str) -> None:
    with pytest.raises(ModelError) as caught:
        adapter_for(AutoConfig.for_model(model_type))
    message = str(caught.value)
    assert message.startswith(f"mixture-of-experts models, of which type {model_type!r} is one, are not supported yet;")
    assert "\n" not in message


def test_experts_are_counted() -> None:
    config = AutoConfig.for_model("granitemoehybrid", num_local_experts=0)
    with pytest.raises(ModelError, match=r"^models of type 'granitemoehybrid' are not supported; supported are: gemma"):
        adapter_for(config)
    config.moe_num_experts = [64, 64]  # one count for text, one for images
    with pytest.raises(ModelError, match=r"^mixture-of-experts"):
        adapter_for(config)


def test_other_families_are_refused() -> None:
    with pytest.raises(ModelError, match=r"^models of type 'bert' are not supported; supported are: .*llama.*opt"):
        adapter_for(AutoConfig.for_model("bert"))
