"""The trainer on a GPU, step by step, for a machine that is lent for minutes.

    bash bench/gpu_train.sh OUT_DIR [--seconds N] [--steps NAME,...] [--device cpu]

Each step is a process of its own, forked from one that has imported everything and touched no GPU:
a crash, a hang or a CUDA error ends one step and no other. The steps are in the order of what is
worth most; the first of them, which time nothing, run several at once. What does not fit into the
budget is left out and named.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

JOBS = 4
PAUSE = 0.05
LAST_LINES = 12


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        module, function: what is called with a `Recorder`.
        limit: seconds after which it is ended.
        needs: seconds without which it is not begun.
        alone: nothing else runs beside it, since it times something.
        arguments: further ones of the function.
    """

    name: str
    module: str
    function: str
    limit: float
    needs: float = 10.0
    alone: bool = False
    arguments: tuple = ()


MACHINE = Step("machine", "gpu_train_record", "machine_facts", 60)
STEPS = (
    Step("doctor", "gpu_train_runs", "doctor", 60),
    Step("attention", "gpu_train_attention", "attention_step", 60),
    Step("update-qwen2_5_vl", "gpu_train_update", "update", 90, arguments=("qwen2_5_vl",)),
    Step("update-qwen3_vl", "gpu_train_update", "update", 90, arguments=("qwen3_vl",)),
    Step("train-float32", "gpu_train_runs", "train_and_resume", 150, arguments=("float32",)),
    Step("train-bfloat16", "gpu_train_runs", "train_and_resume", 150, arguments=("bfloat16",)),
    Step("fsdp", "gpu_train_sharded", "sharded", 90),
    Step("rollout", "gpu_train_rollout", "rollout", 60),
    Step("servers", "gpu_train_rollout", "servers", 240, 60),
    Step("lora", "gpu_train_update", "lora", 60),
    Step("liger", "gpu_train_update", "liger", 60),
    Step("memory", "gpu_train_times", "memory", 60, alone=True),
    Step("options", "gpu_train_options", "options", 60, alone=True),
    Step("times-G5", "gpu_train_times", "times", 90, 15, alone=True, arguments=(5,)),
    Step("times-G16", "gpu_train_times", "times", 90, 15, alone=True, arguments=(16,)),
    Step("rollout-speed", "gpu_train_rollout", "speed", 45, alone=True),
    Step("layers-7B", "gpu_train_times", "layers_of_7b", 90, 20, alone=True),
)
# Imported before the first fork, so that no step pays for it again.
PRELOAD = (
    "gpu_train_attention",
    "gpu_train_update",
    "gpu_train_sharded",
    "gpu_train_rollout",
    "gpu_train_runs",
    "gpu_train_times",
)


class Running:
    """A step's process."""

    def __init__(self, step, limit, bench):
        self.step, self.limit = step, limit
        self.folder = Path(tempfile.mkdtemp(prefix=step.name + "-", dir=bench.scratch))
        self.log, self.record = self.folder / "output.log", self.folder / "record.json"
        self.start = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            _child(step, self, bench)

    @property
    def seconds(self):
        return time.perf_counter() - self.start

    def kill(self):
        for target in (lambda: os.killpg(self.pid, 9), lambda: os.kill(self.pid, 9)):
            try:
                target()
            except (ProcessLookupError, PermissionError):
                continue

    def ended(self):
        """Exit status (negative: a signal) once it has ended or was ended for its limit."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0 and self.seconds > self.limit:
            self.kill()
            os.waitpid(self.pid, 0)
            return "limit"
        if pid == 0:
            return None
        self.kill()  # what it left running
        return os.waitstatus_to_exitcode(status)

    def result(self, status):
        """The step's entry of gpu_train.json."""
        content = {"numbers": {}, "checks": [], "remarks": [], "failures": []}
        if self.record.exists():
            content |= json.loads(self.record.read_text())
        wrong = [c for c in content["checks"] if not c["ok"]]
        errors = [f"{f['part']}: {f['error']}" for f in content["failures"]]
        errors += [f"{c['name']} is {c['value']}, more than {c['most']:g}" for c in wrong]
        outcome = "left out" if content.get("left_out") else "ok"
        if content.get("left_out"):
            content["remarks"].insert(0, content["left_out"])
        if status == "limit":
            errors.append(f"ended after its limit of {self.limit:.0f} s")
        elif status != 0 or content.get("error"):
            ended = f"signal {-status}" if status < 0 else f"exit status {status}"
            errors.append(content.get("error") or f"it ended with {ended}")
        if errors:
            outcome = "failed"
            errors.append("output: " + " | ".join(_lines(self.log)[-LAST_LINES:]))
        kept = {key: content[key] for key in ("numbers", "checks", "remarks")}
        seconds, peak = round(self.seconds, 2), content.get("peak_bytes")
        return entry(self.step, outcome, seconds=seconds, peak_bytes=peak, errors=errors, **kept)


def entry(step, outcome, **known):
    """A step's entry of gpu_train.json."""
    nothing = {"numbers": {}, "checks": [], "remarks": [], "errors": []}
    return {"name": step.name, "outcome": outcome, "seconds": 0.0, "peak_bytes": None} | (
        nothing | known
    )


def _lines(path):
    text = path.read_text(errors="replace") if path.exists() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _child(step, running, bench):
    """The forked process; does not return."""
    os.setsid()
    log = os.open(running.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_DFL)
    cores = len(os.sched_getaffinity(0))
    job = {
        "step": step.name,
        "record": str(running.record),
        "device": bench.device,
        "small": bench.small,
        "folder": str(running.folder),
        "shared": str(bench.scratch),
        # several at once: threads that wait for each other lose more than they gain
        "threads": max(1, cores // 2) if step.alone and not bench.small else 1,
    }
    if bench.fresh:
        os.execv(sys.executable, [sys.executable, __file__, "--child", json.dumps(job)])
    run_step(job)


def run_step(job):
    """One step in this process, which ends here."""
    status = 1
    try:
        import torch
        from gpu_train_record import LeftOut, Recorder, told

        step = next(s for s in (MACHINE, *STEPS) if s.name == job["step"])
        torch.set_num_threads(job["threads"])
        places = (job[k] for k in ("record", "device", "small", "folder", "shared"))
        recorder = Recorder(*places)
        try:
            function = getattr(importlib.import_module(step.module), step.function)
            function(recorder, *step.arguments)
            status = 0
        except LeftOut as reason:
            recorder.content["left_out"] = str(reason)
            status = 0
        except BaseException as error:
            traceback.print_exc()
            recorder.content["error"] = told(error)
        recorder.content["peak_bytes"] = recorder.peak_bytes()
        recorder.write()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # no destructor of a half-broken CUDA context


class Bench:
    """The steps within a budget, and what came of them."""

    def __init__(self, out, device, seconds, jobs, scratch, small=None):
        self.out, self.device, self.budget, self.jobs = Path(out), device, seconds, jobs
        self.small = device == "cpu" if small is None else small
        self.scratch = Path(scratch)
        self.fresh = False  # steps import everything anew, where a forked process gets no GPU
        self.start = time.perf_counter()
        self.content = {"device": device, "budget": seconds, "steps": []}
        (self.out / "gpu_train.log").write_text("")

    @property
    def left(self):
        return self.budget - (time.perf_counter() - self.start)

    def run(self, steps):
        """Run all, several at once where they time nothing; every one gets an entry."""
        waiting, running = list(steps), []
        try:
            while waiting or running:
                for r in list(running):
                    if (status := r.ended()) is not None:
                        running.remove(r)
                        self.finish(r, r.result(status))
                while waiting and self._may_start(waiting[0], running):
                    step = waiting.pop(0)
                    if self.left < step.needs:
                        self.leave_out(step, f"{max(self.left, 0):.0f} s were left")
                    else:
                        running.append(Running(step, min(step.limit, self.left), self))
                time.sleep(PAUSE)
        except KeyboardInterrupt:
            for r in running:
                r.kill()
                os.waitpid(r.pid, 0)
                self.finish(r, r.result(-signal.SIGINT))
            for step in waiting:
                self.leave_out(step, "interrupted")

    def _may_start(self, step, running):
        if step.alone:
            return not running
        return len(running) < self.jobs and not any(r.step.alone for r in running)

    def leave_out(self, step, reason):
        self.add(entry(step, "left out", remarks=[reason]))

    def failed(self, name):
        """Whether the last run of this step failed."""
        return [s["outcome"] for s in self.content["steps"] if s["name"] == name][-1] == "failed"

    def finish(self, running, result):
        with (self.out / "gpu_train.log").open("a") as log:
            log.write(f"===== {running.step.name}\n")
            log.write(running.log.read_text(errors="replace") if running.log.exists() else "")
        shutil.rmtree(running.folder, ignore_errors=True)
        self.add(result)

    def add(self, result):
        self.content["steps"].append(result)
        self.write()
        print(line(result), flush=True)

    def write(self):
        self.content["seconds"] = round(time.perf_counter() - self.start, 1)
        partial = self.out / "gpu_train.json.partial"
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.out / "gpu_train.json")
        (self.out / "gpu_train.md").write_text(table(self.content))


def line(result):
    """One readable line of a step."""
    peak = result["peak_bytes"]
    parts = [
        f"{result['outcome']:8}",
        f"{result['name']:18}",
        f"{result['seconds']:6.1f} s",
        f"{peak / 2**20:8.0f} MiB" if peak else " " * 12,
    ]
    said = result["errors"] or [*_numbers(result), *result["remarks"]]
    return "  ".join([*parts, "; ".join(said)[:600]])


def _numbers(result):
    for c in result["checks"]:
        yield f"{c['name']} {c['value']}"
    for name, value in result["numbers"].items():
        if isinstance(value, int | float | str) or not result["checks"]:
            yield f"{name} {' '.join(_text(value)[:200].split())}"


def table(content):
    """All of it as a Markdown table, each number of a step on a line of its own below it."""
    rows = ["| step | outcome | seconds | peak MiB |", "|---|---|---|---|"]
    for s in content["steps"]:
        peak = f"{s['peak_bytes'] / 2**20:.0f}" if s["peak_bytes"] else ""
        rows.append(f"| {s['name']} | {s['outcome']} | {s['seconds']:.1f} | {peak} |")
    for s in content["steps"]:
        rows += ["", f"## {s['name']}", ""]
        rows += [f"- {e}" for e in [*s["errors"], *s["remarks"]]]
        rows += [
            f"- {c['name']}: {c['value']} (at most {c['most']:g}){'' if c['ok'] else ' **wrong**'}"
            for c in s["checks"]
        ]
        rows += [f"- {name}: {_text(value)}" for name, value in s["numbers"].items()]
    return "\n".join(rows) + "\n"


def _text(value):
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return str(value).replace("\n", " / ")


def preload(bench):
    """Import what the steps need; a module that cannot be imported fails its steps alone."""
    start = time.perf_counter()
    broken = {}
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except Exception as error:
            traceback.print_exc()
            broken[name] = f"{type(error).__name__}: {error}"
    bench.content["import_seconds"] = round(time.perf_counter() - start, 1)
    bench.content["import_errors"] = broken
    print(f"imports took {bench.content['import_seconds']} s", flush=True)
    return broken


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=240.0, help="budget (default: 240)")
    parser.add_argument("--steps", default="", help="names, by commas; default: all")
    parser.add_argument("--jobs", type=int, help="steps at once (default: 4; on the CPU 1)")
    args = parser.parse_args(arguments)
    if args.child:
        run_step(json.loads(args.child))
    if args.out is None:
        parser.error("the folder for the results is missing")
    names = [step.name for step in STEPS]
    wanted = [n for n in args.steps.split(",") if n] or names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--steps names {', '.join(unknown)}: known are {', '.join(names)}")
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as scratch:
        jobs = args.jobs or (JOBS if args.device == "cuda" else 1)
        bench = Bench(args.out, args.device, args.seconds, jobs, scratch)
        broken = preload(bench)
        bench.run([MACHINE])
        if bench.failed("machine"):
            bench.fresh = True
            bench.run([MACHINE])
        if bench.failed("machine"):
            print("the GPU cannot be used: see above; --device cpu shows that the program works")
            return 1
        for step in STEPS:
            if step.name in wanted and step.module in broken:
                reason = f"{step.module} cannot be imported: {broken[step.module]}"
                bench.add(entry(step, "failed", errors=[reason]))
        usable = [s for s in STEPS if s.name in wanted and s.module not in broken]
        bench.run(usable)
    outcomes = [s["outcome"] for s in bench.content["steps"]]
    print((args.out / "gpu_train.md").read_text().split("\n\n")[0])
    print(
        f"{outcomes.count('ok')} ok, {outcomes.count('failed')} failed, "
        f"{outcomes.count('left out')} left out; {bench.content['seconds']:.0f} s; "
        "all numbers in gpu_train.json and gpu_train.md, all output in gpu_train.log"
    )
    return 0 if "failed" not in outcomes else 1


if __name__ == "__main__":
    sys.exit(main())
