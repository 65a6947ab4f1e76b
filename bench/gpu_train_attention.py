"""Attention of packed trees on the device against float64, forward and gradient."""

import torch
from gpu_train_record import LeftOut

from papo_fast.model import attention
from papo_fast.model.attention import Segment, TreeLayout

HEADS = {16: (4, 2), 64: (8, 2), 80: (4, 4), 128: (7, 1)}
"""{size of a head: heads of queries, heads of keys}; 80 is the vision tower's, 7 to 1 the 7B's."""
# Largest relative error (Frobenius) of the output and of each gradient. bfloat16 rounds inputs and
# probabilities to 2^-9.
MOST = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}


def tree(prompts, branches):
    """Segments: for each prompt length, the prompt and branches of these lengths."""
    segments, start = [], 0
    for prompt in prompts:
        root = Segment(start, prompt)
        segments.append(root)
        start += prompt
        for n in branches:
            segments.append(Segment(start, n, root.start, root.length))
            start += n
    return segments


def allowed(segments):
    """(T, T) bool: may the row's token attend to the column's; from the definition."""
    total = sum(s.length for s in segments)
    mask = torch.zeros(total, total, dtype=torch.bool)
    for s in segments:
        own = slice(s.start, s.start + s.length)
        mask[own, own] = torch.ones(s.length, s.length).tril().bool()
        mask[own, s.prefix_start : s.prefix_start + s.prefix] = True
    return mask


def dense(q, k, v, mask, scale):
    """Softmax attention of (T, H, D) by the whole matrix."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def _with_gradients(run, leaves, upstream):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def _errors(got, want):
    return {
        name: ((g.double().cpu() - w).norm() / w.norm()).item()
        for name, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True)
    }


def paths(device, dtype):
    """{name: function} of the ways that could run these dtypes there."""
    found = {"sdpa": attention._sdpa}
    if device == "cuda" and dtype != torch.float32:
        found["varlen"] = attention._torch_varlen
        if attention.chosen_path(device, dtype).run is attention._flash_varlen:
            found["flash_attn"] = attention._flash_varlen
    return found


def attention_errors(segments, size, heads, dtype, device, run, seed=0):
    """{out, dq, dk, dv: relative error} against float64 on the same rounded inputs."""
    g = torch.Generator().manual_seed(seed)
    total = sum(s.length for s in segments)
    q, k, v, up = (
        torch.randn(total, n, size, generator=g).to(dtype).double()
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    scale, mask = size**-0.5, allowed(segments)
    want = _with_gradients(lambda *x: dense(*x, mask, scale), (q, k, v), up)
    layout = TreeLayout(segments).to(device)
    here = [x.to(device, dtype) for x in (q, k, v)]
    got = _with_gradients(lambda *x: run(*x, layout, scale), here, up.to(device))
    return _errors(got, want)


def attention_step(recorder):
    segments = tree((37, 64, 5), (23, 1, 40))
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        chosen = attention.chosen_path(recorder.device.type, dtype)
        recorder.note(f"chosen for {name}", chosen.name)
        for way, run in paths(recorder.device.type, dtype).items():
            for size, heads in HEADS.items():
                with recorder.part(f"{way}, {name}, heads of {size}"):
                    errors = attention_errors(segments, size, heads, dtype, recorder.device, run)
                    worst = max(errors, key=errors.get)
                    label = f"{way} {name} D={size} ({worst})"
                    recorder.check(label, errors[worst], MOST[dtype])
    with recorder.part("under autocast, as the model calls it"):
        recorder.check("autocast", autocast_error(recorder.device, segments), MOST[torch.bfloat16])
    with recorder.part("times"):
        times(recorder)


def autocast_error(device, segments):
    """Of `tree_attention` on float32 queries and keys under bfloat16 autocast."""
    g = torch.Generator().manual_seed(1)
    total, size = sum(s.length for s in segments), 64
    q, k, v = (torch.randn(1, n, total, size, generator=g) for n in (4, 2, 2))
    layout = TreeLayout(segments).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, _ = attention.tree_attention(
            torch.nn.Module(), *(x.to(device) for x in (q, k, v)), None, tree=layout
        )
    want = dense(*(x[0].transpose(0, 1).double() for x in (q, k, v)), allowed(segments), size**-0.5)
    if out.dtype != torch.bfloat16:
        raise AssertionError(f"attention under autocast gave {out.dtype}")
    return ((out[0].double().cpu() - want).norm() / want.norm()).item()


def times(recorder):
    """Seconds forward and backward of the published shape in a 7B's heads, G = 5."""
    if not recorder.cuda:
        raise LeftOut("the published shape is for a GPU")
    segments = tree((760, 760), [350] * 5)
    total = sum(s.length for s in segments)
    layout = TreeLayout(segments).to(recorder.device)
    q, k, v = (
        torch.randn(total, n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (28, 4, 4)
    )
    upstream = torch.randn_like(q)
    flops = 3.5 * 4 * layout.pairs * 28 * 128
    for way, run in paths("cuda", torch.bfloat16).items():

        def once(run=run):
            run(q, k, v, layout, 128**-0.5).backward(upstream)

        seconds = recorder.seconds(once)
        recorder.note(f"{way} ms", seconds * 1e3)
        recorder.note(f"{way} TFLOP/s", flops / seconds / 1e12)
