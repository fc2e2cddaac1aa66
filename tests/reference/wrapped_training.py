"""A few steps of training through the wrappers of distributed training, ours and the plain way."""

import torch
import torch.distributed as dist
from small_models import small_model
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.model.reader import ResponseReader

CASES = [
    (wrapper, architecture, frozen_head)
    for wrapper in ("DDP", "FSDP1", "FSDP2")
    for architecture in ("tied", "untied")
    for frozen_head in (False, True)
]


def wrapped(model, wrapper):
    if wrapper == "DDP":
        return DistributedDataParallel(model)
    layers = model.model.layers
    if wrapper == "FSDP1":
        policy = ModuleWrapPolicy({type(layers[0])})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu
        )
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def losses(case, *, ours):
    """Of three steps of gradient descent on this rank's own batch."""
    wrapper, architecture, frozen_head = case
    tokenizer = build_tokenizer()
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(5, len(tokenizer), (3, 12))
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, 4:10] = True
    labels = ids.roll(-1, dims=1)[positions]

    model = small_model(tokenizer, architecture).train()
    model.get_output_embeddings().requires_grad_(not frozen_head)
    model = wrapped(model, wrapper)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reader = ResponseReader(chunk_elements=5 * len(tokenizer))
    found = []
    for _ in range(3):
        if ours:
            tokens, _ = reader.token_statistics(model, positions, labels, input_ids=ids)
            loss = -tokens.logps.mean()
        else:
            loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[positions], labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
