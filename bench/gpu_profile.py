"""Which kernels a call spends its time in, and what the host does meanwhile."""

import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

# Rows of a table that are printed; gpu.json has all of them.
PRINTED = 25


def profile(run, what, function):
    """Profiles one call, after one that warms up; stores and prints the table of its kernels."""
    activities = [ProfilerActivity.CPU]
    if not run.interpreted:
        activities.append(ProfilerActivity.CUDA)
    if not run.interpreted:
        function()
        run.synchronize()
    begin = time.perf_counter()
    function()
    run.synchronize()
    unprofiled = time.perf_counter() - begin
    with torch.profiler.profile(activities=activities) as seen:
        function()
        run.synchronize()
    events = seen.key_averages()
    kernels = _rows(events, not run.interpreted)
    host = [] if run.interpreted else _runtime(events)
    record = {"what": what, "wall_ms": 1e3 * unprofiled, "kernels": kernels, "host": host}
    run.add("profiles", record)
    print(lines(record, PRINTED), flush=True)


def _rows(events, on_gpu):
    """[{name, count, ms, share}] of the kernels, or without a GPU of torch's operators."""
    found = []
    for event in events:
        if on_gpu:
            time_us = event.self_device_time_total
            if event.device_type != DeviceType.CUDA:
                continue
        else:
            time_us = event.self_cpu_time_total
        found.append({"name": event.key, "count": event.count, "ms": time_us / 1e3})
    whole = sum(row["ms"] for row in found) or 1.0
    for row in found:
        row["share"] = row["ms"] / whole
    return sorted(found, key=lambda row: -row["ms"])


def _runtime(events):
    """[{name, count, ms}] of calls of the CUDA runtime: launches, copies, synchronisations."""
    found = [
        {"name": e.key, "count": e.count, "ms": e.self_cpu_time_total / 1e3}
        for e in events
        if e.device_type == DeviceType.CPU and e.key.startswith(("cuda", "cuLaunch", "hip"))
    ]
    return sorted(found, key=lambda row: -row["ms"])


def lines(record, most):
    """Text of a profile: the kernels that took most of the time, and the host's calls."""
    whole = sum(row["ms"] for row in record["kernels"])
    said = [f"  profile of {record['what']}: {record['wall_ms']:.2f} ms, kernels {whole:.2f} ms"]
    said += [
        f"    {r['ms']:9.3f} ms {r['share']:6.1%} {r['count']:6d} × {r['name'][:90]}"
        for r in record["kernels"][:most]
    ]
    if len(record["kernels"]) > most:
        rest = record["kernels"][most:]
        said.append(f"    {sum(r['ms'] for r in rest):9.3f} ms in {len(rest)} others")
    calls = ", ".join(f"{r['name']} {r['count']}" for r in record["host"][:8])
    return "\n".join([*said, *([f"    host: {calls}"] if calls else [])])
