"""Extra terms and statistics of two views against what released code returned, in float64."""

import pytest
import torch

from papo_fast.dependency import js_divergence, nucleus_entropy
from papo_fast.objective import objective
from papo_fast.token_batch import Denominators, TokenBatch
from papo_fast.view_terms import dvrp_term, evidence_kls, margin_loss
from papo_kernels import token_stats
from support.family import FAMILY, PENALTY, Batch, bits, cases, error, f64, label
from support.family_errors import goal, hold, peer_goal

pytestmark = pytest.mark.usefixtures("worst_errors")
GRADIENTS = {"grad_logp": "logp", "grad_aug": "aug", "grad_H": "H"}


@pytest.mark.parametrize(("method", "setting", "case"), cases("full_vocab_metrics"), ids=label)
def test_divergences_and_entropies_over_the_vocabulary(method, setting, case):
    """Three rows of six words; what the kernels compute, in float64, is among them."""
    row, out = FAMILY["rows"][case["batch"]], case["out"]
    p, q = (f64(row[name]).reshape(3, -1) for name in ("z", "t"))
    nothing = torch.zeros(3, dtype=torch.int64)
    words = torch.eye(p.shape[1], dtype=torch.float64)
    stats = token_stats(p, words, nothing, aug_hidden=q, backend="reference")
    ours = {
        "jsd": lambda: js_divergence(p, q, setting["eps"]),
        "H_top_p": lambda: nucleus_entropy(p, setting["top_p"]),
        "H": lambda: stats.entropy,
        "entropy": lambda: nucleus_entropy(p, 1.0),
        "H_noisy": lambda: stats.aug_entropy,
        "corrupted_entropy": lambda: nucleus_entropy(q, 1.0),
        "kl_pq": lambda: stats.kl_prcp,
        "kl": lambda: stats.kl_prcp,
    }
    hold(method, case, {key: error(ours[key](), out[key]) for key in out if key in ours})


@pytest.mark.parametrize(("method", "setting", "case"), cases("papo", "cfpo"), ids=label)
def test_papo_and_cfpo(method, setting, case):
    """CFPO's loss is PAPO's with another second view, of which both take log-probs alone."""
    batch, cfg, out = Batch(case), setting["cfg"], case["out"]
    name = "kl_prcp" if method == "papo" else "kl_cmve"
    aug_entropy = cfg.get("use_aug_entropy_loss", False)
    own_entropy = cfg.get("use_ori_entropy_loss", False)
    top_p = "kl_prcp_token_level_mask_top_p"
    config = goal(
        (cfg["clip_ratio_low"], cfg["clip_ratio_high"]),
        kl_coef=cfg["kl_coef"] if cfg.get("use_kl_loss") else 0.0,
        kl_penalty=PENALTY[cfg.get("kl_penalty", "low_var_kl")],
        kl_prcp_coef=cfg[f"{name}_coef"],
        kl_prcp_penalty=PENALTY[cfg[f"{name}_penalty"]],
        kl_prcp_top_p=cfg[top_p] if cfg.get("use_kl_prcp_token_level_mask") else None,
        kl_prcp_clip=cfg["kl_prcp_clipping"] if cfg.get("use_kl_prcp_clipping") else None,
        entropy_coef=cfg["ori_entropy_loss_coef"] if own_entropy else 0.0,
        aug_entropy_coef=cfg["aug_entropy_loss_coef"] if aug_entropy else 0.0,
        aug="trained" if setting.get("recompute") else "stored",
        average_over="micro",
    )
    losses = [batch.loss(config, tokens=tokens) for tokens in batch.micro(setting)]
    sum(losses).backward()
    errors = {"losses": error(torch.stack(losses), out["losses"])}
    hold(method, case, errors | batch.errors_of_gradients(out, GRADIENTS))


def test_cfpo_from_hidden_states_is_k3_of_whole_logits():
    """Hidden states of an intervened pass as the second stream; nothing but them is CFPO's own."""
    generator = torch.Generator().manual_seed(3)
    hidden, other, head = (
        torch.randn(size, 6, generator=generator, dtype=torch.float64) for size in (5, 5, 11)
    )
    targets = torch.tensor([3, 0, 10, 7, 7])

    def logprobs(states):
        return (states @ head.T).log_softmax(-1)[torch.arange(5), targets]

    by_hand = hidden.clone().requires_grad_()
    d = logprobs(other) - logprobs(by_hand)
    expected = -0.02 * (d.exp() - d - 1).mean()
    expected.backward()

    ours = hidden.clone().requires_grad_()
    stats = token_stats(ours, head, targets, aug_hidden=other, aug_constant=True)
    batch = TokenBatch(
        logprobs=stats.logprobs,
        old_logprobs=stats.logprobs.detach(),
        aug_logprobs=stats.aug_logprobs,
        advantages=torch.zeros_like(stats.logprobs),
        sequence_ids=torch.tensor([0, 0, 1, 1, 1]),
    )
    config = goal(kl_prcp_coef=0.02)
    loss, _ = objective(batch, config, Denominators(tokens=5, sequences=2))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, by_hand.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "setting", "case"), cases("peer_dvrp"), ids=label)
def test_dvrp(method, setting, case):
    batch, loss, out = Batch(case), setting["loss"], case["out"]
    assert loss["visual_sensitivity_reference"] == "current"
    full = loss["entropy_loss_type"] == "full"
    config = peer_goal(setting)
    coefs = loss["decremental_entropy_coef"], loss["incremental_entropy_coef"]
    term = dvrp_term(
        batch["logp"],
        batch["aug"].detach(),
        batch["aug2"].detach(),
        sensitivity=loss["visual_sensitivity_loss_coef"],
        robustness=loss["visual_robustness_loss_coef"],
        masked_entropy=0.0 if full else coefs[0],
        noised_entropy=0.0 if full else coefs[1],
    )
    total = batch.loss(config) + term.mean()
    if full:  # constants: the file has no entropy of the noised view, half of the other was taken
        total = total + (coefs[0] + 0.5 * coefs[1]) * batch["Haug"].detach().mean()
    total.backward()
    errors = {"loss": error(total, out["loss"])}
    hold(method, case, errors | batch.errors_of_gradients(out, GRADIENTS))


@pytest.mark.parametrize(("method", "setting", "case"), cases("margin"), ids=label)
def test_evidence_margin(method, setting, case):
    batch, out = Batch(case), case["out"]
    sign = setting.get("sign", "maximize_margin")
    assert sign in ("maximize_margin", "kl1_only")
    seen = TokenBatch(
        logprobs=batch["logp"],
        old_logprobs=batch["old"].detach(),
        advantages=torch.zeros_like(batch["logp"]),
        sequence_ids=batch.ids,
    )
    evidence_B, control_B = evidence_kls(
        seen,
        batch["aug"],
        batch["aug2"],
        penalty=setting.get("estimator", "k3"),
    )
    if sign == "kl1_only":
        control_B = torch.zeros_like(evidence_B)
    total = margin_loss(
        evidence_B,
        control_B,
        bits(out["valid"]),
        coef=setting.get("coef", 0.02),
        margin_bound=setting.get("margin_clip", 10.0),
        kl_bound=setting.get("kl_clip"),
        transform=setting.get("transform", "linear"),
    )
    total.backward()
    errors = {"kl1": error(evidence_B, out["kl1"]), "kl2": error(control_B, out["kl2"])}
    errors["loss"] = error(total, out["loss"])
    views = {"grad_logp": "logp", "grad_evidence": "aug", "grad_control": "aug2"}
    hold(method, case, errors | batch.errors_of_gradients(out, views))
