"""Exactness over many models and settings, and what the adaptive gamma costs a useless student."""
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings as checks, strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kdcode.bench import first_difference
from kdcode.config import DecodeSettings, TeacherSettings
from kdcode.data import humaneval_problems
from kdcode.decode import complete, custom_generate, speculative_generate
from kdcode.student import Student
from kdcode.teacher import load_teacher

FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig, {}), "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}), "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
            "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 6, "head_dim": 8}), "gpt2": (GPT2LMHeadModel, GPT2Config, {})}


@functools.cache
def model(family, layers, seed):
    """A random model over 40 tokens whose context ends at 96."""
    kind, config, more = FAMILIES[family]
    shape = dict(n_embd=24, n_layer=layers, n_head=3, n_positions=96) if family == "gpt2" else dict(hidden_size=24, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=96)
    torch.manual_seed(seed)
    return kind(config(vocab_size=40, bos_token_id=None, eos_token_id=None, initializer_range=.5, **shape, **more)).eval()


@functools.cache
def student(architecture, seed):
    """A random student of 30 of the 40 tokens."""
    return Student.from_teacher(model("llama", 2, seed), [0] if architecture == "llama" else 1, architecture=architecture, draft_ids=torch.arange(30)).eval()


teachers = st.builds(model, st.sampled_from(sorted(FAMILIES)), st.integers(1, 2), st.integers(0, 3))
students = st.one_of(teachers, st.builds(student, st.sampled_from(["llama", "classic"]), st.integers(0, 3)))
prompts = st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=30), min_size=1, max_size=4)
wishes = st.fixed_dictionaries({}, optional={"repetition_penalty": st.sampled_from([.6, 1.3, 2.]), "no_repeat_ngram_size": st.integers(1, 4), "bad_words_ids": st.just([[3], [5, 6], [7, 8, 9]]),
                                             "eos_token_id": st.lists(st.integers(0, 39), min_size=1, max_size=8, unique=True), "min_new_tokens": st.integers(1, 12), "forced_eos_token_id": st.integers(0, 39)})


@checks(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(teachers, students, prompts, wishes, st.integers(0, 9), st.booleans(), st.sampled_from(["student", "ngram", "hybrid"]), st.integers(1, 40))
def test_greedy_text_is_that_of_generate(teacher, draft, rows, wish, gamma, adaptive, drafter, length):
    """Any pair of models, batch, processors and drafter."""
    longest = max(map(len, rows))
    batch = dict(input_ids=torch.tensor([[0] * (longest - len(row)) + row for row in rows]), attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
                 max_new_tokens=length, do_sample=False, pad_token_id=0) | wish
    ours = teacher.generate(**batch, custom_generate=custom_generate, student=draft, decode=DecodeSettings(gamma=gamma, adaptive=adaptive, drafter=drafter))
    assert ours.tolist() == teacher.generate(**batch).tolist()


@checks(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(teachers, students, prompts, st.integers(0, 6), st.sampled_from([{}, {"top_k": 5}, {"top_p": .7, "min_p": .05}, {"repetition_penalty": 1.5, "min_new_tokens": 4}]), st.sampled_from(["sampled", "greedy"]), st.integers(0, 99))
def test_sampled_rows_of_a_batch_are_their_solo_runs(teacher, draft, rows, gamma, wish, how, seed):
    """The same seeds give the same texts, together and alone, twice."""
    options = dict(max_new_tokens=16, gamma=gamma, temperature=1.2, draft=how, ends=[1, 2]) | wish
    together = speculative_generate(teacher, draft, rows, seed=seed, **options)
    for i, (row, result) in enumerate(zip(rows, together)): assert speculative_generate(teacher, draft, row, seed=seed + i, **options).tokens == result.tokens


def test_a_batch_of_the_real_teacher_is_its_solo_runs():
    teacher = load_teacher("smollm2")
    draft = Student.from_teacher(teacher.model, [0, 1, 2]).eval()
    texts = [problem["prompt"] for problem in humaneval_problems(4)]
    together = complete(teacher, draft, texts, DecodeSettings(max_new_tokens=24, drafter="hybrid"))
    for text, result in zip(texts, together):
        alone = teacher.model.generate(**teacher.tokenizer(text, return_tensors="pt"), max_new_tokens=24, do_sample=False, pad_token_id=2)[0, len(result.prompt):].tolist()
        assert first_difference(teacher, text, alone, result.tokens) <= 1e-4
        assert result.tokens[:8] == alone[:8]


def test_a_teacher_in_four_bits_differs_only_at_ties(tmp_path):
    """Calls of one row and of several go through other kernels; a text may change only where the two best logits are within that noise."""
    pytest.importorskip("bitsandbytes")
    plain = load_teacher("smollm2")
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    teacher = load_teacher(TeacherSettings(name=str(tmp_path), quantization="nf4"))
    ids = torch.tensor([plain.tokenizer(humaneval_problems(1)[0]["prompt"]).input_ids])
    with torch.no_grad():
        whole = teacher.model(ids).logits[0, -5:]
        single = torch.stack([teacher.model(ids[:, :ids.shape[1] - i], logits_to_keep=1).logits[0, -1] for i in range(4, -1, -1)])
    noise = max((whole - single).abs().max().item(), 1e-3)
    different = 0
    for problem in humaneval_problems(4):
        result = complete(teacher, plain.model, problem["prompt"], DecodeSettings(max_new_tokens=20, adaptive=False))
        alone = teacher.model.generate(**teacher.tokenizer(problem["prompt"], return_tensors="pt"), max_new_tokens=20, do_sample=False, pad_token_id=2)[0, len(result.prompt):].tolist()
        assert sum(result.statistics.accepted) > 0
        different += result.tokens != alone
        assert first_difference(teacher, problem["prompt"], alone, result.tokens) <= 4 * noise
    print(f"{different} of 4 texts differ, at ties within {4 * noise:.1e}")


def test_a_useless_student_is_soon_left_alone():
    """Counted, not timed: with a dear step and no agreement hardly anything is drafted."""
    from kdcode.drafters import AcceptanceEstimate, AdaptiveDrafter, LatencyModel, ModelDrafter
    teacher, draft = model("llama", 2, 0), model("gpt2", 1, 3)
    calls, pace = LatencyModel(), AcceptanceEstimate()
    for count in range(1, 10): calls.add(count, 1 + .05 * count)
    pace.steps.add(1, .2)
    calls.add = pace.steps.add = lambda *_: None
    class Counted(ModelDrafter):
        drafted = 0
        def propose(self, texts, room):
            drafts = super().propose(texts, room)
            self.drafted += sum(len(one.tokens) for one in drafts)
            return drafts
    inner = Counted(draft)
    adaptive = AdaptiveDrafter(inner, teacher.device, calls, pace)
    result = speculative_generate(teacher, adaptive, [1, 2, 3], max_new_tokens=80, gamma=8)
    assert inner.drafted < 16
    assert result.tokens == speculative_generate(teacher, draft, [1, 2, 3], max_new_tokens=80, gamma=0).tokens
