"""Weights that stay as they are, shared out among processes (FSDP): each holds a part of every layer.

A layer's weights are gathered while it reads and let go afterwards. What is trained (LoRA, norms, heads, embeddings) is
small, stays whole in every process, and its gradients are added up as without sharding, so the loop, checkpoints and
the folder that comes of it are the same. Embeddings stay whole as well: the head of the model reads them outside the
decoder.
"""

import inspect
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from lococo.errors import ArgumentError, UnsupportedModelError


def shard(model: PreTrainedModel, trained: Iterable[nn.Parameter]) -> torch.device:
    """Share a model's weights out among the processes, in place; every process must do so.

    All of them must read the same number of chunks from here on: who gathers a layer waits for the others.

    Args:
        model: On the CPU, where every process loads all of it; never whole on the device.
        trained: Parameters that stay whole.

    Returns:
        The process's device, where everything is now.

    Raises:
        ArgumentError: If there is one process alone, or a torch before 2.7.
        UnsupportedModelError: If the model's layers are not found.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    accelerator = Accelerator()
    if accelerator.num_processes < 2:
        raise ArgumentError("shard shares weights out among processes, and there is one; start several with torchrun")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ArgumentError(f"shard needs torch 2.7 or later, got {torch.__version__}; upgrade it, or leave shard out")
    decoder, layers = model.get_decoder(), layers_of(model)
    if not layers:
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} are not found as a list of its decoder, so there is nothing to "
            "share out; leave shard out"
        )
    device: torch.device = accelerator.device
    of_layers = {p for layer in layers for p in layer.parameters()}
    whole = set(trained) | (set(model.parameters()) - of_layers)
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    for part in (*layers, decoder):  # the decoder, which has nothing left to share, lets layers be gathered ahead
        fully_shard(part, mesh=mesh, ignored_params=whole)
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    return device


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers, in their order."""
    decoder = model.get_decoder()
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [part for part in decoder.children() if isinstance(part, nn.ModuleList) and len(part) == count]
    return [layer for part in lists for layer in part]
