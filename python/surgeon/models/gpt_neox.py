"""GPT-NeoX and Pythia: q, k and v in one projection head by head, biases, attention and MLP mostly side by side."""

from surgeon.models.base import Adapter, Attention, Mlp, register

GPT_NEOX = register(
    Adapter(
        family="GPT-NeoX",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        linears={
            "qkv": "attention.query_key_value",
            "o": "attention.dense",
            "fc1": "mlp.dense_h_to_4h",
            "fc2": "mlp.dense_4h_to_h",
        },
        mlp=Mlp(inner=("fc1",), output="fc2"),
        attention=Attention(q="qkv", k="qkv", v="qkv", output="o", layout="interleaved"),
    )
)
