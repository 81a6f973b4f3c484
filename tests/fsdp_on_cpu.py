"""Run the kdcode command with FSDP on CPU processes: PyTorch shards on CPUs too, but accelerate allows only GPUs."""
import torch
from accelerate import state
from accelerate.utils import DistributedType

from kdcode import cli

prepare_backend = state.PartialState._prepare_backend


def prepare_as_gpu(self, *arguments):
    backend, kind = prepare_backend(self, *arguments)
    return backend, DistributedType.MULTI_GPU if kind is DistributedType.MULTI_CPU else kind


def main(words):
    state.PartialState._prepare_backend = prepare_as_gpu
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    torch.distributed.init_process_group("gloo")
    return cli.main(words)
