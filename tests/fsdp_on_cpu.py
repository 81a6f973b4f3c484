"""The kdcode command with CPU processes that share a model: accelerate allows FSDP for GPUs only, torch for both."""
import sys

import torch
from accelerate import state
from accelerate.utils import DistributedType

prepare = state.PartialState._prepare_backend


def as_if_gpus(self, *arguments):
    backend, kind = prepare(self, *arguments)
    return backend, DistributedType.MULTI_GPU if kind is DistributedType.MULTI_CPU else kind


state.PartialState._prepare_backend = as_if_gpus
state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
torch.distributed.init_process_group("gloo")

from kdcode.cli import main

sys.exit(main())
