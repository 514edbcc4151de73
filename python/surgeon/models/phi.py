"""Phi-1 to Phi-2: biases everywhere (the head's too), attention and MLP side by side on one norm."""

from surgeon.models.base import Adapter, Attention, Mlp, register

PHI = register(
    Adapter(
        family="Phi",
        model_types=("phi",),
        blocks="model.layers",
        linears={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.dense",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
        },
        mlp=Mlp(inner=("fc1",), output="fc2"),
        attention=Attention(q="q", k="k", v="v", output="o"),
    )
)
