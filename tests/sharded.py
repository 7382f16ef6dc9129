"""One of two processes that hold shards of a converted model (FSDP2 over gloo): compares loss and
gradients with those of the whole model, and saves the gathered weights.

    torchrun --nproc-per-node 2 sharded.py FOLDER OUT
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ar2diff.checkpoint.io import load_checkpoint, save
from ar2diff.checkpoint.output import claimed
from ar2diff.core.forward import output_at
from ar2diff.diffusion.cross_entropy import has_plain_head, loss_of_hidden

folder, out = map(Path, sys.argv[1:])
torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
checkpoint = load_checkpoint(str(folder))
model = checkpoint.model
whole = copy.deepcopy(model)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

ids, index = torch.arange(3, 27).view(2, 12), torch.tensor([1, 5, 14])
target, coef = torch.tensor([3, 4, 5]), torch.tensor([1.0, 0.5, 2.0])


def loss_of(of: torch.nn.Module) -> torch.Tensor:
    return output_at(
        of, index, input_ids=ids,
        instead=lambda head, hidden: loss_of_hidden(
            head, hidden, target, coef, checkpoint.suppressed, 3
        ).total.view(1, 1, 1),
    ).logits.sum()  # fmt: skip


note = {"plain": has_plain_head(model), "losses": [], "apart": 0.0}
for of in (whole, model):
    loss = loss_of(of)
    loss.backward()
    note["losses"].append(loss.item())
for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
    difference = (parameter.grad.full_tensor() - other.grad).abs().max() / other.grad.abs().max()
    note["apart"] = max(note["apart"], difference.item())
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
weights = get_model_state_dict(model, options=options)  # as accelerate gathers them
if dist.get_rank() == 0:
    note["gathered"] = sorted(name for name in weights if "lm_head" in name)
    with claimed(out, [folder], resume=False, overwrite=False) as output:
        save(checkpoint, output, {}, weights)
    (out / "note.json").write_text(json.dumps(note))
dist.barrier()
dist.destroy_process_group()
