"""Phi-3 to Phi-4: q, k and v in one projection, gate and up in another, no biases."""

from surgeon.models.base import Adapter, Attention, Mlp, register

PHI3 = register(
    Adapter(
        family="Phi-3",
        model_types=("phi3",),
        blocks="model.layers",
        linears={
            "qkv": "self_attn.qkv_proj",
            "o": "self_attn.o_proj",
            "gate_up": "mlp.gate_up_proj",
            "down": "mlp.down_proj",
        },
        mlp=Mlp(inner=("gate_up",), output="down"),
        attention=Attention(q="qkv", k="qkv", v="qkv", output="o", layout="stacked"),
    )
)
