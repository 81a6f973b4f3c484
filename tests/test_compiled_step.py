"""The compiled step: failures of the compiler, processes and threads, changed models, exact decoding with graphs."""
import copy
import json
import os
import resource
import threading
import warnings
from unittest import mock

import pytest
import torch
from conftest import Forked, step_forms
from scipy.stats import chisquare
from torch import nn
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import (
    BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
    Qwen2Config, Qwen2ForCausalLM)

from kdcode import cached_model, decode, drafters
from kdcode.batching import Batch
from kdcode.cached_model import CachedModel, LinearKernel
from kdcode.compiled_step import (
    compile_in_background, compile_steps, CompiledModel, grouped_attention, is_on_disk, mark_on_disk, READY, REFUSED,
    StaticModel, StepKind, use_compiler_cache, user_code_folder)
from kdcode.config import DecodeSettings
from kdcode.decode import make_sequences, speculative_generate
from kdcode.drafters import AcceptanceEstimate, AdaptiveDrafter, LatencyModel, ModelDrafter
from kdcode.eagle import EagleStudent, LegacyEagleConfig, LegacyEagleStudent
from kdcode.provenance import processor_hash
from kdcode.sampling import SamplingParams

STEP = StepKind(False, 2)  # one row, several tokens
COMPILED = pytest.param("compiled", marks=pytest.mark.slow)  # a minute of compilation


def tiny(seed=0, kind=LlamaForCausalLM, config=LlamaConfig, **changes):
    """Return a random model with 64 tokens and a context of 64."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, initializer_range=.3, bos_token_id=None,
                 eos_token_id=None)
    return kind(config(**shape | changes)).eval()


@torch.no_grad()
def second_call(kind, model, **options):
    """Return the logits of a call over two tokens after three others, in float32."""
    state = kind(model, 64, **options)
    state.forward([[1, 2, 3]], [1])
    return state.forward([[4, 5]], [2])[0][0].float()


def difference(model, **options):
    """Return by how much the logits of a compiled model differ from those of the model."""
    return (second_call(CompiledModel, model, **options) - second_call(CachedModel, model)).abs().max().item()


def report():
    """Compile a graph; return whether it is used, how much its logits differ, and all warnings."""
    model = tiny(num_hidden_layers=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = compile_steps(model, [STEP])
        lines = [str(warning.message) for warning in caught if "compiled" in str(warning.message)]
        return {"compiled": compiled, "difference": difference(model), "lines": lines}


def main(words):
    """Print a report, as a program; `no-compiler`: the compiler is missing; `full-disk`: no file can grow meanwhile.

    Without vector instructions, the C++ code compiles in half the time.
    """
    settings, limits = {"cpp.vec_isa_ok": False}, resource.getrlimit(resource.RLIMIT_FSIZE)
    if "no-compiler" in words: settings |= {"cpp.cxx": ("/nonexistent",)}
    if "full-disk" in words: resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    with torch._inductor.config.patch(settings): found = report()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    print(json.dumps(found))


def process(forks, folder, *words):
    """Start `main` in a process with a folder for compiled code."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"XDG_CACHE_HOME": str(folder)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    return Forked(forks, words, folder, environment, "test_compiled_step:main")


def result(child):
    """Return the report of a process."""
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, (child.returncode, err)
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def processes(forks, tmp_path_factory):
    """Start processes at once: without a compiler, on a full disk, and two with the same folder. Return the reports."""
    folder = tmp_path_factory.mktemp("compiled")
    children = {"no compiler": process(forks, folder/"none", "no-compiler"),
                "full disk": process(forks, folder/"full", "full-disk"),
                "first": process(forks, folder/"shared"), "second": process(forks, folder/"shared")}
    return folder/"shared", {name: result(child) for name, child in children.items()}


def falls_back(found, message):
    """Return whether a report is that of a model without graphs, with this message in one line."""
    return not found["compiled"] and found["difference"] == 0 and len(found["lines"]) == 1 and (
        message in found["lines"][0] and "runs without compiled steps" in found["lines"][0]
        and "\n" not in found["lines"][0])


@pytest.mark.slow
def test_no_compiler(processes):
    assert falls_back(processes[1]["no compiler"], "No working C++ compiler")


@pytest.mark.slow
def test_full_disk(processes):
    assert falls_back(processes[1]["full disk"], "File too large")  # which stands for no space left on the device


@pytest.mark.slow
def test_two_processes_compile_at_once(processes):
    folder, reports = processes
    for found in (reports["first"], reports["second"]):
        assert found["compiled"] and found["difference"] < 1e-4 and not found["lines"]
    assert list(folder.rglob("*.so"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda code: b"junk" * 20, lambda code: code[:len(code) // 2]],
                         ids=["overwritten", "cut"])
def test_damaged_cache(processes, forks, damage):
    """Damaged code is compiled again, which at most one line says, and the next process loads it."""
    for file in [file for file in processes[0].rglob("*") if file.is_file()]:
        file.write_bytes(damage(file.read_bytes()))
    repaired, loaded = (result(process(forks, processes[0])) for _ in range(2))
    for found in (repaired, loaded): assert found["compiled"] and found["difference"] < 1e-4, found
    assert len(repaired["lines"]) <= 1 and all("was damaged" in line for line in repaired["lines"]), repaired
    assert not loaded["lines"]


@pytest.fixture
def code_on_disk(monkeypatch, tmp_path):
    """A model, and a folder that has the mark of its graph."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(user_code_folder()))
    model = tiny()
    mark_on_disk(model, STEP)
    return model, user_code_folder()


def compiling(*outcomes):
    """Replace the compiler by these errors, or by equal logits (None)."""
    outcomes = [(0., 0.) if error is None else error for error in outcomes]
    return mock.patch("kdcode.compiled_step.compile_step", side_effect=outcomes)


def test_code_that_does_not_load_is_compiled_again(code_on_disk):
    model, folder = code_on_disk
    (damaged := folder/"code.so").touch()
    errors = OSError("file too short"), None
    with compiling(*errors), pytest.warns(UserWarning, match="damaged .file too short.") as lines:
        assert compile_steps(model, [STEP])
    assert len(lines) == 1 and not damaged.exists() and is_on_disk(model, STEP)


def test_a_compiler_that_fails_is_asked_once_more_only_after_damage(code_on_disk, monkeypatch, tmp_path):
    """Not for a new graph, nor in a folder that the user named, which stays; and once only."""
    model, folder = code_on_disk
    with compiling(*[OSError("no space left")] * 2) as calls, pytest.warns(UserWarning, match="without compiled steps"):
        assert not compile_steps(model, [STEP])
    assert calls.call_count == 2
    with compiling(OSError("no compiler")) as calls, pytest.warns(UserWarning, match="without compiled steps"):
        assert not compile_steps(model, [STEP])  # its mark is gone
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path/"named"))
    mark_on_disk(model, STEP)
    with compiling(OSError("file too short")), pytest.warns(UserWarning, match="without compiled steps"):
        assert not compile_steps(model, [STEP])
    assert is_on_disk(model, STEP)


def test_unwritable_cache_folder(monkeypatch, tmp_path):
    (tmp_path/"file").touch()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"file"))
    with pytest.warns(UserWarning, match="compiled code is not kept: .*file.*cannot be written") as caught:
        use_compiler_cache()
    assert len(caught) == 1 and "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_cache_folder(monkeypatch, tmp_path):
    """The user's cache takes the place of PyTorch's default, and not of a folder that the user names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = str(tmp_path/"kdcode"/"compiled"/processor_hash())
    for named, expected in ((default_cache_dir(), ours), ("/named", "/named")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named)
        use_compiler_cache()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == expected


@pytest.mark.slow
def test_second_graph_fails():
    """The model decodes without graphs, also if it was asked to compile, and does not try again."""
    assert compile_steps(tiny(), [STEP])  # its graph fits the next model, too
    model, fail = tiny(), mock.Mock(side_effect=OSError(28, "No space left on device"))
    with mock.patch.object(GraphLowering, "run", fail), torch._inductor.config.patch(force_disable_caches=True):
        with pytest.warns(UserWarning, match="runs without compiled steps: .*No space left on device"):
            assert not compile_steps(model, [STEP, StepKind(True, 1)])
        assert difference(model, compile=True) == 0
    assert fail.call_count == 1 and model in REFUSED and not READY.get(model)


@pytest.mark.parametrize("wrong", [float("nan"), 1e3])
def test_wrong_graph_is_refused(monkeypatch, wrong):
    """A graph whose logits are not those of the model is not used."""
    def compiled(model, layers, input_ids, *others):
        return torch.full((*input_ids.shape, 64), wrong), None
    monkeypatch.setattr("kdcode.compiled_step.compiler", lambda device: compiled)
    model = tiny()
    with pytest.warns(UserWarning, match="runs without compiled steps: logits"):
        assert not compile_steps(model, [STEP])


@pytest.mark.slow
def test_4bit_weights(tmp_path):
    """A model in NF4 is compiled as a whole, and a changed scale gives the changed model's logits."""
    tiny(num_hidden_layers=1, hidden_size=64).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                 bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=options).eval()
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit" and compile_steps(model, [STEP])
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    check_change(model, lambda m: state.absmax.mul_(2))


def double(module, inputs, output): return output * 2
def double_input(module, inputs): return (inputs[0] * 2,)


class Adapter(nn.Module):
    """A linear layer with a low-rank update that can be switched off."""

    def __init__(self, base):
        super().__init__()
        self.base, self.active = base, True
        self.a, self.b = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x): return self.base(x) + self.active * self.b(self.a(x))


CHANGES = {
    "weight in place": lambda m: m.lm_head.weight.data.mul_(2),
    "weight": lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight * 2)),
    "dtype": lambda m: m.bfloat16(),
    "attribute": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 3.),
    "submodule": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.ReLU()),
    "forward": lambda m: setattr(m.model.layers[0].mlp, "forward", lambda x: x),
    "buffer": lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq * 3),
    "layer removed": lambda m: m.model.layers.pop(1) and setattr(m.config, "num_hidden_layers", 1),
    "adapter": lambda m: setattr(m.model.layers[0].mlp, "up_proj", Adapter(m.model.layers[0].mlp.up_proj)),
    "hook of the head": lambda m: m.lm_head.register_forward_hook(double),
    "hook before the head": lambda m: m.lm_head.register_forward_pre_hook(double_input),
    "hook of a linear layer": lambda m: m.model.layers[1].mlp.up_proj.register_forward_hook(double),
    "hook of a container": lambda m: m.model.layers[0].mlp.register_forward_hook(double),
    "hook of a new part": lambda m: [setattr(m.model.layers[0], "mlp", copy.deepcopy(m.model.layers[0].mlp)),
                                     m.model.layers[0].mlp.register_forward_hook(double)],
    "two hooks": lambda m: [m.model.norm.register_forward_hook(double) for _ in range(2)]}


@torch.no_grad()
def check_change(model, change):
    """Check that the graph is used before a change, and that the changed model's logits come after it."""
    with mock.patch.object(CompiledModel, "stance", "fail_on_recompile"): assert difference(model) < 1e-4
    before = second_call(CachedModel, model)
    change(model)
    after = second_call(CachedModel, model)
    assert (after - before).abs().max() > 1e-3
    assert difference(model) < (1e-4 if model.dtype == torch.float32 else .1)


@pytest.mark.parametrize("name", CHANGES)
def test_changed_model(name):
    """The next call after a change is that of the changed model."""
    model = tiny()
    assert compile_steps(model, [STEP])
    check_change(model, CHANGES[name])


@pytest.mark.slow
def test_change_undone():
    """A graph that was compiled with an adapter or a hook is not used without."""
    model = tiny()
    CHANGES["adapter"](model)
    hook = CHANGES["hook of the head"](model)
    assert compile_steps(model, [STEP])
    check_change(model, lambda m: hook.remove())
    model.model.layers[0].mlp.up_proj.active = False
    assert difference(model) < 1e-4


def test_hook_of_all_modules():
    model = tiny()
    assert compile_steps(model, [STEP])
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output * 2 if isinstance(module, nn.Linear) else output)
    try: assert difference(model) < 1e-4
    finally: hook.remove()


@torch.no_grad()
def test_hidden_states_leave_graphs_valid():
    """Asked for hidden states, `transformers` adds hooks to a model."""
    model = tiny()
    assert compile_steps(model, [STEP])
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    with mock.patch.object(CompiledModel, "stance", "fail_on_recompile"): assert difference(model) < 1e-4


@torch.no_grad()
def test_model_is_used_while_it_is_compiled():
    """What other threads compute meanwhile, without a mask and with one for padding, is right."""
    model, ids = tiny(), torch.arange(10).view(2, 5)
    for inputs in ({}, {"attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])}):
        expected = model(ids, **inputs).logits[:, -1]
        with grouped_attention(model): assert (model(ids, **inputs).logits[:, -1] - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_decoding_while_another_thread_compiles():
    model, draft = tiny(intermediate_size=72, num_hidden_layers=1), tiny(1, num_hidden_layers=1)
    options = dict(max_new_tokens=40, gamma=3, student_weights="plain", adaptive=False)
    expected = speculative_generate(model, draft, [1, 2, 3], compile=False, **options).tokens
    thread = compile_in_background({model: [STEP, StepKind(False, 1)], draft: [StepKind(False, 1)]}, lambda line: None)
    found = []
    while thread.is_alive():
        found.append(speculative_generate(model, draft, [1, 2, 3], **options).tokens)
    thread.join()
    found.append(speculative_generate(model, draft, [1, 2, 3], **options).tokens)
    assert READY[model] and READY[draft] and all(tokens == expected for tokens in found)


def test_two_threads_decode_with_graphs():
    model = tiny()
    assert compile_steps(model, [STEP])
    differences = []
    def work(): differences.extend(difference(model) for _ in range(50))
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(differences) == 100 and max(differences) < 1e-4


def test_number_of_threads_changes():
    model, threads = tiny(), torch.get_num_threads()
    assert compile_steps(model, [STEP])
    try:
        with mock.patch.object(CompiledModel, "stance", "fail_on_recompile"):
            for n in (1, 2, 1):
                torch.set_num_threads(n)
                assert difference(model) < 1e-4
    finally: torch.set_num_threads(threads)


@pytest.mark.parametrize("transposed", [False, True])
def test_other_kernels_are_measured_after_compilation(transposed):
    """As with another number of threads; the graph goes on."""
    kernels = [{n: LinearKernel(n, choice) for n in range(1, 9)} for choice in (transposed, not transposed)]
    model = tiny()
    with mock.patch.object(cached_model, "kernels_for", lambda layers: kernels[0]): assert compile_steps(model, [STEP])
    with (mock.patch.object(cached_model, "kernels_for", lambda layers: kernels[1]),
          mock.patch.object(CompiledModel, "stance", "fail_on_recompile")):
        assert difference(model) < 1e-4


@torch.no_grad()
def test_head_of_an_earlier_version():
    """The shipped heads keep their draft vocabulary elsewhere; nothing in their step stops the compiler."""
    target = tiny()
    shape = {name: getattr(target.config, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")}
    config = LegacyEagleConfig(feature_layers=[1, -1], num_hidden_layers=1, draft_vocab_size=30, **shape)
    head, kind = LegacyEagleStudent(config).eval().attach(target), StepKind(False, 1, (-1,))
    head.draft_ids.copy_(torch.arange(30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a head that does not compile
        assert compile_steps(head, [kind])
    assert READY[head] == {kind}


@torch.no_grad()
@pytest.mark.parametrize("kind", [CachedModel, StaticModel, CompiledModel])
def test_capacity_is_too_small(kind):
    """All positions of the capacity are right, and the first one that is missing is an error."""
    model = tiny(max_position_embeddings=512)
    assert compile_steps(model, [STEP])
    small, large = kind(model, 20), CachedModel(model, 400)
    with pytest.raises(ValueError, match="the cache holds .* set a larger capacity"):
        for start in range(0, 300, 3):
            ids = [start % 64, 1, 2]
            ours, theirs = small.forward([ids], [3])[0][0], large.forward([ids], [3])[0][0]
            assert (ours - theirs).abs().max() < 1e-4
    assert small.lengths[0] >= 18


@torch.no_grad()
@pytest.mark.parametrize("counts, keep, computed", [
    ([1], [1], 1), ([5], [1], 2), ([5], [5], 5), ([16], [2], 2), ([3, 7], [1, 2], 3), ([2, 0], [1, 0], 2)])
def test_output_head_computes_the_positions_that_are_read(counts, keep, computed):
    """At least two of several, because a graph for one is another one; and never those that only pad a shorter row."""
    model, seen = tiny(), []
    states = StaticModel(model, 64, len(counts)), CachedModel(model, 64, len(counts))
    for state in states: state.forward([[1, 2, 3]] * len(counts), [1] * len(counts))
    hook = model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:2]))
    tokens = [list(range(9, 9 + count)) for count in counts]
    ours, theirs = (state.forward(tokens, keep)[0] for state in states)
    hook.remove()
    assert seen[0] == (len(counts), computed)
    for a, b in zip(ours, theirs): assert len(a) == len(b) and (not len(a) or (a - b).abs().max() < 1e-4)


FAMILIES = {
    "biases": lambda: tiny(5, Qwen2ForCausalLM, Qwen2Config, max_position_embeddings=128),
    "sliding window": lambda: tiny(5, MistralForCausalLM, MistralConfig, max_position_embeddings=128, sliding_window=8),
    "learned positions": lambda: tiny(5, GPT2LMHeadModel, GPT2Config, max_position_embeddings=128)}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_models(name):
    """Three rows of different lengths, longer than the window, with every rollback of up to eight tokens."""
    model = FAMILIES[name]()
    assert compile_steps(model, [StepKind(True, 2)])
    states = CompiledModel(model, 128, 3), CachedModel(model, 128, 3)
    generator = torch.Generator().manual_seed(0)
    with mock.patch.object(CompiledModel, "stance", "fail_on_recompile"):
        for dropped in (0, *range(9)):
            counts = [8, 9, 10]
            tokens = [torch.randint(64, (count,), generator=generator).tolist() for count in counts]
            ours, theirs = (state.forward(tokens, counts)[0] for state in states)
            assert max((a - b).abs().max() for a, b in zip(ours, theirs)) < 1e-4
            for state in states: state.crop([length - dropped for length in state.lengths])


TARGETS = {
    "full attention": tiny(2, num_hidden_layers=1),  # graphs of the same shape serve the draft, too
    "sliding window": tiny(3, MistralForCausalLM, MistralConfig, sliding_window=8, num_hidden_layers=1)}
DRAFT = tiny(4, num_hidden_layers=1)
PROMPTS = [[1], list(range(40)), [5, 6, 7] * 5]


def generated(target, prompt, max_length, **options):
    """Return prompt and tokens of `generate`."""
    ids = torch.tensor([prompt])
    return target.generate(ids, attention_mask=torch.ones_like(ids), max_length=max_length, do_sample=False,
                           pad_token_id=0, **options)[0].tolist()


@step_forms("static", "replayed", COMPILED)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("options", [{"adaptive": False}, {"adaptive": True}, {"drafter": "hybrid"},
                                     {"drafter": "ngram"}, {"repetition_penalty": 1.5, "adaptive": False}])
def test_greedy_text_to_the_end_of_the_context(step, name, options):
    """Rows of 1, 40 and 15 tokens, far beyond the window: the tokens of `generate`."""
    target, options = TARGETS[name], dict(max_new_tokens=63, student_weights="plain", gamma=5) | options
    penalty = {"repetition_penalty": options["repetition_penalty"]} if "repetition_penalty" in options else {}
    results = speculative_generate(target, DRAFT, PROMPTS, **options)
    for prompt, found in zip(PROMPTS, results):
        assert found.tokens == generated(target, prompt, 64, **penalty)[len(prompt):]


@step_forms("static", "replayed", COMPILED)
def test_eagle_head_drafts_the_same(step, monkeypatch):
    """Tokens and accepted drafts are those of the ordinary step, for three rows and for those that are left."""
    target = tiny(2)
    head = EagleStudent.from_teacher(target, [0, -1], [0]).eval()
    def run():
        results = speculative_generate(target, head, PROMPTS, gamma=4, adaptive=False,
                                       student_weights="plain", max_new_tokens=48, drafter="student")
        return [(one.tokens, one.statistics.accepted, one.statistics.drafted) for one in results]
    found = run()
    for module in (decode, drafters): monkeypatch.setattr(module, "CompiledModel", CompiledModel)
    assert found == run()


@step_forms("static", "replayed", COMPILED)
def test_continuous_batching(step):
    """Sequences that join and leave at any time get the tokens of `generate`."""
    target, settings = TARGETS["sliding window"], DecodeSettings(
        gamma=3, adaptive=False, student_weights="plain", max_new_tokens=40)
    sequences = make_sequences([*PROMPTS, [9, 8]], settings, 0, set(), None, target.device)
    batch = Batch(target, DRAFT, settings)
    with torch.no_grad():
        for i, sequence in enumerate(sequences):
            list(batch.add(sequence))
            for _ in range(i): batch.step()
            if i == 2: batch.drop([sequences[0]])
        while batch.sequences: batch.step()
    for sequence, prompt in zip(sequences[1:], [*PROMPTS[1:], [9, 8]]):
        assert sequence.tokens == generated(target, prompt, min(64, len(prompt) + 40))


def third_token_probs(model, prompt, params):
    """Return the exact distribution of the third new token: (vocab,)."""
    def following(texts):
        with torch.no_grad(): logits = model(torch.tensor(texts)).logits[:, -1]
        return torch.cat([params.probs(row[None], text) for row, text in zip(logits, texts)])
    first, second = following([prompt])[0], following([prompt + [a] for a in range(8)])
    third = following([prompt + [a, b] for a in range(8) for b in range(8)]).view(8, 8, 8)
    return torch.einsum("a,ab,abc->c", first, second, third).double()


def check_third_token(target, counts):
    """Check that the third tokens of 1,000 texts pass a χ² test, and fail it under another temperature."""
    def p_value(temperature):
        expected = third_token_probs(target, [1, 2], SamplingParams(temperature, top_p=.95))
        assert not counts[expected == 0].any()
        return chisquare(counts[expected > 0].double(), (expected / expected.sum() * 1000)[expected > 0]).pvalue
    assert p_value(1.3) > .01 and p_value(.9) < 1e-6


@step_forms("static", COMPILED)
@pytest.mark.parametrize("draft_sampling", ["sampled", "greedy"])
def test_sampled_text_has_the_distribution_of_the_target(step, draft_sampling):
    """The third token of 1,000 texts passes a χ² test, and fails it under another temperature."""
    target, draft = (tiny(seed, vocab_size=8, num_hidden_layers=1) for seed in (5, 6))
    options, counts = dict(temperature=1.3, top_p=.95), torch.zeros(8)
    for seed in range(0, 1000, 100):
        results = speculative_generate(target, draft, [[1, 2]] * 100, seed=seed, max_new_tokens=3, gamma=2, **options,
                                       adaptive=False, student_weights="plain", draft_sampling=draft_sampling)
        counts += torch.bincount(torch.tensor([found.tokens[2] for found in results]), minlength=8)
    check_third_token(target, counts)


class FixedTimes(LatencyModel):
    """Times that do not depend on the clock."""

    def __init__(self, first, growth):
        super().__init__()
        self.first, self.growth, self.medians = first, growth, {1: first}

    def add(self, count, seconds): pass
    def seconds(self, count): return self.first + self.growth * (count - 1)


@pytest.mark.slow
def test_sampled_text_with_drafts_that_stop_when_unsure():
    """The same for the adaptive γ, which ends a draft by the confidence and what was accepted before."""
    target, draft = (tiny(seed, vocab_size=8, num_hidden_layers=1) for seed in (5, 7))
    estimate, counts, drafted = AcceptanceEstimate(steps=FixedTimes(.005, 0.)), torch.zeros(8), torch.zeros(2)
    drafter = AdaptiveDrafter(ModelDrafter(draft), target.device, FixedTimes(1., .2), estimate)
    for seed in range(1000):
        found = speculative_generate(target, drafter, [1, 2], seed=seed, max_new_tokens=3, gamma=2, temperature=1.3,
                                     top_p=.95)
        counts[found.tokens[2]] += 1
        drafted += torch.tensor([*found.statistics.drafted, 0, 0][:2])
    check_third_token(target, counts)
    assert 100 < drafted[1] < 950  # of 1,000 drafts that may have two tokens, some stop before the second
