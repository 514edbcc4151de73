"""OPT: learned positions, biases everywhere, ReLU."""

from surgeon.models.base import Adapter, register

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
    )
)
