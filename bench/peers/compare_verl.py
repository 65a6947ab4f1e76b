"""verl's FSDP engine beside `papo_fast.integrations.verl_engine`: see verl.sh, which runs this.

Each case has processes of its own. In each, a random Qwen2.5-VL goes through verl's
`FSDPEngineWithLMHead`, which makes whole logits, and through `PAPOEngine`; the loss of PAPO is
compared with one that is computed here from the logits that verl's engine makes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from tiny_model import write_model
from torch import Tensor
from verl_pieces import (
    PROMPTS,
    RESPONSES,
    STRATEGY,
    Case,
    batch_of,
    check_record,
    parts_of,
    use_cpu,
)

COEFFICIENTS = {"kl_prcp_coef": 0.02, "entropy_loss_coef": 0.03, "aug_entropy_loss_coef": 0.05}
AVERAGES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)

CASES = {
    "padded": Case(),
    "packed": Case(packed=True),
    "padded, 2 ranks": Case(ranks=2),
    "packed, 2 ranks": Case(packed=True, ranks=2),
    "packed, Ulysses over 2 ranks": Case(packed=True, ranks=2, ulysses=2),
}


def engine_of(folder: Path, case: Case, ours: bool, papo: dict | None = None) -> Any:
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    parts = parts_of(folder, case, ours, papo)
    if ours:
        engine = EngineRegistry.new("language_model", STRATEGY, **parts)
        assert type(engine).__name__ == "PAPOEngine", type(engine)
    else:
        engine = FSDPEngineWithLMHead(**parts)
    engine.initialize()
    return engine


def loss_of_worker(folder: Path, case: Case, data: Any, loss_function: Any) -> float:
    """PAPO's loss as verl's own `TrainingWorker` reports it for one mini-batch.

    NaN on ranks that report nothing: of those that share sequences only the first does.
    """
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    config = TrainingWorkerConfig(
        model_type="language_model", **parts_of(folder, case, True, COEFFICIENTS)
    )
    worker = TrainingWorker(config)
    worker.reset()
    worker.set_loss_fn(loss_function)
    dp = case.ranks // case.ulysses
    tu.assign_non_tensor(data, mini_batch_size=PROMPTS * RESPONSES * dp, epochs=1)
    told = worker.train_mini_batch(data)
    if told is None:
        return float("nan")
    metrics = tu.get(told, "metrics")
    assert "actor/kl_prcp" in metrics, sorted(metrics)
    return metrics["loss"][0]


def ppo_loss_of(average: str) -> Any:
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(
        strategy=STRATEGY,
        rollout_n=RESPONSES,
        ppo_micro_batch_size_per_gpu=2,
        clip_ratio_high=0.3,
        use_kl_loss=True,
        kl_loss_coef=0.01,
        loss_agg_mode=average,
    )
    return functools.partial(ppo_loss, config=config)


def papo_by_logits(engine: Any, processor: Any, verl_loss: Any, trained: bool) -> Any:
    """A `forward_step` for verl's own engine: PAPO's loss from two passes of whole logits."""
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.workers.utils.padding import no_padding_2_padding

    from papo_fast.data.corruption import PatchCorruption, prompt_seed

    corrupt = PatchCorruption.of(processor.image_processor, 0.6)

    def jagged(values: Tensor, output_args: dict, offsets: Tensor) -> Tensor:
        if "pad_size" in output_args:
            values = engine._gather_and_unpad_packed(values[0], output_args["pad_size"])
        else:
            values = torch.cat(
                [row[:n] for row, n in zip(values, offsets.diff().tolist(), strict=True)]
            )
        return torch.nested.nested_tensor_from_jagged(values, offsets)

    def forward_step(micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        inputs, output_args = engine.prepare_model_inputs(micro_batch=micro_batch)
        pixels = [
            corrupt(
                its["pixel_values"],
                its["image_grid_thw"],
                prompt_seed(0, 0, zlib.crc32(prompt.numpy().tobytes())),
            )
            for prompt, its in zip(
                micro_batch["prompts"].unbind(), micro_batch["multi_modal_inputs"], strict=True
            )
        ]
        with torch.set_grad_enabled(trained):
            aug = engine.module(**{**inputs, "pixel_values": torch.cat(pixels)}, use_cache=False)
        real = engine.module(**inputs, use_cache=False)
        p, q = ((out.logits / 0.8).log_softmax(-1) for out in (real, aug))
        statistics = {
            "kl_prcp": (p.exp() * (p - q)).sum(-1),
            "entropy_loss": -(p.exp() * p).sum(-1),
            "aug_entropy_loss": -(q.exp() * q).sum(-1),
        }
        found = engine.prepare_model_outputs(real, output_args, micro_batch, None)
        loss, metrics = verl_loss(model_output=found, data=micro_batch)
        mask = micro_batch.select("response_mask").to_padded_tensor()["response_mask"].bool()
        config = verl_loss.keywords["config"]
        for name, values in statistics.items():
            values = jagged(values, output_args, micro_batch["input_ids"].offsets())
            term = agg_loss(
                no_padding_2_padding(values, micro_batch),
                mask,
                config.loss_agg_mode,
                **config.global_batch_info,
            )
            sign = -1 if name == "kl_prcp" else 1
            loss = loss + sign * COEFFICIENTS[f"{name}_coef"] * term
        return loss, {"model_output": {}, "loss": loss.item(), "metrics": metrics}

    return forward_step


def gradients(module: Any) -> dict[str, Tensor]:
    return {
        name: p.grad.full_tensor() for name, p in module.named_parameters() if p.grad is not None
    }


def update(engine: Any, data: Any, loss_function: Any) -> tuple[float, dict[str, Tensor], float]:
    """The loss and the gradients of one update, and its seconds."""
    with engine.train_mode():
        engine.optimizer_zero_grad()
        start = time.perf_counter()
        out = engine.forward_backward_batch(data, loss_function)
        seconds = time.perf_counter() - start
        found = gradients(engine.module)
    loss = torch.tensor(sum(out["loss"]))
    torch.distributed.all_reduce(loss)
    return loss.item() / torch.distributed.get_world_size(), found, seconds


def statistics(engine: Any, data: Any) -> dict[str, Tensor]:
    """(B, L) log-probs and entropies, as verl's trainer asks for them before an update."""
    from verl.workers.utils.padding import no_padding_2_padding

    with engine.eval_mode():
        out = engine.infer_batch(data)["model_output"]
    return {name: no_padding_2_padding(out[name], data) for name in ("log_probs", "entropy")}


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of a gradient's element, over the largest element there is."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    return max(((ours[k] - g).abs().max() / largest).item() for k, g in theirs.items())


def run_case(rank: int, case: Case, folder: Path, out: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    use_cpu()
    check_record()
    ranks = {"RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_RANK": 0}  # TrainingWorker reads them
    os.environ |= {name: str(n) for name, n in ranks.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}.init", rank=rank, world_size=case.ranks
    )
    losses = {average: ppo_loss_of(average) for average in AVERAGES}
    theirs: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def updates(engine: Any, data: Any, label: str) -> dict[str, Any]:
        found = {average: update(engine, data, losses[average]) for average in AVERAGES}
        again = [update(engine, data, losses["token-mean"])[2] for _ in range(rounds)]
        seconds[label] = min(again)
        return found

    engine = engine_of(folder, case, ours=False)
    processor = engine.model_config.processor
    data = functools.partial(batch_of, processor, rank // case.ulysses, case=case)
    theirs["statistics"] = statistics(engine, data(ours=False))
    theirs["GRPO"] = updates(engine, data(ours=False), "verl")
    for trained in (False, True):
        name = "PAPO, trained" if trained else "PAPO"
        theirs[name] = {}
        for average in AVERAGES:
            engine.forward_step = papo_by_logits(engine, processor, losses[average], trained)
            theirs[name][average] = update(engine, data(ours=False), losses[average])
        seconds[f"{name}, logits"] = min(
            update(engine, data(ours=False), losses["token-mean"])[2] for _ in range(rounds)
        )
    del engine

    engine = engine_of(folder, case, ours=True)
    ours["statistics"] = statistics(engine, data(ours=True))
    ours["GRPO"] = updates(engine, data(ours=True), "hook")
    for name, aug in (("PAPO", "frozen"), ("PAPO, trained", "trained")):
        engine = engine_of(folder, case, ours=True, papo=COEFFICIENTS | {"aug": aug})
        ours[name] = updates(engine, data(ours=True), f"{name}, hook")

    row: dict[str, Any] = {"seconds": seconds}
    for name, x in theirs["statistics"].items():
        row[name] = (ours["statistics"][name] - x).abs().max().item()
    for name in ("GRPO", "PAPO", "PAPO, trained"):
        pairs = [(ours[name][a], theirs[name][a]) for a in AVERAGES]
        row[f"{name}: loss"] = max(abs(x[0] - y[0]) / max(1, abs(y[0])) for x, y in pairs)
        row[f"{name}: gradients"] = max(farthest(x[1], y[1]) for x, y in pairs)
    told = loss_of_worker(folder, case, data(ours=True), losses["token-mean"])
    row["TrainingWorker: PAPO's loss"] = abs(told - theirs["PAPO"]["token-mean"][0])
    row["what PAPO adds"] = abs(theirs["PAPO"]["token-mean"][0] - theirs["GRPO"]["token-mean"][0])
    if rank == 0:
        out.write_text(json.dumps(row))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest is told")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        for number, label in enumerate(arguments.case or CASES):
            case = CASES[label]
            out = folder / f"case{number}"
            torch.multiprocessing.spawn(
                run_case, (case, folder / "model", out, arguments.rounds), nprocs=case.ranks
            )
            rows[label] = json.loads(out.read_text())
            print(label, json.dumps(rows[label]), flush=True)
    print(table(rows))


def table(rows: dict[str, dict[str, Any]]) -> str:
    columns = [name for name in next(iter(rows.values())) if name != "seconds"]
    timed = list(next(iter(rows.values()))["seconds"])
    lines = [
        "differences from verl's logits; loss and gradients are the largest of its five averages",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{row[c]:.1e}" for c in columns) + " |")
    lines += [
        "",
        "seconds of one update, one thread per rank",
        "| | " + " | ".join(timed) + " |",
        "|---|" + "---:|" * len(timed),
    ]
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{row['seconds'][c]:.2f}" for c in timed) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
