"""One policy update by the authors' schedule, TRL and papo_fast: time, memory, tokens, FLOPs.

    PYTHONPATH=.:kernels python bench/train_step.py --size quick
    PYTHONPATH=.:kernels python bench/train_step.py --size full --threads 2
    PYTHONPATH=.:kernels python bench/train_step_report.py      # picture and page from the JSON

The shape is the published one, image tokens : text : response = 640 : 120 : 350, divided by 5
(quick: by 8), at G = 5 and G = 16, on a Qwen2.5-VL with random weights whose vision tower, language
model and lm_head have the shares of the FLOPs that they have in the 3B model. Before anything is
timed, all ways of one objective must give the same loss and gradients.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from measure import PeakMemory, machine
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from train_step_case import (
    EOS,
    PROMPTS,
    SIZES,
    make_case,
    model_config,
    relative_error,
    shares,
    shares_of_3b,
    write_checkpoint,
)
from train_step_meter import counted, dense_gradients
from train_step_report import show
from train_step_trl import TRL
from train_step_ways import OBJECTIVES, OURS, WAYS

from papo_fast.consoles import as_command
from papo_fast.model.packing import pack
from papo_fast.model.policy import inference
from papo_fast.rollout.hf import HFRollout

RESULT = Path(__file__).parent / "results" / "cpu" / "train_step.json"
# Makes the optimizer's state, which is in no way's memory.
WARM_UP = next(w for w in WAYS if w.name == OURS["grpo"])
ROUNDS = 2
SAME = 1e-4
# How far what token_stats leaves out of the gradients by default may move them.
SPARSE = 5e-3


def measured_once(way, case, want):
    """(record of one call, loss and gradients); raises where they are not those of `want`.

    Memory is what the process held at most beyond weights, optimizer state and data; gradients
    are in it.
    """
    ours = getattr(way, "layout", None) == "trainer"
    first = None
    if ours or isinstance(way, TRL):
        # the first call also makes what is made once: compiled code, TRL's trainer
        with dense_gradients():
            first = way(case), _gradients(way, case)
    for model in _models(way, case):
        model.zero_grad(set_to_none=True)
    memory = PeakMemory(case.policy.device)
    memory.start()
    with counted(_models(way, case), trl=isinstance(way, TRL)) as work:
        loss = way(case)
    peak = memory.read()
    found = loss, _gradients(way, case)
    exact = _compared(way, first or found, want or first or found, SAME)
    record = {
        "group_size": case.group_size,
        "way": way.name,
        "objective": way.objective,
        "peak_bytes": peak,
        "tokens": work.tokens,
        "flops": work.flops,
        "kept": work.kept,
        "loss": loss,
        "gradient_error": exact,
        "gradient_error_with_budget": None,
    }
    if ours:
        record["gradient_error_with_budget"] = _compared(way, found, want or first, SPARSE)
    return record, first or found


def _models(way, case):
    if isinstance(way, TRL):
        return [way.trainer.model, way.trainer.ref_model]
    return [case.policy.model, case.reference.model]


def _gradients(way, case):
    return {n: p.grad.clone() for n, p in _models(way, case)[0].named_parameters()}


def _compared(way, got, want, most):
    (loss, gradients), (want_loss, want_gradients) = got, want
    error = relative_error(gradients, want_gradients)
    if not (error <= most and abs(loss - want_loss) <= SAME * max(abs(want_loss), 0.01)):
        sys.exit(
            f"{way.name} ({way.objective}): loss {loss:.8f} and gradients off by {error:.1e}, "
            f"expected loss {want_loss:.8f} and at most {most:.0e}; nothing was timed"
        )
    return error


def sampling_seconds(case):
    """Of sampling the responses as papo_fast's trainer does without an engine of its own."""
    engine = HFRollout(case.policy, [EOS], EOS, len(case.samples))
    prompts = [group.prompt.encoded for group in case.groups]
    start = time.perf_counter()
    engine.generate(
        prompts,
        case.group_size,
        temperature=1.0,
        max_new_tokens=max(len(s) for s in case.samples),
        seed=0,
        advance=lambda n: None,
    )
    return time.perf_counter() - start


def describe_policy(case):
    """Mean entropies and perception KL of the responses, in nats."""
    batch = pack(case.groups, case.policy.prompt_positions, aug=True).to(case.policy.device)
    with inference(case.policy):
        stats, _ = case.policy.stats(batch)
    names = ("entropy", "aug_entropy", "kl_prcp")
    return {n: getattr(stats, n).mean().item() for n in names}


def run(size_name, rounds, console, device="cpu", dtype="float32"):
    """The content of the JSON file."""
    size = SIZES[size_name]
    content = {
        "size": size_name,
        "rounds": rounds,
        "machine": machine(device) | {"transformers": transformers.__version__},
        "shares": shares(model_config(size), size),
        "shares_of_3b": shares_of_3b(),
        "image_text_response": [size.image, size.text, size.response],
        "micro_tokens": size.micro_tokens,
        "policies": {},
        "sampling_seconds": {},
        "records": [],
    }
    with tempfile.TemporaryDirectory() as folder, _progress(console) as progress:
        write_checkpoint(size, folder)
        for group_size in PROMPTS:
            case = make_case(size, group_size, folder, device, dtype)
            gc.freeze()  # collecting before each way then takes milliseconds
            content["policies"][str(group_size)] = describe_policy(case)
            records, sampling = _one_case(case, rounds, progress)
            content["records"] += records
            content["sampling_seconds"][str(group_size)] = sampling
    return content


def _one_case(case, rounds, progress):
    ways = sorted([TRL(), *WAYS], key=lambda way: list(OBJECTIVES).index(way.objective))
    task = progress.add_task(f"G = {case.group_size}", total=len(ways) * (rounds + 1))
    records, want, sampling = {}, {}, []
    WARM_UP(case)
    for way in ways:
        progress.update(task, description=f"G = {case.group_size}, checking {way.name}")
        key = way.objective, way.name
        records[key], found = measured_once(way, case, want.get(way.objective))
        want.setdefault(way.objective, found)
        progress.advance(task)
    want.clear()
    seconds = {key: [] for key in records}
    for turn in range(rounds):
        sampling.append(sampling_seconds(case))
        for way in ways:
            progress.update(
                task, description=f"G = {case.group_size}, {turn + 1}/{rounds} {way.name}"
            )
            gc.collect()
            start = time.perf_counter()
            way(case)
            if case.policy.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[way.objective, way.name].append(time.perf_counter() - start)
            progress.advance(task)
    for key, record in records.items():
        record["seconds"] = min(seconds[key])
        record["median_seconds"] = statistics.median(seconds[key])
    return list(records.values()), min(sampling)


def _progress(console):
    columns = [*Progress.get_default_columns()[:-1], TimeElapsedColumn()]
    return Progress(*columns, console=console, transient=True)


def main(arguments=None):
    text, usage = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=text, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="quick",
        help="quick: a model of 2 M parameters, two minutes; full: 10 M, under ten minutes on two "
        "idle cores (default: quick)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda, in float32 (default: cpu)")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own choice)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 2)")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write (default: bench/results/cpu/train_step.json with --size full, none "
        "with quick)",
    )
    args = parser.parse_args(arguments)
    if args.threads < 0 or (args.rounds is not None and args.rounds < 1):
        parser.error("--threads must be at least 0 and --rounds at least 1")
    if importlib.util.find_spec("trl") is None:
        parser.error("TRL is not installed: pip install -c constraints/cpu.txt -e '.[bench]'")
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(width=max(128, Console().width))
    content = run(args.size, args.rounds or ROUNDS, console, args.device)
    show(content, console)
    on_cpu = torch.device(args.device).type == "cpu"
    out = args.out or (RESULT if args.size == "full" and on_cpu else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n")
        console.print(f"Written to {out}")


if __name__ == "__main__":
    sys.exit(as_command(main))
