"""LLaMA: rotary positions, grouped-query attention, SwiGLU, usually no biases."""

from surgeon.models.base import Adapter, Attention, Mlp, register

LLAMA = register(
    Adapter(
        family="LLaMA",
        model_types=("llama",),
        blocks="model.layers",
        linears={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        },
        mlp=Mlp(inner=("gate", "up"), output="down"),
        attention=Attention(q="q", k="k", v="v", output="o"),
    )
)
