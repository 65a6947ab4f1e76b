"""EasyR1's actor beside `papo_fast.integrations.easyr1`: see easyr1.sh, which runs this.

Each case has processes of its own. In each, a random Qwen2.5-VL goes through EasyR1's
`DataParallelPPOActor`, which makes whole logits, and through the same with the hook; the terms of
PAPO are compared with ones that are computed here from whole logits.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easyr1_pieces import Case, batch_of, check_record, config_of, model_of, use_cpu
from tiny_model import write_model
from torch import Tensor

TERMS = {"kl_prcp_coef": 0.5, "entropy_loss_coef": 0.03, "aug_entropy_loss_coef": 0.05}
FEW = [("default", "token"), ("gspo", "seq")]
EVERY = [(kind, "token") for kind in ("default", "gspo", "gspo_token", "cispo", "sapo")]
EVERY += [("default", "seq"), ("gspo", "seq")]

CASES = {
    "padded": Case(),
    "packed": Case(packed=True),
    "padded, LoRA": Case(lora=True),
    "packed, LoRA": Case(packed=True, lora=True),
    "padded, FSDP over 2 ranks": Case(ranks=2, fsdp=True),
    "packed, FSDP over 2 ranks": Case(packed=True, ranks=2, fsdp=True),
    "packed, FSDP over 2 ranks, LoRA": Case(packed=True, ranks=2, fsdp=True, lora=True),
    "packed, Ulysses over 2 ranks, text": Case(packed=True, ranks=2, ulysses=2, pictures=False),
}


def with_logits(actor: type, processor: Any, trained: bool) -> type:
    """EasyR1's actor with PAPO's terms from whole logits, one row at a time without padding."""
    import sys

    from papo_fast.data.corruption import PatchCorruption, prompt_seed

    corrupt = PatchCorruption.of(processor.image_processor, 0.6)
    module = sys.modules[actor.__module__]

    class ByLogits(actor):
        def _forward_micro_batch(self, micro_batch, temperature):
            log_probs = super()._forward_micro_batch(micro_batch, temperature)
            if torch.is_grad_enabled():
                rows = [self._row(micro_batch, i, temperature) for i in range(len(log_probs))]
                self.statistics = [torch.stack(values) for values in zip(*rows, strict=True)]
            return log_probs

        def _row(self, batch, i, temperature):
            here, response = batch["attention_mask"][i].bool(), batch["responses"].shape[-1]
            ids, its = batch["input_ids"][i][here], batch["multi_modal_inputs"][i]
            prompt = ids[: here[:-response].sum()]
            seed = prompt_seed(0, 0, zlib.crc32(prompt.numpy().tobytes()))
            black = corrupt(its["pixel_values"], its["image_grid_thw"], seed)
            streams = []
            for pixels, gradient in ((its["pixel_values"], True), (black, trained)):
                with torch.set_grad_enabled(gradient):
                    out = self.actor_module(
                        input_ids=ids[None],
                        attention_mask=None
                        if self.config.padding_free
                        else torch.ones_like(ids)[None],
                        position_ids=batch["position_ids"][i][:, None, here],
                        pixel_values=pixels,
                        image_grid_thw=its["image_grid_thw"],
                        use_cache=False,
                    )
                scored = out.logits[0, len(prompt) - 1 : -1] / temperature
                streams.append(scored.log_softmax(-1))
            p, q = streams
            found = (p.exp() * (p - q)).sum(-1), -(p.exp() * p).sum(-1), -(q.exp() * q).sum(-1)
            pad = response - len(p)
            return [torch.nn.functional.pad(values, (0, pad)) for values in found]

        def update_policy(self, data):
            own = module.compute_policy_loss

            def with_terms(**given):
                loss, metrics = own(**given)
                mask = given["response_mask"]
                for value, coef in zip(self.statistics, (-0.5, 0.03, 0.05), strict=True):
                    if given["loss_avg_mode"] == "token":
                        average = (value * mask).sum() / mask.sum()
                    else:
                        average = ((value * mask).sum(-1) / mask.sum(-1)).mean()
                    loss = loss + coef * average
                return loss, metrics

            module.compute_policy_loss = with_terms
            try:
                return super().update_policy(data)
            finally:
                module.compute_policy_loss = own

    ByLogits.__module__ = actor.__module__
    return ByLogits


class Run:
    """One actor of a class, and what its updates did."""

    def __init__(self, actor: type, folder: Path, case: Case, loss_type: str, average: str):
        self.case, self.module = case, model_of(folder, case)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        optimizer.register_step_pre_hook(lambda *_: self._record())
        self.gradients: dict[str, Tensor] = {}
        self.actor = actor(config_of(case, loss_type, average), self.module, optimizer)

    def _record(self) -> None:
        from contextlib import nullcontext

        from torch.distributed.fsdp import FullyShardedDataParallel

        context: Any = nullcontext()
        if self.case.fsdp:
            context = FullyShardedDataParallel.summon_full_params(self.module, with_grads=True)
        with context:
            for name, p in self.module.named_parameters():
                if p.grad is None:
                    continue
                found = p.grad.clone()
                if self.case.ranks > 1 and not self.case.fsdp:  # FSDP would have averaged them
                    torch.distributed.all_reduce(found)
                    found /= self.case.ranks
                self.gradients[name] = found

    def update(self, data: Any) -> tuple[dict[str, Any], dict[str, Tensor], float]:
        self.gradients = {}
        start = time.perf_counter()
        metrics = self.actor.update_policy(data)
        return metrics, self.gradients, time.perf_counter() - start


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of a gradient's element, over the largest element there is."""
    assert ours.keys() == theirs.keys() and theirs, ours.keys() ^ theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    return max(((ours[k] - g).abs().max() / largest).item() for k, g in theirs.items())


def run_case(rank: int, case: Case, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case.ranks), "LOCAL_RANK": "0"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}.init", rank=rank, world_size=case.ranks
    )
    use_cpu()
    check_record()
    from transformers import AutoProcessor
    from verl.utils import ulysses
    from verl.workers.actor.dp_actor import DataParallelPPOActor

    from papo_fast.integrations.easyr1 import papo_actor

    if case.ulysses > 1:
        ulysses.set_ulysses_sequence_parallel_group(torch.distributed.group.WORLD)
    processor = AutoProcessor.from_pretrained(folder)
    data = batch_of(processor, rank // case.ulysses, case.pictures)
    counted = data.batch["response_mask"].bool()
    row: dict[str, float] = {}
    seconds: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        row[name] = max(row.get(name, 0.0), value)

    def compare(name: str, ours: type, theirs: type, losses: list[tuple[str, str]] = FEW) -> None:
        for loss_type, average in losses:
            pair = [Run(actor, folder, case, loss_type, average) for actor in (ours, theirs)]
            if name == "GRPO" and (loss_type, average) == FEW[0]:
                a, b = (its.actor.compute_log_prob(data) for its in pair)
                note("log-probs", (a - b)[counted].abs().max().item())
            (mine, gradients, took), (its, expected, slow) = (x.update(data) for x in pair)
            if (loss_type, average) == FEW[0]:
                seconds[f"{name}, hook"], seconds[f"{name}, logits"] = took, slow
            for key, values in its.items():
                a, b = (np.atleast_1d(x) for x in (mine[key], values))
                note(f"{name}: metrics", (abs(a - b) / np.maximum(1, abs(b))).max().item())
            note(f"{name}: gradients", farthest(gradients, expected))

    losses = EVERY if case in (CASES["padded"], CASES["packed"]) else FEW
    compare("GRPO", papo_actor(DataParallelPPOActor), DataParallelPPOActor, losses)
    if case.pictures:
        for aug in ("frozen", "trained"):
            compare(
                "PAPO" if aug == "frozen" else "PAPO, trained",
                papo_actor(DataParallelPPOActor, aug=aug, **TERMS),
                with_logits(DataParallelPPOActor, processor, aug == "trained"),
            )
    everywhere: list[Any] = [None] * case.ranks
    torch.distributed.all_gather_object(everywhere, row)
    if rank == 0:
        row = {k: max(its[k] for its in everywhere) for k in row}
        out.write_text(json.dumps(row | {"seconds": seconds}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def table(rows: dict[str, dict[str, Any]]) -> str:
    first = next(iter(rows.values()))
    columns = [name for name in first if name != "seconds"]
    timed = list(first["seconds"])
    lines = [
        "| | " + " | ".join([*columns, *(f"{name}, s" for name in timed)]) + " |",
        "|---|" + "---:|" * (len(columns) + len(timed)),
    ]
    for label, row in rows.items():
        cells = [f"{row[c]:.1e}" if c in row else "–" for c in columns]
        cells += [f"{row['seconds'][c]:.2f}" if c in row["seconds"] else "–" for c in timed]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", num_key_value_heads=2)  # Ulysses gives each rank some heads
        for number, label in enumerate(arguments.case or CASES):
            case, out = CASES[label], folder / f"case{number}"
            torch.multiprocessing.spawn(run_case, (case, folder / "model", out), nprocs=case.ranks)
            rows[label] = json.loads(out.read_text())
            print(label, json.dumps(rows[label]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
