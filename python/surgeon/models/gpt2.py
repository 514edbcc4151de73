"""GPT-2: ``Conv1D`` layers (the weight transposed), q, k and v in one, biases everywhere, learned positions."""

from surgeon.models.base import Adapter, Attention, Mlp, register

GPT2 = register(
    Adapter(
        family="GPT-2",
        model_types=("gpt2",),
        blocks="transformer.h",
        linears={"qkv": "attn.c_attn", "o": "attn.c_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"},
        mlp=Mlp(inner=("fc1",), output="fc2", activation="activation_function"),
        attention=Attention(q="qkv", k="qkv", v="qkv", output="o", layout="stacked"),
    )
)
