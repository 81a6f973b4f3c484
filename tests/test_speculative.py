"""Exactness of speculative decoding over many models and settings, and adaptive γ with a useless student."""
import functools

import pytest
import torch
from conftest import step_forms
from hypothesis import HealthCheck, given, settings as checks, strategies as st
from transformers import (
    Gemma2Config, Gemma2ForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, GPT2Config, GPT2LMHeadModel,
    LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM)

from kdcode.bench import first_difference
from kdcode.config import DecodeSettings, TeacherSettings
from kdcode.data import humaneval_problems
from kdcode.decode import complete, custom_generate, speculative_generate
from kdcode.draft_eval import replay
from kdcode.drafters import AcceptanceEstimate, AdaptiveDrafter, LatencyModel, ModelDrafter
from kdcode.eagle import EagleStudent
from kdcode.student import Student
from kdcode.teacher import load_teacher, Teacher

FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig, {}),
            "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
            "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
            "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 6, "head_dim": 8}),
            "gpt2": (GPT2LMHeadModel, GPT2Config, {})}
GPT2_SHAPE = dict(n_embd=24, n_head=3, n_positions=96)
LLAMA_SHAPE = dict(hidden_size=24, intermediate_size=48, num_attention_heads=3, num_key_value_heads=1,
                   max_position_embeddings=96)


@functools.cache
def model(family, layers, seed):
    """Return a random model with 40 tokens and a context of 96."""
    model_class, config_class, extra = FAMILIES[family]
    shape = GPT2_SHAPE | {"n_layer": layers} if family == "gpt2" else LLAMA_SHAPE | {"num_hidden_layers": layers}
    torch.manual_seed(seed)
    config = config_class(vocab_size=40, bos_token_id=None, eos_token_id=None, initializer_range=.5, **shape, **extra)
    return model_class(config).eval()


@functools.cache
def student(architecture, seed):
    """Return a random student with a draft vocabulary of 30 of the 40 tokens."""
    layers = [0] if architecture == "llama" else 1
    teacher = model("llama", 2, seed)
    return Student.from_teacher(teacher, layers, architecture=architecture, draft_ids=torch.arange(30)).eval()


teachers = st.builds(model, st.sampled_from(sorted(FAMILIES)), st.integers(1, 2), st.integers(0, 3))
students = st.one_of(teachers, st.builds(student, st.sampled_from(["llama", "classic"]), st.integers(0, 3)))
prompt_batches = st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=30), min_size=1, max_size=4)
generate_options = st.fixed_dictionaries({}, optional={
    "repetition_penalty": st.sampled_from([.6, 1.3, 2.]),
    "no_repeat_ngram_size": st.integers(1, 4),
    "bad_words_ids": st.just([[3], [5, 6], [7, 8, 9]]),
    "eos_token_id": st.lists(st.integers(0, 39), min_size=1, max_size=8, unique=True),
    "min_new_tokens": st.integers(1, 12),
    "forced_eos_token_id": st.integers(0, 39)})
sampling_options = st.sampled_from(
    [{}, {"top_k": 5}, {"top_p": .7, "min_p": .05}, {"repetition_penalty": 1.5, "min_new_tokens": 4}])


def left_padded(prompts):
    """Return input_ids and attention_mask of a batch."""
    longest = max(map(len, prompts))
    return {"input_ids": torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
            "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])}


def greedy(teacher, prompt, max_new_tokens):
    """Return the new tokens that `generate` of transformers gives for a text prompt."""
    inputs = teacher.tokenizer(prompt, return_tensors="pt")
    out = teacher.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=2)
    return out[0, inputs.input_ids.shape[1]:].tolist()


@step_forms("ordinary", "static")
@checks(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(teachers, students, prompt_batches, generate_options, st.integers(0, 9), st.booleans(),
       st.sampled_from(["student", "ngram", "hybrid"]), st.integers(1, 40))
def test_greedy_output_equals_generate(step, teacher, draft, prompts, options, gamma, adaptive, drafter,
                                       max_new_tokens):
    """Any pair of models, batch, logits processors and drafter gives the tokens of `generate`."""
    inputs = left_padded(prompts) | dict(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0) | options
    settings = DecodeSettings(gamma=gamma, adaptive=adaptive, drafter=drafter)
    ours = teacher.generate(**inputs, custom_generate=custom_generate, student=draft, decode=settings)
    assert ours.tolist() == teacher.generate(**inputs).tolist()


@step_forms("ordinary", "static")
@checks(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(teachers, students, prompt_batches, st.integers(0, 6), sampling_options, st.sampled_from(["sampled", "greedy"]),
       st.integers(0, 99))
def test_sampled_rows_of_a_batch_equal_solo_runs(step, teacher, draft, prompts, gamma, options, draft_sampling, seed):
    """The same seeds give the same tokens, in a batch and in solo runs."""
    options = options | dict(max_new_tokens=16, gamma=gamma, temperature=1.2, draft_sampling=draft_sampling,
                             ends=[1, 2])
    together = speculative_generate(teacher, draft, prompts, seed=seed, **options)
    for i, (prompt, result) in enumerate(zip(prompts, together)):
        assert speculative_generate(teacher, draft, prompt, seed=seed + i, **options).tokens == result.tokens


@step_forms("ordinary", "static")
@pytest.mark.parametrize("kind", ["independent", "head"])
def test_sliding_attention_of_a_draft(step, kind):
    """Tokens accepted in a batch are those of a forward pass over each whole text, in which a window has an effect."""
    target, prompts = model("llama", 2, 0), [[1], list(range(3, 28)), [5, 6, 7] * 5]
    torch.manual_seed(0)
    draft = EagleStudent.from_teacher(target, [0, 1], [0]) if kind == "head" else Student.from_teacher(target, [0])
    draft, teacher = draft.eval(), Teacher(target, None, "random")
    settings = dict(gamma=3, adaptive=False, max_new_tokens=40, student_weights="plain")

    def counts(window):
        draft.config.attention_window = window
        results = speculative_generate(target, draft, prompts, **settings)
        texts = [(result.prompt, result.tokens) for result in results]
        replayed = [replay(teacher, draft, [text], 3, 40) for text in texts]
        assert [one.statistics.accepted for one in results] == [one.accepted for one in replayed]
        assert [one.statistics.drafted for one in results] == [one.drafted for one in replayed]
        return texts, [one.accepted for one in replayed]

    (text, narrow), (same_text, wide) = counts(6), counts(None)
    assert text == same_text and narrow != wide


def test_draft_with_a_window_in_transformers():
    """`generate` has the tokens of forward passes over the whole text, also for a padded row, and as an assistant."""
    target = model("llama", 2, 0)
    draft, ids = Student.from_teacher(target, [0, 1]).eval(), torch.arange(1, 13)[None]
    draft.config.attention_window = 8
    inputs = left_padded([ids[0].tolist(), list(range(3, 20))])
    expected, options = ids, dict(max_new_tokens=30, do_sample=False, pad_token_id=0)
    for _ in range(30): expected = torch.cat([expected, draft(expected).logits[:, -1:].argmax(-1)], 1)
    assert draft.generate(ids, **options).tolist() == expected.tolist() != target.generate(ids, **options).tolist()
    assert draft.generate(**inputs, **options)[0, 5:].tolist() == expected[0].tolist()
    assisted = target.generate(ids, assistant_model=draft, **options)
    assert assisted.tolist() == target.generate(ids, **options).tolist()


@step_forms("ordinary", "static")
def test_multimodal_wrapper_is_a_teacher(step):
    """Its sizes are in `text_config`, and its decoder is a part of its body."""
    text = LLAMA_SHAPE | dict(vocab_size=40, num_hidden_layers=2, head_dim=8, sliding_window=6, initializer_range=.5)
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8,
                  patch_size=4)
    ends = dict(eos_token_id=None, bos_token_id=None, pad_token_id=None)
    tokens = dict(mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7)
    torch.manual_seed(0)
    wrapper = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text | ends, vision_config=vision, **tokens, **ends)).eval()
    teacher = Teacher(wrapper, None, "wrapper")
    assert teacher.context_size == 96
    assert teacher.hidden_states(torch.tensor([[1, 2, 3]]), which=(0, 1)).shape == (1, 3, 2 * 24)
    students = Student.from_teacher(wrapper, 1, "classic"), EagleStudent.from_teacher(wrapper, [-1], 1)
    prompt = torch.tensor([[3, 1, 4, 1, 8]])
    expected = wrapper.generate(prompt, max_new_tokens=12, do_sample=False)[0, 5:].tolist()
    for draft in students:
        assert draft.config.hidden_size == 24
        assert speculative_generate(wrapper, draft.eval(), prompt, max_new_tokens=12).tokens == expected


@step_forms("ordinary", "static")
def test_batch_of_the_embedded_teacher_equals_solo_runs(step):
    teacher = load_teacher("smollm2")
    draft = Student.from_teacher(teacher.model, [0, 1, 2]).eval()
    prompts = [problem["prompt"] for problem in humaneval_problems(3)]
    together = complete(teacher, draft, prompts, DecodeSettings(max_new_tokens=16, drafter="hybrid"))
    for prompt, result in zip(prompts, together):
        solo = greedy(teacher, prompt, 16)
        assert first_difference(teacher, prompt, solo, result.tokens) <= 1e-4
        assert result.tokens[:8] == solo[:8]


@pytest.mark.slow
def test_four_bit_teacher_differs_only_at_near_ties(tmp_path):
    """Calls of one row and of several use different kernels; tokens may differ only where the top two logits are closer
    than that noise."""
    pytest.importorskip("bitsandbytes")
    plain = load_teacher("smollm2")
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    teacher = load_teacher(TeacherSettings(name=str(tmp_path), quantization="nf4"))
    ids = torch.tensor([plain.tokenizer(humaneval_problems(1)[0]["prompt"]).input_ids])
    with torch.no_grad():
        several_rows = teacher.model(ids).logits[0, -5:]
        one_row = torch.stack([teacher.model(ids[:, :ids.shape[1] - i], logits_to_keep=1).logits[0, -1]
                               for i in range(4, -1, -1)])
    noise = max((several_rows - one_row).abs().max().item(), 1e-3)
    different = 0
    for prompt in (problem["prompt"] for problem in humaneval_problems(2)):
        result = complete(teacher, plain.model, prompt, DecodeSettings(max_new_tokens=20, adaptive=False))
        solo = greedy(teacher, prompt, 20)
        assert sum(result.statistics.accepted) > 0
        different += result.tokens != solo
        assert first_difference(teacher, prompt, solo, result.tokens) <= 4 * noise
    print(f"{different} of 2 completions differ, at near-ties within {4 * noise:.1e}")


class FixedLatency(LatencyModel):
    """A latency model that ignores measurements, so that γ does not depend on the clock."""

    def __init__(self, medians):
        super().__init__()
        self.medians = medians

    def add(self, count, seconds): pass


class CountingDrafter(ModelDrafter):
    """Counts its draft tokens."""
    drafted = 0

    def propose(self, sequences, budgets):
        drafts = super().propose(sequences, budgets)
        self.drafted += sum(len(draft.tokens) for draft in drafts)
        return drafts


def test_adaptive_gamma_gives_up_a_useless_student():
    """Counted, not timed: with an expensive draft step and no agreement there are hardly any drafts."""
    teacher, draft = model("llama", 2, 0), model("gpt2", 1, 3)
    counting = CountingDrafter(draft)
    target_calls = FixedLatency({n: 1 + .05 * n for n in range(1, 10)})
    adaptive = AdaptiveDrafter(counting, teacher.device, target_calls, AcceptanceEstimate(FixedLatency({1: .2})))
    result = speculative_generate(teacher, adaptive, [1, 2, 3], max_new_tokens=80, gamma=8)
    assert counting.drafted < 16
    assert result.tokens == speculative_generate(teacher, draft, [1, 2, 3], max_new_tokens=80, gamma=0).tokens
