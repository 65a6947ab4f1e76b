"""The custom operator under compilers, and vocabulary shards under a process group."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from kernel_oracle import GRADS, OUTPUTS, Case, Oracle, check, gradient_error, make_case
from kernel_oracle import random_upstream as upstream_of

from papo_kernels import token_stats

pytestmark = pytest.mark.xdist_group("op")  # what they share is made in one process


def objective(hidden, aug_hidden, weight, bias, targets, aug_constant=False):
    stats = token_stats(
        hidden * 1.5, weight, targets, aug_hidden=aug_hidden, bias=bias, aug_constant=aug_constant
    )
    kl = 0.1 * stats.kl_prcp + 0.3 * stats.kl_reverse
    return (stats.logprobs.exp() - kl + 0.2 * stats.aug_entropy).sum()


@pytest.mark.parametrize("aug_constant", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, aug_constant):
    compiled = torch.compile(objective, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 31):
        case = make_case(n, 16, 303, bias=True, ignored=0.2, seed=n)
        results = []
        for run in (objective, compiled):
            leaves = [getattr(case, g).detach().clone().requires_grad_() for g in GRADS]
            loss = run(*leaves, case.targets, aug_constant=aug_constant)
            loss.backward()
            results.append([loss.detach()] + [x.grad for x in leaves])
        for got, want in zip(results[1], results[0], strict=True):
            if want is None:
                assert aug_constant and (got is None or not got.any())
                continue
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_one_stream_and_no_grad_compile():
    case = make_case(20, 16, 303)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(hidden, weight, targets):
        return token_stats(hidden, weight, targets)[:2]

    with torch.no_grad():
        got = run(case.hidden, case.weight, case.targets)
    want = token_stats(case.hidden, case.weight, case.targets)[:2]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Without a second stream there is none to hold constant.
@pytest.mark.parametrize(
    ("aug", "aug_constant", "dtype"),
    [
        (False, False, torch.float32),
        (True, False, torch.float32),
        (True, True, torch.float32),
        (True, False, torch.bfloat16),
        *(
            pytest.param(aug, constant, torch.bfloat16, marks=pytest.mark.exhaustive)
            for aug, constant in ((False, False), (True, True))
        ),
    ],
)
def test_operator_passes_opcheck(aug, dtype, aug_constant):
    case = make_case(20, 16, 303, bias=True, aug=aug, dtype=dtype)
    leaves = [None if x is None else x.requires_grad_() for x in (getattr(case, g) for g in GRADS)]
    options = (0.9, 20.0, -100, 5e-3, "torch", "", True, aug_constant, "call", True)
    torch.library.opcheck(torch.ops.papo.token_stats.default, (*leaves, case.targets, *options))


SPLITS = ((150, 153), (203, 100), (303, 0))


def sharded_case(poisoned):
    """Words from 200 on are banned, as a padded last shard's would be."""
    case = make_case(40, 16, 303, bias=True, ignored=0.2, temperature=0.8, seed=5)
    case.bias[200:] = -torch.inf
    case.targets = torch.where(case.targets >= 200, case.targets - 200, case.targets)
    case.hidden[3] *= 50
    case.targets[7] = 5
    if poisoned:
        case.hidden[7, 2] = torch.nan
    return case, upstream_of(case)


def _sharded(rank, splits, poisoned, aug_constant=False):
    case, upstream = sharded_case(poisoned)
    words = slice(sum(splits[:rank]), sum(splits[: rank + 1]))
    leaves = {g: getattr(case, g) for g in GRADS}
    leaves |= {g: leaves[g][words] for g in ("weight", "bias")}
    leaves = {g: x.clone().requires_grad_() for g, x in leaves.items()}
    part = Case(
        leaves["hidden"], leaves["weight"], case.targets, leaves["aug_hidden"], leaves["bias"],
        temperature=case.temperature,
    )  # fmt: skip
    stats = part.call(token_stats, vocab_group=dist.group.WORLD, aug_constant=aug_constant)
    used = {o: x for o, x in zip(OUTPUTS, stats, strict=True) if x.requires_grad}
    torch.autograd.backward(list(used.values()), [upstream[o].float() for o in used])
    return [s.detach() for s in stats], {g: x.grad for g, x in leaves.items()}


def _messages(rank, splits):
    case, _ = sharded_case(False)
    words = slice(sum(splits[:rank]), sum(splits[: rank + 1]))
    messages = []
    for bad in (303, -3):
        case.targets[1] = bad
        try:
            token_stats(case.hidden, case.weight[words], case.targets, vocab_group=dist.group.WORLD)
        except ValueError as error:
            messages.append(str(error))
    return messages


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(16, 16)
        self.lm_head = torch.nn.Linear(16, 301, bias=False)

    def objective(self, x, x_aug, targets):
        return objective(self.body(x), self.body(x_aug), self.lm_head.weight, None, targets)


def _fsdp(rank):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    case = make_case(40, 16, 301, seed=6)
    rows = slice(20 * rank, 20 * rank + 20)
    policy = Policy()
    fully_shard(policy)
    register_fsdp_forward_method(policy, "objective")
    policy.objective(case.hidden[rows], case.aug_hidden[rows], case.targets[rows]).backward()
    return {n: p.grad.full_tensor() for n, p in policy.named_parameters()}


def _rank(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for splits in SPLITS:
        for poisoned in (False, True):
            results[rank, splits, poisoned] = _sharded(rank, splits, poisoned)
        results[rank, splits, "constant"] = _sharded(rank, splits, False, aug_constant=True)
        results[rank, splits, "messages"] = _messages(rank, splits)
    results[rank, "fsdp"] = _fsdp(rank)
    dist.destroy_process_group()
    os._exit(0)  # FSDP2 keeps its mesh: the group's threads do not survive a full teardown


@pytest.fixture(scope="module")
def shard_results(tmp_path_factory):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (tmp_path_factory.mktemp("shards") / "store", results), nprocs=2)
        return dict(results)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_vocabulary_shards_give_the_whole_result(splits, shard_results):
    case, upstream = sharded_case(False)
    oracle = Oracle(case)
    want, exact = oracle.statistics(), oracle.gradients(upstream)
    for rank in (0, 1):
        stats, grads = shard_results[rank, splits, False]
        for got, name in zip(stats, OUTPUTS, strict=True):
            torch.testing.assert_close(got.double(), want[name], rtol=1e-5, atol=2e-5)
        check({g: gradient_error(grads[g], exact[g]) for g in ("hidden", "aug_hidden")}, 2e-5)
    for g in ("weight", "bias"):
        whole = torch.cat([shard_results[rank, splits, False][1][g] for rank in (0, 1)])
        check({g: gradient_error(whole, exact[g])}, 2e-5)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_shards_know_a_constant_corrupted_stream(splits, shard_results):
    case, upstream = sharded_case(False)
    exact = Oracle(case).gradients(upstream, aug_constant=True)
    for rank in (0, 1):
        grads = shard_results[rank, splits, "constant"][1]
        assert grads["aug_hidden"] is None
        check({"hidden": gradient_error(grads["hidden"], exact["hidden"])}, 2e-5)
    for g in ("weight", "bias"):
        whole = torch.cat([shard_results[rank, splits, "constant"][1][g] for rank in (0, 1)])
        check({g: gradient_error(whole, exact[g])}, 2e-5)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_shards_contain_nan_and_name_bad_targets(splits, shard_results):
    for rank in (0, 1):
        clean, _ = shard_results[rank, splits, False]
        stats, grads = shard_results[rank, splits, True]
        others = torch.arange(40) != 7
        for got, value, name in zip(stats, clean, OUTPUTS, strict=True):
            assert got[7].isnan() == (name in ("logprobs", "entropy", "kl_prcp", "kl_reverse")), (
                name
            )
            assert torch.equal(got[others], value[others])
        assert grads["hidden"][7].isnan().all() and grads["hidden"][others].isfinite().all()
        messages = shard_results[rank, splits, "messages"]
        assert [m.split(";")[0] for m in messages] == ["targets[1] is 303", "targets[1] is -3"]
        assert all("[0, 303)" in m for m in messages)


def test_fsdp2_gives_the_gradients_of_one_process(shard_results):
    case = make_case(40, 16, 301, seed=6)
    policy = Policy()
    (policy.objective(case.hidden, case.aug_hidden, case.targets) / 2).backward()
    for rank in (0, 1):
        for name, p in policy.named_parameters():
            got = shard_results[rank, "fsdp"][name]
            check({f"{rank} {name}": gradient_error(got, p.grad.double())}, 1e-5)
