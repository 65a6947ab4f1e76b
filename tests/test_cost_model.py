"""bench/cost_model.py foretells what an H200 took on states that it is not calibrated on."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import cost_model as model

H200 = model.machines()["h200"]
WORKLOADS = model.read_workloads()
UNSEEN = sorted(set(WORKLOADS) - {model.CALIBRATED_ON})


def predicted(name, **changed):
    return model.predict(replace(WORKLOADS[name], **changed), H200, model.MEASURED)


def without_ramp(kernel, machine):
    return kernel.seconds(machine, replace(model.Efficiency(), ramp=0.0))


@pytest.mark.parametrize("name", UNSEEN)
def test_passes_and_their_big_kernels_take_about_what_is_predicted(name):
    found = predicted(name)
    seen = model.measured(found)
    for part, most in (("forward", 1.15), ("backward", 1.3)):
        ratio = found.total(part) / seen.seconds[part]
        print(f"  {part}: {ratio:.2f} of {1e3 * seen.seconds[part]:.1f} ms")
        assert 1 / most < ratio < most
        whole = sum(seen.kernels[part].values())
        big = [(k, s) for k, s, _ in found.passes[part] if seen.kernels[part][k.name] > whole / 20]
        assert len(big) >= 2
        for kernel, seconds in big:
            ratio = 1e3 * seconds / seen.kernels[part][kernel.name]
            print(f"    {kernel.name}: {ratio:.2f}")
            assert 1 / 1.5 < ratio < 1.5, kernel.name


@pytest.mark.parametrize("name", WORKLOADS)
def test_memory_and_kept_words_are_those_that_were_measured(name):
    """The words were counted without a GPU, on states made of other random numbers."""
    w, found = WORKLOADS[name], predicted(name)
    assert found.extra_bytes == pytest.approx(model.measured(found).extra_bytes, rel=0.1)
    if w.inferred:
        return  # its words are those that the GPU's run kept
    pairs = sum(g.rows * g.words for groups in w.groups for g in groups)
    kept = (pairs + w.weight_entries + w.column_entries) / (w.N * w.V)
    times = json.loads((model.H200_RESULTS / "gpu.json").read_text())["times"]
    [ours] = [t["kept"] for t in times if t["states"] == name and t["way"] == "papo_kernels"]
    assert kept == pytest.approx(ours, rel=0.1)


def test_twice_the_rows_take_twice_the_products():
    [once, twice] = (
        predicted(model.CALIBRATED_ON, N=n).passes["forward"][0] for n in (16_384, 32_768)
    )
    assert once[0].name == "products" and twice[2] == "products"
    assert twice[1] == pytest.approx(2 * once[1])


def test_slow_memory_slows_what_it_bounds_and_nothing_else():
    slow = replace(H200, copied_bytes=H200.copied_bytes / 1.1)
    bounds = set()
    for timed in predicted(model.CALIBRATED_ON).passes.values():
        for kernel, _, _ in timed:
            before, bound = without_ramp(kernel, H200)
            after, still = without_ramp(kernel, slow)
            if bound == "memory":
                assert after == pytest.approx(1.1 * before)
            elif still == bound:
                assert after == before
            bounds.add(bound)
    assert {"memory", "products", "instructions", "cache"} <= bounds


def test_every_launch_leaves_a_gap():
    found = predicted(model.CALIBRATED_ON)
    longer = replace(found, gap=found.gap + 1e-6)
    for name, timed in found.passes.items():
        launches = sum(k.launches for k, _, _ in timed)
        assert longer.total(name) - found.total(name) == pytest.approx(1e-6 * launches)
        assert launches > 100


def test_a_design_with_fewer_bytes_and_kernels_takes_less_of_both():
    """Each change alone, and of the sum no more memory than the bytes that it loses."""
    w = WORKLOADS[model.CALIBRATED_ON]
    before = model.predict(w, H200, model.MEASURED)
    for field in ("sum_bytes", "rounding_bytes", "norm_bytes", "small_kernels"):
        design = replace(model.MEASURED, **{field: getattr(model.NOW, field)})
        assert model.predict(w, H200, design).total("backward") < before.total("backward")
    assert model.predict(w, H200, model.NOW).total("forward") < before.total("forward")
    now = model.predict(w, H200, model.NOW)
    saved = before.extra_bytes - now.extra_bytes
    assert 0 < saved <= w.V * w.D * (model.MEASURED.sum_bytes - 1)
