"""Measure kdcode on a GPU with random models of real shapes: `python3 tests/gpu.py --out runs/gpu`.

Speed and memory do not depend on the weights, so nothing is downloaded. The models have the shapes of SmolLM2-135M
(bfloat16) and of CodeLlama-7b (NF4, built layer by layer). Their most probable next id is the last one plus 1: the
greedy text is known, and a drafter can propose it with any acceptance rate while it runs a real head.

It takes at most 8 minutes (`--seconds`), or two runs, `--model smollm2` and `--model codellama`. Each part has a time
limit of its own, and report.json and report.md are written after each part; `kdcode record runs/gpu NAME` keeps them.
`--device cpu --small` runs every part with tiny shapes in seconds; its numbers mean nothing.

A machine without network needs some packages beside PyTorch, the dependencies of transformers, accelerate, pandas,
scipy, matplotlib, pyarrow, tensorboard, filelock, fsspec, pygments, xxhash and httpx. Pack them (24 MB), here for
Python 3.12 and CUDA 13, and unpack them there:

    python3 -m pip install --target packages --no-deps --no-compile --only-binary=:all: --python-version 3.12 \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \\
        -c constraints.txt transformers datasets dill multiprocess jsonargparse docstring_parser typeshed_client \\
        pydantic pydantic_core annotated-types typing-inspection optuna colorlog SQLAlchemy bitsandbytes
    find packages -name 'libbitsandbytes_*' ! -name '*_cpu*' ! -name '*_cuda130*' -delete
    tar -czf packages.tar.gz packages

    tar -xzf packages.tar.gz && PYTHONPATH=.:packages python3 tests/gpu.py --out runs/gpu

The folder `models/` is not needed. Without bitsandbytes, the report says that CodeLlama's part is missing.
"""
import argparse
import gc
import importlib.metadata
import importlib.util
import shlex
import signal
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
OTHERS = {"gguf", "fastapi", "uvicorn", "prometheus-client"}  # dependencies of kdcode that this script does without


def missing_packages() -> list[str]:
    """Return the requirements of kdcode that are not met, without those of `OTHERS`."""
    project, missing = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"], []
    for requirement in map(Requirement, project["dependencies"]):
        try: met = requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError: met = False
        if not met and requirement.name not in OTHERS: missing.append(str(requirement))
    return missing


if missing := missing_packages():
    sys.exit(f"test-gpu: this Python lacks {', '.join(missing)}; run make setup, or carry the packages (see the top of "
             "tests/gpu.py)")

import torch
from datasets import Dataset
from tokenizers import models as tokenizer_models, Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from kdcode.cached_model import (
    CachedModel, call_times, clock, deviation, machine_limits, rounding_noise, timed, without_cudnn_attention)
from kdcode.compiled_step import CompiledModel, compile_steps, REFUSED, StepKind, usual_kinds
from kdcode.config import Config, ConfigError, DecodeSettings, load_config, with_overrides
from kdcode.data import Corpus
from kdcode.decode import make_sequences, SpeculativeDecoder
from kdcode.drafters import AcceptanceEstimate, AdaptiveDrafter, Draft, Drafter, EagleDrafter, LatencyModel
from kdcode.eagle import EagleStudent
from kdcode.report import markdown_table, Report
from kdcode.result import Statistics
from kdcode.teacher import pick_device, Teacher
from kdcode.train import make_trainer


# Time limits and the report

class OutOfTime(BaseException):
    """Raised when a part exceeds its time limit; no `except Exception` in a library hides it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in a `with` block that takes longer."""
    def stop(*_): raise OutOfTime(f"it took longer than its {seconds:.0f} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, .001))
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Measurements:
    """The rows, figures and notes so far, saved as a report after each part."""
    command: str
    config: Config
    folder: Path
    end: float = 0.
    """when the current model must be done, as a reading of `time.monotonic`"""
    deadline: float = 0.
    """the same for the current part"""
    rows: list[dict] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: int = 0

    def add(self, model: str, name: str, value: float, unit: str = "", in_table: bool = True) -> None:
        """Add a figure, and a row of the table."""
        self.figures[f"{name}, {model}"] = float(value)
        if in_table: self.rows.append({"model": model, "measurement": name, "value": float(value), "unit": unit})

    def fail(self, text: str) -> None:
        """Add a note about something that is wrong; the script then ends with status 1."""
        self.failures += 1
        self.notes.append(text)

    def run(self, title: str, seconds: float, part: Callable[[], object]) -> None:
        """Run a part within its time limit, and save the report; a failure is one line in it."""
        start = time.monotonic()
        self.deadline = min(start + seconds, self.end)
        limit = max(self.deadline - start, 0.)
        print(f"{title} (at most {limit:.0f} s)", flush=True)
        try:
            with time_limit(limit): part()
        except (Exception, OutOfTime) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.fail(f"{title} failed: {reason}" if isinstance(error, OutOfTime) else
                      f"{title} failed: {type(error).__name__}: {reason}")
            print(self.notes[-1], file=sys.stderr, flush=True)
        self.figures[f"seconds, {title}"] = time.monotonic() - start
        self.save()

    def save(self) -> None:
        """Write report.json and report.md."""
        rows = self.rows or [{"model": "none", "measurement": "nothing was measured", "value": None, "unit": ""}]
        Report(self.command, self.config, self.figures, rows, self.notes).save(self.folder)


# Random models

@dataclass(frozen=True)
class Shape:
    """A target and its draft head."""
    name: str
    target: dict
    """fields of `LlamaConfig`"""
    dtype: torch.dtype
    nf4: bool
    head: dict
    """arguments of `EagleStudent.from_teacher`"""
    draft_vocabulary: int
    new_tokens: int
    """new tokens of a timed text"""


SHAPES = {
    "smollm2": Shape(
        "SmolLM2-135M shape, bf16",
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 1e5},
        torch.bfloat16, False, {"layers": [0, 1], "feature_layers": [3, 16, -1]}, 8192, 128),
    "codellama": Shape(
        "CodeLlama-7b shape, NF4",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 16384, "rope_theta": 1e6},
        torch.float16, True, {"layers": [0], "feed_forward": 2752, "feature_layers": [2, 16, -1]}, 8192, 96)}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 1e4}


def small(shape: Shape, device: torch.device) -> Shape:
    """Return a tiny version of a shape."""
    head = {"layers": [0], "feature_layers": [0, -1]}
    dtype = torch.float32 if device.type == "cpu" else shape.dtype
    return replace(shape, name=f"{shape.name}, tiny", target=TINY, dtype=dtype, head=head, draft_vocabulary=128,
                   new_tokens=24)


def to_nf4(layer: nn.Module) -> None:
    """Replace the linear layers of a decoder layer by 4-bit ones, as `transformers` does with `quantization: nf4`."""
    import bitsandbytes
    for name, old in list(layer.named_modules()):
        if type(old) is not nn.Linear: continue
        new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False, device="meta",
                                         compute_dtype=old.weight.dtype, compress_statistics=True, quant_type="nf4")
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, compress_statistics=True,
                                                quant_type="nf4", module=new).to(old.weight.device)
        layer.set_submodule(name, new)


@torch.no_grad()
def counting_model(shape: Shape, device: torch.device) -> LlamaForCausalLM:
    """Return a random Llama whose most probable next id is the last one plus 1, by a wide margin.

    The embedding dominates the last hidden state, and row j of the head is the embedding of j − 1. The layers, which
    are added one by one, change all logits, so an error in attention or cache shows in them.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**shape.target | {"num_hidden_layers": 0}, eos_token_id=None, pad_token_id=0,
                         tie_word_embeddings=False)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=shape.dtype)
        for i in range(shape.target["num_hidden_layers"]):
            layer = LlamaDecoderLayer(model.config, i).to(shape.dtype)
            if shape.nf4: to_nf4(layer)
            model.model.layers.append(layer)
    model.config.num_hidden_layers = shape.target["num_hidden_layers"]
    embedding = model.get_input_embeddings().weight.normal_()
    model.get_output_embeddings().weight.copy_(embedding.roll(1, 0) / embedding.shape[1]**.5)
    return model.eval().requires_grad_(False)


def counting_text(first: int, count: int, vocabulary_size: int) -> list[int]:
    """Return the ids that a `counting_model` generates: first, first + 1, ..."""
    return [(first + i) % vocabulary_size for i in range(count)]


def draft_head(shape: Shape, model: LlamaForCausalLM) -> EagleStudent:
    """Return an EAGLE head for a model, in float32 on its device, as `load_draft` returns one."""
    ids = torch.arange(shape.draft_vocabulary)
    return EagleStudent.from_teacher(model, draft_ids=ids, **shape.head).to(model.device).eval()


# Drafters with a known text

class NoDrafts(Drafter):
    """Never drafts."""

    def propose(self, sequences, budgets) -> list[Draft]:
        """Return an empty draft for each sequence."""
        return [Draft([]) for _ in sequences]


class SimulatedDrafter(EagleDrafter):
    """Runs a head for its cost, and proposes a known text in which each token is wrong with probability 1 − α."""

    def __init__(self, model: EagleStudent, text: list[int], rate: float, vocabulary_size: int):
        super().__init__(model, vocabulary_size=vocabulary_size)
        self.text, self.rate, self.random = text, rate, torch.Generator().manual_seed(0)

    def propose(self, sequences, budgets) -> list[Draft]:
        """Return a draft of the known text for each sequence, as long as the draft of the head."""
        return [self.known_text(len(sequence.tokens), len(draft.tokens))
                for sequence, draft in zip(sequences, super().propose(sequences, budgets))]

    def known_text(self, start: int, count: int) -> Draft:
        """Return the text from a position on, with errors."""
        wrong = torch.rand(count, generator=self.random) >= self.rate
        tokens = [(token + error) % self.vocabulary_size
                  for token, error in zip(self.text[start:start + count], wrong.tolist())]
        return Draft(tokens)


# Parts

RATES = (.6, .7, .8)  # simulated acceptance rates
GAMMA = 7             # most draft tokens: a target call has 8 tokens then
CONTEXT = 100         # tokens in the KV cache before a timed call
CAPACITY = 256        # positions of the KV cache in a timed call
FIRST_COUNTS = (1, 8, 4, 2, 16)  # tokens per call, in the order of compilation
MOST_NOISE = 4.       # graphs may differ from the eager step by this multiple of the rounding noise
CARDS = {"16 GB": 14.5, "24 GB": 22.}  # GiB that such a card leaves to PyTorch: without ECC, driver and CUDA context
BLOCK_OPTIONS = {"data.block_size": 32, "student.layers": [0], "student.draft_vocabulary": 128, "train.batch_size": 2,
                 "train.gradient_accumulation": 2}  # of the small run
SLIM_HEAD = {"student.layers": [0], "student.feed_forward": 2752, "student.feature_layers": [2, 16, -1],
             "student.draft_vocabulary": 8192, "train.single_step_share": 0.}  # of lesson 4, in its slower second part


class ModelParts:
    """The measurements of one shape."""

    def __init__(self, shape: Shape, device: torch.device, is_small: bool, found: Measurements):
        self.shape, self.device, self.is_small, self.found = shape, device, is_small, found
        self.name = shape.name
        self.text = counting_text(10, 16 + shape.new_tokens + GAMMA + 1, shape.target["vocab_size"])
        self.prompt = self.text[:16]
        self.latency, self.estimates = LatencyModel(), {rate: AcceptanceEstimate() for rate in RATES}

    def add(self, name: str, value: float, unit: str = "", in_table: bool = True) -> None:
        """Add a measurement of this model."""
        self.found.add(self.name, name, value, unit, in_table)

    def make_model(self) -> None:
        """Make the target."""
        if self.shape.nf4 and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError("4-bit weights need bitsandbytes, which is not installed")
        self.model, seconds = timed(lambda: counting_model(self.shape, self.device), self.device)
        self.add("weights of the target", sum(p.nbytes for p in self.model.parameters()) / 1e9, "GB")
        self.add("time to make the target", seconds, "s", in_table=False)

    def make_head(self) -> None:
        """Make the head, after the training, whose memory it would take."""
        self.head = draft_head(self.shape, self.model)
        self.add("weights of the head", sum(p.nbytes for p in self.head.parameters()) / 1e9, "GB")

    def graph_kinds(self) -> list[tuple[nn.Module, StepKind]]:
        """Return the models with the kinds of calls to compile, the most important ones first."""
        features = tuple(self.head.config.feature_layers)
        target, draft = usual_kinds(self.device, features), usual_kinds(self.device, (-1,))
        if self.is_small: target, draft = target[1:2] if self.shape.nf4 else target[:1], []
        pairs = [(self.model, kind) for kind in target] + [(self.head, kind) for kind in draft if kind.tokens < 16]
        return sorted(pairs, key=lambda pair: FIRST_COUNTS.index(pair[1].tokens))

    def compile(self) -> None:
        """Compile the graphs one by one, as many as the time allows."""
        kinds, longest = self.graph_kinds(), 0.
        for done, (model, kind) in enumerate(kinds):
            if time.monotonic() + longest > self.found.deadline:
                self.found.notes.append(f"{self.name}: {done} of {len(kinds)} graphs were compiled in the time.")
                return
            whose = "target" if model is self.model else "head"
            compiled, seconds = timed(lambda: compile_steps(model, [kind]), self.device)
            self.add(f"compiling the {whose}, {kind}", seconds, "s", in_table=False)
            print(f"  {whose}, {kind}: {seconds:.0f} s", flush=True)
            if not compiled: raise RuntimeError(f"the {whose} runs without graphs: {REFUSED[model]}")
            longest = max(longest, seconds)

    @torch.no_grad()
    def correctness(self) -> None:
        """Compare logits and hidden states of graphs and eager steps, before and behind position 128."""
        layers, worst = tuple(self.head.config.feature_layers), 0.
        pair = [kind(self.model, CAPACITY) for kind in (CachedModel, CompiledModel)]
        ids = torch.randint(self.shape.target["vocab_size"], (CAPACITY,)).tolist()
        for context in (CONTEXT, 2 * CONTEXT):
            for model in pair: model.forward([ids[model.lengths[0]:context]], [1])
            for count in range(1, 17):
                outputs = [model.forward([ids[context:context + count]], [count], layers) for model in pair]
                worst = max(worst, *(deviation(b[0].float(), a[0].float()) for a, b in zip(*outputs)))
                for model in pair: model.crop([context])
        noise, control = max(rounding_noise(self.model), .01), self.changed_context(pair[1], ids)
        self.add("graphs against eager, largest difference", worst, "σ")
        self.add("rounding noise", noise, "σ")
        self.add("the same with another context", control, "σ")
        if worst > MOST_NOISE * noise: self.found.fail(f"{self.name}: the graphs differ from the eager step.")
        if control < MOST_NOISE * noise: self.found.fail(f"{self.name}: rounding hides a changed context.")

    def changed_context(self, model: CompiledModel, ids: list[int]) -> float:
        """Return by how much logits change with 20 earlier tokens, in standard deviations."""
        rows = []
        for earlier in (ids[40:60], ids[140:160]):
            model.crop([40])
            model.forward([earlier], [1])
            rows.append(model.forward([ids[60:61]], [1])[0][0].float())
        return deviation(*rows)

    def steps(self) -> None:
        """Measure t(n) of eager steps and of graphs, c, v, and the distance from the memory limit."""
        counts = [1, 2, 5, 8] if self.is_small else list(range(1, 17))
        models = {"eager": CachedModel(self.model, CAPACITY), "graphs": CompiledModel(self.model, CAPACITY),
                  "head, eager": CachedModel(self.head, CAPACITY), "head, graphs": CompiledModel(self.head, CAPACITY)}
        times = call_times(models, counts, CONTEXT, repeats=3 if self.is_small else 9)
        for kind, calls in times.items():
            for n, value in calls.items(): self.add(f"t({n}), {kind}", value, "ms", in_table=False)
        table = [{"tokens": n} | {f"{kind}, ms": calls[n] for kind, calls in times.items()} for n in counts]
        self.found.notes.append(f"{self.name}: a call after {CONTEXT} tokens of context.\n\n{markdown_table(table)}")
        graphs, eager = times["graphs"], times["eager"]
        self.add("one-token step, eager", eager[1], "ms")
        self.add("one-token step, graphs", graphs[1], "ms")
        self.add("c, draft step / target step", times["head, graphs"][1] / graphs[1])
        self.add("v, call over 5 tokens / one token", graphs[5] / graphs[1])
        self.add("v, call over 8 tokens / one token", graphs[8] / graphs[1])
        bandwidth, _ = machine_limits(self.device, self.shape.dtype)
        bytes_read = sum(p.nbytes for p in self.model.parameters()) - self.model.get_input_embeddings().weight.nbytes
        self.add("memory bandwidth", bandwidth / 1e9, "GB/s")
        self.add("one-token step / memory limit", graphs[1] / (bytes_read / bandwidth * 1e3))

    def decode(self, drafter: Drafter, gamma: int, new_tokens: int) -> tuple[list[int], Statistics]:
        """Return the new tokens of kdcode, greedy, and its statistics."""
        settings = DecodeSettings(gamma=gamma, max_new_tokens=new_tokens)
        sequences = make_sequences([self.prompt], settings, 0, set(), None, self.device)
        for _ in SpeculativeDecoder(self.model, drafter, gamma, self.latency).steps(sequences): pass
        return sequences[0].tokens[len(self.prompt):], sequences[0].statistics

    def drafted(self, rate: float, new_tokens: int) -> tuple[list[int], Statistics]:
        """Return the same with the head and a simulated acceptance rate; γ adapts over all texts of a rate."""
        drafter = SimulatedDrafter(self.head, self.text, rate, self.shape.target["vocab_size"])
        if not self.is_small:  # with tiny models, drafting does not pay, and γ would be 0
            drafter = AdaptiveDrafter(drafter, self.device, self.latency, self.estimates[rate])
        return self.decode(drafter, GAMMA, new_tokens)

    @torch.inference_mode()
    def generate(self, new_tokens: int) -> tuple[list[int], None]:
        """Return the new tokens of `generate`."""
        ids = torch.tensor([self.prompt], device=self.device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "do_sample": False}
        with without_cudnn_attention(self.device):  # it plans anew for every length
            out = self.model.generate(ids, **options)
        return out[0, len(self.prompt):].tolist(), None

    def methods(self) -> dict[str, Callable]:
        """Return the ways of decoding by label; each takes a number of new tokens."""
        drafted = {f"kdcode, head, α = {rate}": partial(self.drafted, rate) for rate in RATES}
        return {"generate": self.generate,
                "kdcode without drafting": partial(self.decode, NoDrafts(), 0)} | drafted

    def decoding(self) -> None:
        """Measure tokens/s of each method, interleaved, and check their text; three rounds if the time allows."""
        methods, times, longest = self.methods(), {}, 0.
        for name, method in methods.items():  # to the end, because a CUDA graph is recorded for each span
            method(16 if name == "generate" else self.shape.new_tokens)
        reset_peak(self.device)
        for _ in range(1 if self.is_small else 3):
            if times and time.monotonic() + longest > self.found.deadline: break
            _, seconds = timed(lambda: self.decoding_round(methods, times), self.device)
            longest = max(longest, seconds)
        if self.device.type == "cuda":
            self.add("memory of decoding, peak", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        for name, runs in times.items(): self.decoding_rows(name, runs)
        speeds = {name: self.found.figures[f"{name}, {self.name}"] for name in times}
        plain, drafted = speeds["kdcode without drafting"], speeds["kdcode, head, α = 0.7"]
        self.add("kdcode without drafting / generate", plain / speeds["generate"])
        self.add("head with α = 0.7 / without drafting", drafted / plain)

    def decoding_round(self, methods: dict[str, Callable], times: dict[str, list[tuple]]) -> None:
        """Decode once with each method, and append seconds, tokens and statistics."""
        for name, method in methods.items():
            (tokens, counts), seconds = timed(lambda: method(self.shape.new_tokens), self.device)
            times.setdefault(name, []).append((seconds, tokens, counts))

    def decoding_rows(self, name: str, runs: list[tuple]) -> None:
        """Add the median speed of a method, its text's correctness, and the counts of its last run."""
        self.add(name, self.shape.new_tokens / statistics.median(seconds for seconds, *_ in runs), "tokens/s")
        wrong = sum(tokens != self.text[16:16 + self.shape.new_tokens] for _, tokens, _ in runs)
        if wrong: self.found.fail(f"{self.name}: {wrong} of {len(runs)} texts of {name} are wrong.")
        counts = runs[-1][-1]
        if counts is not None and sum(counts.verified):
            self.add(f"{name}: accepted", counts.acceptance_rate)
            self.add(f"{name}: tokens per target call", counts.tokens_per_call)

    def launches(self) -> None:
        """Count the launches of CUDA graphs and of kernels by the CPU: a graph that is used replaces the kernels'."""
        for name, method in list(self.methods().items())[1:3]:
            with torch.profiler.profile() as profiler: _, counts = method(16)
            events = {event.key: event.count for event in profiler.key_averages()}
            kernels = sum(count for key, count in events.items() if "LaunchKernel" in key)
            self.add(f"{name}: graph launches per target call", events.get("cudaGraphLaunch", 0) / counts.calls)
            self.add(f"{name}: kernel launches per target call", kernels / counts.calls)
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        self.add("graphs that the compiler could not record", skips)

    def release(self) -> None:
        """Free the memory of both models."""
        for name in ("model", "head"): vars(self).pop(name, None)
        torch._dynamo.reset()
        free_memory(self.device)


def free_memory(device: torch.device) -> None:
    """Collect garbage and return cached memory to the GPU."""
    gc.collect()
    if device.type == "cuda": torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Start to measure the peak of the allocated memory."""
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats()


# Training

class StepTimes(TrainerCallback):
    """The seconds of each optimizer step."""

    def __init__(self, device: torch.device): self.device, self.seconds = device, []

    def on_step_begin(self, *args, **kwargs): self.start = clock(self.device)

    def on_step_end(self, *args, **kwargs): self.seconds.append(clock(self.device) - self.start)


def numbered_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the numbers from 0 on."""
    vocabulary = {str(i): i for i in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(tokenizer_models.WordLevel(vocabulary, "0")),
                                   unk_token="0", bos_token="1", eos_token="2")


def random_corpus(config: Config, vocabulary_size: int, steps: int) -> Corpus:
    """Return random blocks for a number of optimizer steps, and two for validation."""
    size, count = config.data.block_size, steps * config.train.batch_size * config.train.gradient_accumulation
    ids = torch.randint(vocabulary_size, (count + 2, size), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row, "origin": "random", "language": "random"} for row in ids]
    return Corpus(Dataset.from_list(rows[:-2]), Dataset.from_list(rows[-2:]), {"train": {"sha256": "random ids"}})


def training_steps(config: Config, teacher: Teacher, steps: int) -> list[float]:
    """Return the seconds of optimizer steps; nothing is validated or saved."""
    times = StepTimes(teacher.device)
    config = with_overrides(config, {"train.max_steps": steps})
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, teacher, random_corpus(config, teacher.vocabulary_size, steps), Path(folder),
                               False, (times,))
        trainer.args.eval_strategy = trainer.args.save_strategy = "no"
        trainer.args.eval_on_start = trainer.args.load_best_model_at_end = False
        trainer.train()
    return times.seconds


@contextmanager
def memory_limit(device: torch.device, gib: float | None) -> Iterator[None]:
    """Let PyTorch use at most this much memory of the GPU in a `with` block, and measure the peak; None: all of it."""
    free_memory(device)
    reset_peak(device)
    if gib is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1., gib * 2**30 / total))
    try: yield
    finally: torch.cuda.set_per_process_memory_fraction(1.)


def steps_that_fit(device: torch.device, gib: float | None, steps: Callable[[], list[float]]) -> list[float] | None:
    """Return the seconds of optimizer steps with limited memory; None if it is not enough."""
    try:
        with memory_limit(device, gib): return steps()
    except torch.OutOfMemoryError: return None


def fitting_steps(parts: ModelParts, label: str, steps: Callable[[], list[float]]) -> list[float]:
    """Train with the memory of the smallest card that is enough, and report it; return the seconds of the steps."""
    cards = CARDS if parts.device.type == "cuda" else {}
    for card, gib in cards.items():
        seconds = steps_that_fit(parts.device, gib, steps)
        parts.add(f"{label}: fits {card}", float(seconds is not None), "1: yes")
        if seconds: return seconds
    with memory_limit(parts.device, None): return steps()


def training(parts: ModelParts, label: str, overrides: dict, config: Config) -> None:
    """Measure tokens/s, memory and the card that is enough, with the settings of configs/codellama.yaml."""
    config = with_overrides(config, overrides | (BLOCK_OPTIONS if parts.is_small else {}))
    teacher = Teacher(parts.model, numbered_tokenizer(parts.shape.target["vocab_size"]), "counting")
    seconds = fitting_steps(parts, label, lambda: training_steps(config, teacher, 3))
    if parts.device.type == "cuda":
        parts.add(f"{label}: memory, peak", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        parts.add(f"{label}: memory with the allocator's reserve", torch.cuda.max_memory_reserved() / 2**30, "GiB")
    tokens = config.train.batch_size * config.train.gradient_accumulation * config.data.block_size
    parts.add(f"{label}: speed", tokens / statistics.median(seconds[1:]), "tokens/s")


# The whole script

WHOLE = 480  # seconds for which the limits of the parts below are meant
FIRST_SHARE = .4  # of the time for the first of two models


def measure(key: str, device: torch.device, is_small: bool, found: Measurements, scale: float) -> None:
    """Run all parts for one shape, without those that lack a model. `scale` multiplies the time limits."""
    shape = small(SHAPES[key], device) if is_small else SHAPES[key]
    parts = ModelParts(shape, device, is_small, found)
    slim = {"student.feature_layers": [0, -1], "train.ttt_steps": 2} if is_small else SLIM_HEAD
    trained = {
        "training": (60, lambda: training(parts, "training, three layers", {}, found.config)),
        "training of the slim head": (40, lambda: training(parts, "training, slim head", slim, found.config))}
    todo = {"model": (40, parts.make_model)} | (trained if key == "codellama" else {}) | {
        "head": (20, parts.make_head), "compilation": (75, parts.compile), "correctness": (25, parts.correctness),
        "steps": (30, parts.steps), "decoding": (70, parts.decoding), "launches": (15, parts.launches)}
    for title, (seconds, part) in todo.items():
        found.run(f"{shape.name}: {title}", seconds * scale, part)
        if title in ("model", "head") and not hasattr(parts, title): return
    parts.release()


def arguments_of(words: list[str]) -> argparse.Namespace:
    """Return the command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the report")
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--seconds", type=float, default=WHOLE, help="time limit of the whole script")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Measure and write the report; return the exit status, 1 if a part failed or a result is wrong."""
    options, start = arguments_of(words), time.monotonic()
    try: device = pick_device(options.device)
    except ConfigError:
        sys.exit(f"test-gpu: PyTorch finds no {options.device} device, so nothing was measured; run it on a machine "
                 "with a GPU, or with --device cpu --small to test the script")
    options.out.mkdir(parents=True, exist_ok=True)
    config = with_overrides(load_config(ROOT/"configs"/"codellama.yaml"), {"name": "gpu"})
    found = Measurements(shlex.join(["python3", "tests/gpu.py", *words]), config, options.out)
    for i, key in enumerate(options.model, 1):
        found.end = start + options.seconds * (1 if i == len(options.model) else FIRST_SHARE)
        measure(key, device, options.small, found, options.seconds / WHOLE)
    print((options.out/"report.md").read_text())
    return int(found.failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
