"""The embedded teacher's plain copy is the model in its GGUF file."""
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kdcode.files import embedded_teacher
from kdcode.teacher import load_teacher


@pytest.mark.slow
def test_plain_copy_equals_the_gguf_file():
    file = embedded_teacher()
    copied = load_teacher("smollm2")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    weights = copied.model.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    for name in ("config", "generation_config"):
        ours, theirs = getattr(copied.model, name).to_dict(), getattr(model, name).to_dict()
        for part in (ours, theirs):
            part.pop("_name_or_path", None), part.pop("architectures", None)
        assert ours == theirs
    text = "def fibonacci(n):\n    \"\"\"Größe 😀\"\"\"\n\tif n < 2: return n<|im_end|>\n"
    assert copied.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert copied.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert copied.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    chat = [{"role": "user", "content": "Hi"}]
    assert copied.tokenizer.apply_chat_template(chat, tokenize=False) == \
        tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text).input_ids
    assert copied.tokenizer.decode(ids) == tokenizer.decode(ids)
