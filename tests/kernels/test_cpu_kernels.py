"""The C++ of the CPU: against float64, for every width of vectors, and what happens without it."""

import logging
import platform

import pytest
import torch
from kernel_oracle import FAST, OUTPUTS, Oracle, check, gradient_error, make_case, random_upstream

from papo_kernels import dense_rows, token_stats
from papo_kernels.chunked_backward import GradientSum
from papo_kernels.cpu import forward as cpu_forward
from papo_kernels.cpu import library
from papo_kernels.cpu import tiles as cpu_tiles
from papo_kernels.eager import forward as eager_forward
from papo_kernels.rows import BY_PROBABILITY, statistics_names, unpack

pytestmark = [
    pytest.mark.skipif(library._library() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(FAST == "triton", reason="about the torch backend"),
]
needs_bf16 = pytest.mark.skipif(
    library._library() is None or not library.multiplies_bf16(),
    reason="no processor that multiplies bfloat16",
)
PROCESSORS = ["native"] + ["x86-64-v3", "x86-64"] * (platform.machine() == "x86_64")


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch, tmp_path):
    """Compiled for this processor, and for older ones with shorter vectors and no bfloat16."""
    if request.param != "native":
        flags = [f for f in library.FLAGS if not f.startswith("-march")]
        monkeypatch.setattr(library, "FLAGS", [*flags, f"-march={request.param}"])
        older = library._library.__wrapped__()
        assert older.lanes() < library._library().lanes() or older.lanes() == 8
        monkeypatch.setattr(library, "_library", lambda: older)
        monkeypatch.setattr(library, "multiplies_bf16", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_processor_keeps_the_contract(processor, dtype):
    # D and rows that fill no vector
    case = make_case(45, 83, 1203, scale=6.0, dtype=dtype, bias=True, softcap=9.0, temperature=0.7)
    upstream = random_upstream(case)
    oracle = Oracle(case)
    stats, want = case.call(token_stats), oracle.statistics()
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(stats, name).double(), want[name], rtol=1e-5, atol=1e-5)
    exact, rounded = oracle.gradients(upstream), oracle.gradients(upstream, rounded=dtype)
    for budget, bound in ((1e-6, 2e-5), (3e-3, 4e-3)):
        got = case.gradients(token_stats, upstream, grad_budget=budget)
        bounds = {g: bound + 1.5 * gradient_error(rounded[g], exact[g]) for g in got}
        check({g: gradient_error(got[g], exact[g]) for g in got}, bounds)


@pytest.mark.parametrize("rows", [45, 17], ids=["rows at once", "rows in parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_all_words_go_through_blocks_of_words(processor, dtype, rows, monkeypatch):
    monkeypatch.setattr(dense_rows, "LEAST_WORDS", 100)
    monkeypatch.setattr(dense_rows, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(dense_rows, "MOST_ROWS", rows)
    case = make_case(45, 83, 1203, scale=6.0, dtype=dtype, bias=True, softcap=9.0, temperature=0.7)
    upstream, oracle = random_upstream(case), Oracle(case)
    exact, rounded = oracle.gradients(upstream), oracle.gradients(upstream, rounded=dtype)
    made, dtypes = GradientSum.sum_of_weight, []

    def sum_of_weight(self, **options):
        found = made(self, **options)
        dtypes.append(found.dtype)
        return found

    monkeypatch.setattr(GradientSum, "sum_of_weight", sum_of_weight)
    got = case.gradients(token_stats, upstream, grad_budget=0.0)
    # rows that go in parts are summed in float32, and rounded after the last one
    assert set(dtypes) == {dtype if rows == 45 else torch.float32}
    bounds = {g: 1e-5 + 1.5 * gradient_error(rounded[g], exact[g]) for g in got}
    check({g: gradient_error(got[g], exact[g]) for g in got}, bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 9.0])
def test_dense_gradients_are_right_whichever_are_asked_for(processor, dtype, softcap):
    # an odd number of rows and words that fill no vector; a bias that wants nothing is not summed
    case = make_case(45, 83, 1203, scale=6.0, dtype=dtype, bias=True, softcap=softcap)
    oracle, everything = Oracle(case), random_upstream(case)
    operands = ("hidden", "aug_hidden", "weight")
    for asked in (*((name,) for name in OUTPUTS), ("kl_prcp", "kl_reverse"), OUTPUTS):
        upstream = {name: everything[name] for name in asked}
        exact, rounded = oracle.gradients(upstream), oracle.gradients(upstream, rounded=dtype)
        for wanted in (*((name,) for name in operands), operands):
            got = case.gradients(token_stats, upstream, wanted, grad_budget=0.0)
            bounds = {g: 1e-5 + 1.5 * gradient_error(rounded[g], exact[g]) for g in got}
            check({g: gradient_error(got[g], exact[g]) for g in got}, bounds)


@pytest.mark.parametrize("aug", [False, True], ids=["one-stream", "two-streams"])
@pytest.mark.parametrize("vocab", [1, 15, 16, 33, 4099])
def test_statistics_and_levels_are_those_of_torch_in_float64(processor, aug, vocab):
    g = torch.Generator().manual_seed(vocab)
    logits = [torch.randn(21, vocab, generator=g) * 8 for _ in range(1 + aug)]
    logits[0][3, 1:2] = -torch.inf
    found = cpu_forward.row_statistics(logits)
    exact = eager_forward.row_statistics([z.double() for z in logits])
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)
    order = torch.randperm(21, generator=g)
    s = unpack(found[:, :, None], statistics_names(1 + aug, BY_PROBABILITY))
    levels = cpu_forward.find_levels(logits, order, s, 8)
    assert torch.equal(levels, eager_forward.find_levels(logits, order, s, 8))


def test_a_nan_or_infinity_spoils_its_own_row_and_its_tile_keeps_all_words():
    logits = [torch.randn(6, 100), torch.randn(6, 100)]
    logits[0][1, 99], logits[1][4, 3] = torch.nan, torch.inf
    found = cpu_forward.row_statistics(logits)
    s = unpack(found[:, :, None], statistics_names(2, BY_PROBABILITY))

    def spoiled(x):
        return x.isnan().nonzero()[:, 0].tolist()

    assert spoiled(s.full.log_sum) == spoiled(s.full.entropy) == [1]
    assert spoiled(s.aug.log_sum) == spoiled(s.aug.entropy) == [4]
    assert spoiled(s.kl_prcp) == [1, 4]
    assert not cpu_forward.find_levels(logits, torch.arange(6), s, 3).any()


def test_threads_change_nothing(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(70, 130, 2111, scale=6.0, dtype=dtype, bias=True)
        results = []
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
            results.append(case.gradients(token_stats, random_upstream(case)))
        assert all(torch.equal(results[0][g], results[1][g]) for g in results[0])


def test_a_bfloat16_gradient_of_the_weight_is_a_float32_sum_rounded_once(monkeypatch):
    case = make_case(300, 130, 2111, scale=12.0, dtype=torch.bfloat16)
    sums, made = [], GradientSum.sum_of_weight
    monkeypatch.setattr(
        GradientSum, "sum_of_weight", lambda self: sums.append(made(self)) or sums[-1]
    )

    def gradients(most_waiting):
        monkeypatch.setattr(cpu_tiles, "MOST_WAITING", most_waiting)
        found = case.gradients(token_stats, random_upstream(case))
        return found, sums.pop().dtype

    # all tiles at once, or some after others; numel // 4 may wait in any case
    whole, dtype = gradients(1 << 22)
    assert dtype == torch.bfloat16
    monkeypatch.setattr(cpu_tiles, "ROUNDS_WEIGHT", False)
    parts, dtype = gradients(1)
    assert dtype == torch.float32
    differ = whole["weight"] != parts["weight"]  # sums in another order round to a neighbour
    print(f"{differ.double().mean().item():.2%} of the weight's gradient rounded otherwise")
    assert differ.double().mean() < 2e-3
    torch.testing.assert_close(whole["weight"], parts["weight"], rtol=2**-7, atol=1e-6)
    for name in ("hidden", "aug_hidden"):
        assert torch.equal(whole[name], parts[name])


def operands(n, v, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, d, generator=g).bfloat16() for rows in (n, v))
    return x, w, torch.full((n, v), torch.nan)


@needs_bf16
@pytest.mark.parametrize(
    ("n", "v", "d"),
    [(1, 1, 1), (3, 31, 7), (13, 33, 257), (40, 96, 576), (25, 301, 1025), (0, 5, 8)],
)
def test_products_are_as_near_to_float64_as_float32_ones(n, v, d):
    x, w, z = operands(n, v, d)
    room = torch.full((n, v + 5), torch.nan)
    assert library.product(x, w, z) and library.product(x, w, room[:, :v])
    exact = x.double() @ w.double().T
    allowed = 2e-6 * x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)
    assert ((z - exact).abs() <= allowed).all()
    assert torch.equal(room[:, :v], z) and room[:, v:].isnan().all()


@needs_bf16
@pytest.mark.parametrize(("n", "v", "d"), [(1, 1, 1), (25, 301, 255), (13, 33, 257), (13, 70, 513)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_is_added_once_to_the_whole_product(n, v, d, dtype):
    x, w, z = operands(n, v, d)
    library.product(x, w, z)
    bias = torch.randn(2 * v, generator=torch.Generator().manual_seed(1)).to(dtype)[::2]
    banned = torch.arange(v) % 7 == 3
    bias[banned] = torch.tensor([-torch.inf, -1e30, -3e38]).to(dtype).repeat(v)[:v][banned]
    biased = torch.full_like(z, torch.nan)
    library.product(x, w, biased, bias)
    assert torch.equal(biased[:, ~banned], (z + bias.float())[:, ~banned])
    assert (biased[:, banned] == -torch.inf).all()
    bias[0] = torch.nan
    library.product(x, w, biased, bias)
    assert biased[:, 0].isnan().all() and not biased[:, 1:].isnan().any()


@needs_bf16
def test_strides_of_products_change_nothing():
    x, w, z = operands(24, 515, 65)
    library.product(x, w, z)
    padded = torch.full((515, 80), torch.nan, dtype=torch.bfloat16)
    padded[:, :65] = w
    other = torch.full_like(z, torch.nan)
    library.product(x.T.contiguous().T, padded[:, :65], other)
    assert torch.equal(other, z)


@needs_bf16
def test_a_nan_stays_in_its_row_and_column_of_a_product():
    x, w, z = operands(15, 40, 33)
    x[7, 32], w[9, 0] = torch.nan, torch.inf
    library.product(x, w, z)
    touched = torch.zeros_like(z, dtype=torch.bool)
    touched[7], touched[:, 9] = True, True
    assert torch.equal(z.isfinite(), ~touched) and z[7].isnan().all()


@pytest.mark.parametrize("change", ["float32 x", "float16 out", "columns of weight apart"])
def test_other_operands_of_a_product_are_refused_and_out_is_left_alone(change):
    x, w, z = operands(4, 6, 8)
    if change == "float32 x":
        x = x.float()
    elif change == "float16 out":
        z = z.half()
    else:
        w = w.T.contiguous().T
    assert not library.product(x, w, z)
    assert z.isnan().all()


def test_rounding_to_bf16_is_torchs():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (5, 9999), generator=g, dtype=torch.int64).int()
    x = x.view(torch.float32)  # all exponents, denormal numbers, infinities and NaN
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    out = torch.full_like(x, torch.nan, dtype=torch.bfloat16)
    library.round_to_bf16(x, out)
    expected = x.bfloat16()
    assert x.isnan().any() and torch.equal(out.isnan(), expected.isnan())
    same = ~expected.isnan()
    assert torch.equal(out[same].view(torch.int16), expected[same].view(torch.int16))


@pytest.mark.parametrize("vocab", [1024, 2000, 3072])
def test_how_far_rows_of_logits_are_apart_changes_nothing(vocab):
    g = torch.Generator().manual_seed(0)
    close = [3 * torch.randn(37, vocab, generator=g) for _ in range(2)]
    apart = [torch.full((37, vocab + 48), torch.nan)[:, :vocab].copy_(z) for z in close]
    order = torch.randperm(37, generator=g)
    found = []
    for z in (close, apart):
        statistics = library.statistics(*z, 11)
        normalisers = statistics[[0, 1, 3, 4]].contiguous()
        found.append((statistics, library.levels(z, order, normalisers, 16, 8)))
    (statistics, levels), others = found
    assert torch.equal(statistics, others[0]) and torch.equal(levels, others[1])
    exact = close[0].double().logsumexp(1)
    assert (statistics[0].double() + statistics[1] - exact).abs().max() < 1e-5


def test_what_is_compiled_is_kept_for_the_next_process(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh = library._library.__wrapped__
    assert fresh() is not None
    assert len(list((tmp_path / "papo_kernels").iterdir())) == 1
    monkeypatch.setattr(library.build.subprocess, "Popen", None)
    assert fresh().lanes() > 0
    monkeypatch.setattr(library, "FLAGS", ["-O0"])
    with pytest.raises(TypeError):  # other flags make another file
        fresh()


def test_a_compiler_that_fails_is_reported_and_torch_runs(monkeypatch, tmp_path, caplog):
    (tmp_path / "broken.cpp").write_text("this is not C++")
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    broken = library._library.__wrapped__
    monkeypatch.setattr(library, "_library", broken)
    with caplog.at_level(logging.WARNING, logger="papo_kernels"):
        assert not library.usable(10, torch.device("cpu"))
    assert "half the speed" in caplog.text and "error" in caplog.text
    case = make_case(5, 8, 100)
    check(
        {
            o: (getattr(case.call(token_stats), o) - x).abs().max().item()
            for o, x in Oracle(case).statistics().items()
        },
        1e-5,
    )
