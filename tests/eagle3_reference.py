"""Write the logits of speculators' EAGLE-3 model; test_engines.py runs it with that package on the path.

Usage: eagle3_reference.py FOLDER FILE, a head in speculators' form, and tensors (embedding, input_ids, features, steps)
"""
import sys

import torch
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig


def main(folder: str, file: str) -> None:
    """Replace the tensors in the file by the logits of each step, (time, draft vocabulary)."""
    given = load_file(file)
    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel(config).eval()
    model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
    model.embed_tokens.weight.data = given["embedding"]
    logits = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0].clone()))
    ids, features = given["input_ids"], given["features"]
    with torch.no_grad():  # a pair is a token and the features of the position before it
        model(features[:, :-1], ids[:, 1:], torch.zeros(1, ids.shape[1] - 1, dtype=torch.long),
              ttt_steps=int(given["steps"]))
    save_file({str(step): one for step, one in enumerate(logits, 1)}, file)


main(*sys.argv[1:])
