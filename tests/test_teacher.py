"""The embedded teacher's plain copy is the model in its GGUF file; models with a damaged file are refused in a line."""
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kdcode import cli
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


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 1048576\n"
DAMAGES = {"empty": lambda content: b"", "cut off": lambda content: content[:len(content) // 2],
           "pointer": lambda content: LFS_POINTER}


@pytest.fixture(scope="module")
def models(tiny_teacher, pair, tmp_path_factory):
    """Folders of a teacher, of a student, and of a teacher in a GGUF file."""
    from kdcode.export import export_gguf
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_teacher, folder/"teacher")
    pair[1].save_pretrained(folder/"student")
    (folder/"gguf").mkdir()
    export_gguf(pair[0].model, pair[0].tokenizer, folder/"gguf"/"model.gguf")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["teacher/config.json", "teacher/tokenizer.json", "teacher/tokenizer_config.json",
                                  "teacher/model.safetensors", "student/config.json", "student/model.safetensors",
                                  "gguf/model.gguf"])
def test_a_damaged_file_is_told_in_one_line(models, tmp_path, capsys, file, damage):
    """As a download that was interrupted, or a clone without Git LFS, leaves it."""
    folder = shutil.copytree(models, tmp_path/"models")
    content = (folder/file).read_bytes()
    (folder/file).write_bytes(DAMAGES[damage](content))
    teacher = "gguf/model.gguf" if file.startswith("gguf") else "teacher"
    status = cli.main(["generate", "x", "--teacher.name", folder/teacher, "--draft", folder/"student",
                       "--decode.max_new_tokens", "4"])
    *before, last = capsys.readouterr().err.rstrip().splitlines()
    assert (status, last.startswith("kdcode: "), str((folder/file).parent) in last) == (2, True, True), last
    assert not [line for line in before if not line.startswith("kdcode generate: ")], before
