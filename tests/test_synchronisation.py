"""A decoding round waits for the device once: operations that would wait on a GPU are counted on the CPU."""
import pytest
import torch
from conftest import step_forms
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from kdcode import cached_model, compiled_step, decode, drafters, student
from kdcode.config import DecodeSettings
from kdcode.decode import make_decoder, make_sequences
from kdcode.drafters import EagleDrafter, ModelDrafter
from kdcode.eagle import EagleStudent

READS = {"tolist", "cpu", "numpy", "__array__"}  # the whole tensor; `item`, `bool`, ... are in OPERATIONS
UPLOADS = {torch.tensor, torch.as_tensor}        # from memory that is not pinned
OPERATIONS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
              torch.ops.aten._unique2, torch.ops.aten.is_nonzero, torch.ops.aten.equal}


class Functions(TorchFunctionMode):
    """Counts functions of PyTorch that copy between host and device, and wait for it."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        is_read = name == "to" and "cpu" in [value for value in args[1:] if isinstance(value, str)]
        if name in READS or function in UPLOADS or is_read: self.waits.append(name)
        return function(*args, **kwargs or {})


class Operations(TorchDispatchMode):
    """Counts operations whose result is a number on the host, or has a size that depends on numbers."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        masked = operation.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        if operation.overloadpacket in OPERATIONS or masked: self.waits.append(str(operation))
        return operation(*args, **kwargs or {})


def waits_in(work):
    """Return the names of what waits for the device."""
    found = []
    with Functions(found), Operations(found): work()
    return found


@pytest.fixture(autouse=True)
def pinned(monkeypatch):
    """Decode as on a GPU: `to_device` copies as from pinned memory, which nothing waits for, and reads are not free."""
    def to_device(numbers, device="cpu"): return torch.LongTensor(numbers)
    for module in (student, cached_model, compiled_step, decode, drafters):
        monkeypatch.setattr(module, "to_device", to_device)
    monkeypatch.setattr(drafters, "reads_are_free", lambda device: False)


def tiny(seed, **changes):
    """Return a random model with 48 tokens."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=64, initializer_range=.3, eos_token_id=None, bos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()


TARGET = tiny(0)
STUDENTS = {"student": tiny(1, num_hidden_layers=1),
            "smaller vocabulary": tiny(1, vocab_size=40), "head": EagleStudent.from_teacher(TARGET, [1, -1]).eval()}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5], [9, 8], [7] * 9]


def rounds(decoder, sequences):
    """Decode to the end; return what each round waits for, and the numbers of draft tokens."""
    found, drafted = [], []
    with torch.no_grad():
        decoder.start(sequences)
        while not any(sequence.finished for sequence in sequences):
            before = [sum(sequence.statistics.drafted) for sequence in sequences]
            found.append(waits_in(lambda: decoder.step(sequences)))
            drafted.append(max(sum(s.statistics.drafted) - n for s, n in zip(sequences, before)))
    return found, drafted


def decoded(name, prompts, **options):
    """Return the rounds of a decoder with a draft model."""
    options = DecodeSettings(**dict(gamma=3, max_new_tokens=12, student_weights="plain", drafter="student") | options)
    sequences = make_sequences(prompts, options, 0, {47}, None, TARGET.device)
    return rounds(make_decoder(TARGET, STUDENTS[name], sequences, options), sequences)


GREEDY, SAMPLED = {}, {"temperature": 1.3, "top_k": 30, "top_p": .95, "min_p": .01}


@step_forms("ordinary", "static")
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, SAMPLED | {"draft_sampling": "greedy"}])
@pytest.mark.parametrize("name, drafter", [
    ("student", "student"), ("smaller vocabulary", "student"), ("head", "student"), ("student", "hybrid"),
    ("head", "hybrid"), ("student", "ngram")])
def test_a_round_waits_once(step, name, drafter, sampling):
    for prompts, adaptive in ((PROMPTS[:1], True), (PROMPTS[:1], False), (PROMPTS, False)):
        found, drafted = decoded(name, prompts, drafter=drafter, adaptive=adaptive, **sampling)
        assert found == [["tolist"]] * len(found)
        assert drafter == "ngram" or adaptive or max(drafted) == 3


def test_logits_processors_need_the_tokens():
    """Negative control: with a history, each draft token comes to the host."""
    found, drafted = decoded("student", PROMPTS[:1], repetition_penalty=1.2, adaptive=False)
    assert all(len(waits) > n for waits, n in zip(found, drafted)) and max(drafted) == 3


class Constant(drafters.LatencyModel):
    """The same seconds for each call, whatever is measured."""

    def __init__(self, seconds):
        super().__init__()
        self.medians = {1: seconds}

    def add(self, count, seconds): pass


def test_stopping_when_unsure_reads_each_confidence(monkeypatch):
    """Negative control: what adaptive γ does on a CPU."""
    monkeypatch.setattr(drafters, "reads_are_free", lambda device: True)
    estimate = drafters.AcceptanceEstimate(Constant(.01))
    drafter = drafters.AdaptiveDrafter(ModelDrafter(TARGET), TARGET.device, Constant(1.), estimate)
    settings = DecodeSettings(gamma=3, max_new_tokens=16)
    sequences = make_sequences(PROMPTS[:1], settings, 0, {47}, None, TARGET.device)
    found, drafted = rounds(make_decoder(TARGET, drafter, sequences, settings), sequences)
    assert [len(waits) for waits in found] == [n + 1 for n in drafted] and max(drafted) == 3


class Reading(ModelDrafter):
    """A drafter that looks at each of its tokens."""

    def forward(self, tokens, active):
        logits = super().forward(tokens, active)
        self.last = [logits[row].argmax().item() for row in active]
        return logits


class ReadingHead(Reading, EagleDrafter):
    """The same with an EAGLE head."""


@pytest.mark.parametrize("drafter", [Reading(STUDENTS["student"]), ReadingHead(STUDENTS["head"])])
def test_a_drafter_that_reads_its_tokens_is_found(drafter):
    """Negative control."""
    settings = DecodeSettings(gamma=3, max_new_tokens=16, adaptive=False)
    sequences = make_sequences(PROMPTS[:1], settings, 0, {47}, None, TARGET.device)
    found, drafted = rounds(make_decoder(TARGET, drafter, sequences, settings), sequences)
    assert [len(waits) for waits in found] == [n + 1 for n in drafted] and max(drafted) == 3


@pytest.mark.parametrize("wait", [
    lambda x: x[0].item(), lambda x: int(x[0]), lambda x: bool(x[0] > 0), lambda x: float(x[0]), lambda x: x.tolist(),
    lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.numpy(), lambda x: x[x > 1], lambda x: x.nonzero(),
    lambda x: x.unique(), lambda x: [0, 1, 2][x[1].long()], 
    lambda x: x[x[0].long()], lambda x: torch.tensor([1], device=x.device), lambda x: torch.equal(x, x)])
def test_what_waits_is_counted(wait):
    """Negative control: each way to wait for a device."""
    x = torch.arange(3.)
    assert len(waits_in(lambda: wait(x))) == 1
    assert waits_in(lambda: (x + 1).argmax(-1).clamp(max=2)) == []
