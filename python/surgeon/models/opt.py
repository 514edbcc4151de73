"""OPT: learned positions, biases everywhere, ReLU."""

from surgeon.models.base import Adapter, Attention, Mlp, register

OPT = register(
    Adapter(
        family="OPT",
        model_types=("opt",),
        blocks="model.decoder.layers",
        linears={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
            "fc1": "fc1",
            "fc2": "fc2",
        },
        mlp=Mlp(inner=("fc1",), output="fc2", activation="activation_function"),
        attention=Attention(q="q", k="k", v="v", output="o"),
    )
)
