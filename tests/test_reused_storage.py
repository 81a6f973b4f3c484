"""The path of CUDA graphs, on the CPU: padded calls, spans of powers of two, and storage that is used again."""
import gc
import threading
from unittest import mock

import pytest
import torch
from conftest import ROOT
from test_compiled_step import DRAFT, generated, PROMPTS, TARGETS, tiny
from torch._inductor import cudagraph_trees
from torch._inductor.output_code import CompiledFxGraph

from kdcode import cached_model, compiled_step, decode, drafters
from kdcode.batching import Batch
from kdcode.cached_model import CachedModel
from kdcode.compiled_step import compile_steps, CompiledModel, FREE, share_cuda_graphs, StaticModel, StepKind
from kdcode.config import DecodeSettings
from kdcode.decode import make_decoder, make_sequences

SETTINGS = DecodeSettings(gamma=3, adaptive=False, student_weights="plain", max_new_tokens=20)


class Static(StaticModel):
    """The step without a graph, with the arguments of `CompiledModel`."""
    def __init__(self, model, capacity, batch_size, compile): super().__init__(model, capacity, batch_size)


@pytest.fixture
def used(monkeypatch):
    """Take the path of CUDA graphs; return models and addresses of all calls."""
    FREE.clear()  # targets are shared with other tests
    calls, run = [], compiled_step.run_step
    def run_step(inputs, stance):
        calls.append((inputs[0], tuple(x.data_ptr() for layer in inputs[1] for x in layer)))
        return run(inputs, stance)
    monkeypatch.setattr(compiled_step, "uses_cuda_graphs", lambda device: True)
    monkeypatch.setattr(compiled_step, "run_step", run_step)
    for module in (decode, drafters): monkeypatch.setattr(module, "CompiledModel", Static)
    with mock.patch.dict(compiled_step.COMPILERS, clear=True):
        yield calls


def addresses(used, model):
    """Return the addresses of the first layer's keys in calls of a model."""
    return {places[0] for called, places in used if called is model}


@torch.no_grad()
def decoding(target, prompts, steps=1000, settings=SETTINGS):
    """Yield after each step of a decoder; return the new tokens of each prompt."""
    sequences = make_sequences(prompts, settings, 0, set(), None, target.device)
    for i, _ in enumerate(make_decoder(target, DRAFT, sequences, settings).steps(sequences)):
        yield
        if i == steps: break
    return [sequence.tokens[len(prompt):] for sequence, prompt in zip(sequences, prompts)]


def finish(generator):
    """Return what a generator returns."""
    try:
        while True: next(generator)
    except StopIteration as end: return end.value


def expected(target, prompts):
    """Return the new tokens of `generate`."""
    return [generated(target, prompt, len(prompt) + 20)[len(prompt):] for prompt in prompts]


@torch.no_grad()
@pytest.mark.slow
def test_second_sequence_needs_no_new_graph(used, post_compile=CompiledFxGraph.post_compile):
    """Its calls have the first one's addresses and sizes. Padded calls give the logits of calls that are not.

    PyTorch records no CUDA graph that writes to an input whose address may change.
    """
    model = tiny(num_hidden_layers=1, max_position_embeddings=512)
    with mock.patch.object(CompiledFxGraph, "post_compile", autospec=True, side_effect=post_compile) as graphs, \
         torch._inductor.config.patch(force_disable_caches=True):  # code from the disk does not say what is static
        assert compile_steps(model, [StepKind(False, 4)])
    for graph, _, _, options in (call.args for call in graphs.call_args_list):
        assert graph.mutated_input_idxs and set(graph.mutated_input_idxs) <= set(options["static_input_idxs"])
    with mock.patch.object(CompiledModel, "stance", "fail_on_recompile"):
        for _ in range(2):
            ours, theirs = CompiledModel(model, 200), CachedModel(model, 200)
            for ids in ([1, 2, 3] * 40, [5, 6, 7], [8, 9, 10, 11], [13, 14, 15]):
                pair = [state.forward([ids], [len(ids)])[0][0] for state in (ours, theirs)]
                assert (pair[0] - pair[1]).abs().max() < 1e-4
    assert len(used) == 1 + 2 * 3 and len(addresses(used, model)) == 1


def test_what_is_left_in_storage_has_no_influence(used):
    target = TARGETS["full attention"]
    for left in (0, 1e4, float("nan"), float("inf")):
        assert finish(decoding(target, PROMPTS[2:])) == expected(target, PROMPTS[2:])
        for model in (target, DRAFT):
            for x in [x for storage in FREE[model] for layer in storage.layers for x in layer]: x.fill_(left)
    for model in (target, DRAFT): assert len(addresses(used, model)) == 1


def test_sequences_at_the_same_time_have_different_storage(used):
    """Two decoders take turns; the third gets the storage of one that was given up."""
    target = TARGETS["full attention"]
    pair = [decoding(target, [prompt]) for prompt in PROMPTS[1:]]
    for _ in range(3):
        for one in pair: next(one)
    before = addresses(used, target)
    assert len(before) == 2
    del one
    pair.pop(0).close()
    assert finish(decoding(target, PROMPTS[2:])) == expected(target, PROMPTS[2:])
    assert finish(pair[0]) == expected(target, PROMPTS[2:]) and addresses(used, target) == before


def test_storage_is_free_after_an_error(used):
    target = TARGETS["full attention"]
    for _ in range(3):
        with mock.patch.object(StaticModel, "run", side_effect=RuntimeError("out of memory")):
            with pytest.raises(RuntimeError, match="out of memory"): finish(decoding(target, PROMPTS[2:]))
        gc.collect()
    assert finish(decoding(target, PROMPTS[2:])) == expected(target, PROMPTS[2:])
    assert len(addresses(used, target)) == 1 and len(FREE[target]) <= compiled_step.KEPT_STORAGES


@torch.no_grad()
def test_batch_keeps_its_addresses(used):
    """Sequences join and leave; from the second time on, all calls are at addresses of the first time."""
    target, found = TARGETS["sliding window"], []
    for _ in range(3):
        used.clear()
        batch = Batch(target, DRAFT, SETTINGS)
        sequences = make_sequences(PROMPTS, SETTINGS, 0, set(), None, target.device)
        for sequence in sequences:
            list(batch.add(sequence))
            batch.step()
        while batch.sequences: batch.step()
        assert [one.tokens[len(p):] for one, p in zip(sequences, PROMPTS)] == expected(target, PROMPTS)
        found.append(addresses(used, target))
        del batch
        gc.collect()
    assert found[2] == found[1] < found[0] and len(found[1]) == 2
    assert len(FREE[target]) == 2


def test_threads_share_cuda_graphs():
    """PyTorch keeps its CUDA graphs by thread; a graph of the compiling thread must be that of the decoding one."""
    def state(): return cudagraph_trees.get_obj(cudagraph_trees.local, "tree_manager_containers")
    found = []
    def work(share):
        if share: share_cuda_graphs()
        found.append(state())
    share_cuda_graphs()
    for share in (True, True, False):
        thread = threading.Thread(target=work, args=(share,))
        thread.start()
        thread.join()
    assert found[0] is found[1] is state() and found[2] is not state()


def test_cudnn_is_off_for_calls_only(monkeypatch):
    """Loading a teacher changes no setting of PyTorch; the calls of a decoder change it for their time."""
    seen, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    def attention(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sdpa(*args, **kwargs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    without = cached_model.without_cudnn_attention
    for module in (cached_model, compiled_step):
        monkeypatch.setattr(module, "without_cudnn_attention", lambda device: without(torch.device("cuda")))
    for kind in (CachedModel, StaticModel):
        with torch.no_grad():
            state = kind(tiny(), 40)
            seen.clear()
            state.forward([[1, 2, 3]], [1])
            state.forward([[4, 5]], [1])
        assert len(seen) == 4 and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()
    assert [path.stem for path in ROOT.glob("kdcode/*.py") if "enable_cudnn" in path.read_text()] == ["cached_model"]
