"""`custom_generate` restricts, pads and batches as `generate` does."""
import pytest
import torch
from conftest import step_forms
from transformers import LlamaConfig, LlamaForCausalLM

from kdcode.batching import Batch
from kdcode.cached_model import int8
from kdcode.config import DecodeSettings
from kdcode.decode import custom_generate, make_sequences
from kdcode.drafters import AdaptiveDrafter, EagleDrafter, HybridDrafter, LatencyModel, ModelDrafter, NGramDrafter
from kdcode.eagle import EagleStudent

EOS = 5


def tiny(seed: int, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": .3, "eos_token_id": EOS,
             "pad_token_id": None, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()


TEACHER, STUDENT = tiny(0), tiny(1)
PROMPTS = torch.tensor([[7, 8, 9, 7, 8], [9, 7, 8, 9, 7], [3, 3, 3, 3, 3]])


class Grammar:
    """Allows a token only by the one before it; refuses to be asked about an impossible text or another row's."""

    def __init__(self, prompts: torch.Tensor):
        self.prompts = prompts.tolist()

    def following(self, token: int) -> list[int]:
        return [(3 * token + k) % 48 for k in (1, 5, 11)] + [EOS]

    def __call__(self, row: int, ids: torch.Tensor) -> list[int]:
        tokens = ids.tolist()
        assert tokens[:5] == self.prompts[row], "the text of another row"
        for before, token in zip(tokens[4:], tokens[5:]):
            assert before != EOS, "behind the end of text"
            assert token in self.following(before), "behind a token that is not allowed"
        return self.following(tokens[-1])


def run(prompts, drafter="student", **options):
    # every row of `generate` goes on until all have ended: its grammar allows anything behind an end
    options = {"max_new_tokens": 24, "do_sample": False} | options
    grammar = Grammar(prompts)
    decode = DecodeSettings(gamma=4, drafter=drafter, adaptive=False)
    return TEACHER.generate(prompts, attention_mask=torch.ones_like(prompts), prefix_allowed_tokens_fn=grammar,
                            custom_generate=custom_generate, student=STUDENT, decode=decode, **options)


@step_forms("ordinary", "static")
@pytest.mark.parametrize("drafter", ["student", "ngram", "hybrid"])
def test_restricted_text_equals_that_of_generate(step, drafter):
    for row in range(len(PROMPTS)):
        prompt = PROMPTS[row:row + 1]
        expected = TEACHER.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False,
                                    prefix_allowed_tokens_fn=Grammar(prompt))
        assert run(prompt, drafter).tolist() == expected.tolist()


@step_forms("ordinary", "static")
@pytest.mark.parametrize("drafter", ["student", "ngram", "hybrid"])
@pytest.mark.parametrize("sampled", [False, True])
def test_each_row_is_asked_about_its_own_text(step, drafter, sampled):
    output = run(PROMPTS, drafter, do_sample=sampled)
    assert output[:, :5].tolist() == PROMPTS.tolist() and output.shape[1] > 5


def test_a_text_that_ends_is_padded_as_by_generate():
    ends = {"prefix_allowed_tokens_fn": lambda row, ids: [EOS] if row == 0 and len(ids) > 6 else [7 + row]}
    for pad in (None, 2):
        options = dict(attention_mask=torch.ones_like(PROMPTS), max_new_tokens=6, do_sample=False, pad_token_id=pad)
        expected = TEACHER.generate(PROMPTS, **options, **ends)
        found = TEACHER.generate(PROMPTS, **options, **ends, custom_generate=custom_generate, student=STUDENT)
        assert found.tolist() == expected.tolist()


def hybrid(): return HybridDrafter(NGramDrafter(), ModelDrafter(STUDENT))
def adaptive(): return AdaptiveDrafter(hybrid(), TEACHER.device, LatencyModel())
def eagle(): return EagleDrafter(EagleStudent.from_teacher(TEACHER, [0, -1]).eval())


@step_forms("ordinary", "static")
@pytest.mark.parametrize("drafter", [NGramDrafter, lambda: ModelDrafter(STUDENT), eagle, hybrid, adaptive,
                                     lambda: HybridDrafter(NGramDrafter(), eagle())])
def test_batch_with_a_drafter_object(step, drafter):
    settings = DecodeSettings(gamma=3, max_new_tokens=12, adaptive=False)
    sequences = make_sequences(PROMPTS.tolist(), settings, 0, {EOS}, None, TEACHER.device)
    solo = [TEACHER.generate(row[None], attention_mask=torch.ones(1, 5), max_new_tokens=12, do_sample=False)[0].tolist()
            for row in PROMPTS]
    batch = Batch(TEACHER, drafter(), settings)
    with torch.no_grad():
        for sequence in sequences:
            list(batch.add(sequence))
            batch.step()
        while batch.sequences: batch.step()
    assert [sequence.tokens for sequence in sequences] == solo


def test_int8_head_follows_its_teacher():
    head = EagleStudent.from_teacher(TEACHER).eval()
    first = int8(head)
    other = tiny(2)
    head.attach(TEACHER)
    assert int8(head) is first
    copied = int8(head.attach(other))
    assert copied is not first
    assert torch.equal(copied.get_input_embeddings().weight, other.get_input_embeddings().weight)
    other.get_input_embeddings().weight.data.mul_(2)
    assert torch.equal(int8(head).get_input_embeddings().weight, other.get_input_embeddings().weight)
    with torch.no_grad(): head(torch.tensor([[1, 2]]), features=torch.zeros(1, 2, 32))
    for value in (1., 2.):
        head.layers[0].self_attn.scaling = value  # which no weight shows
        assert int8(head).layers[0].self_attn.scaling == value
