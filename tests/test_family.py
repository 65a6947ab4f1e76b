"""Token weights and extra terms against what the methods' released code returned, in float64."""

import pytest
import torch

from papo_fast.config import ObjectiveConfig
from papo_fast.dependency import js_divergence, nucleus_entropy
from papo_fast.estimators import mean_per_sequence
from papo_fast.objective import objective
from papo_fast.token_batch import Denominators, TokenBatch
from papo_fast.token_weights import (
    cgpo,
    largest,
    over_selected,
    pgpo,
    tor,
    vepo,
    vepo_scores,
    vppo,
    vppo_scaling,
)
from papo_fast.view_terms import dvrp_term, evidence_kls, margin_loss
from papo_kernels import token_stats
from support.family import FAMILY, PENALTY, TOLERANCE, Batch, bits, cases, chosen, error, f64, label

WORST: dict[str, tuple[float, str]] = {}


def hold(method: str, case: dict, errors: dict[str, float]) -> None:
    """All within the tolerance; the worst of each method is printed when the file is done."""
    assert errors
    worst = max(errors, key=errors.get)
    where = f"{case['setting']} {case['batch']} {worst}"
    WORST[method] = max(WORST.get(method, (0.0, "")), (errors[worst], where))
    assert errors[worst] <= TOLERANCE, errors


@pytest.fixture(scope="module", autouse=True)
def worst_errors():
    yield
    for method, (worst, where) in sorted(WORST.items()):
        print(f"\n{method:20s} worst relative error {worst:.1e} ({where})", end="")


def goal(clip=(0.2, 0.2), **fields) -> ObjectiveConfig:
    """Their policy loss, and whatever terms the fields turn on, sampled as in official parity."""
    of_theirs = {"parity": "official", "average_over": "global", "average": "token"}
    fields = of_theirs | {"kl_coef": 0.0, "kl_prcp_coef": 0.0} | fields
    low, high = clip
    return ObjectiveConfig(clip_low=low, clip_high=high, **fields).resolved()


def averages(mode: str) -> str:
    return {"token": "token", "seq": "sequence"}[mode]


def tie(out: dict, prefix: str = "") -> bool:
    return any(key.startswith(prefix) and "tie" in key for key in out)


# --- VPPO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "setting", "case"), cases("vppo"), ids=label)
def test_vppo(method, setting, case):
    batch, cfg, out = Batch(case), setting["cfg"], case["out"]
    on_entropy = cfg.get("use_vppo_on_entropy", False)
    config = goal(
        (cfg["clip_ratio_low"], cfg["clip_ratio_high"]),
        vppo_top_p=cfg["top_p_perception_tokens"],
        vppo_entropy_top_p=cfg["top_p_entropy_tokens"] if on_entropy else 0.0,
        vppo_scaling_min=cfg["advantage_scaling_min"] if cfg["use_advantage_shaping"] else 1.0,
        entropy_coef=cfg["entropy_penalty_coef"] if cfg["use_entropy_penalty"] else 0.0,
        entropy_estimator="sampled",
        average=averages(cfg.get("loss_avg_mode", "token")),
    )
    seen = batch.of_rollout(batch.dependency(setting))
    ours = vppo(seen, config) != 0
    if on_entropy:  # a union of two selections
        mask = bits(out["mask"])
        for token in (ours != mask).nonzero().flatten():  # it has an equal in its response
            others = (batch.ids == batch.ids[token]).index_fill(0, token, False)
            ranked = (seen.dependency, seen.entropy)
            assert tie(out) and any((x[others] == x[token]).any() for x in ranked)
    else:
        mask = chosen(ours, out["mask"], seen.dependency, batch.ids, tie(out))
    weights = torch.zeros_like(seen.dependency)
    alpha_B = torch.zeros(len(batch.lengths), dtype=torch.float64)
    losses = []
    scores_B = mean_per_sequence(seen.dependency, seen)
    for tokens in batch.micro(setting):
        rows = batch.ids[tokens].unique()
        if len(tokens) == len(batch.ids):
            weights = vppo(seen, config, mask)
            alpha_B = vppo_scaling(scores_B, config.vppo_scaling_min)
        else:  # the scores' range is of the whole batch, the factors' mean of the micro-batch
            extremes = (scores_B.min(), scores_B.max())
            alpha_B[rows] = vppo_scaling(scores_B[rows], config.vppo_scaling_min, extremes)
            weights[tokens] = (mask * alpha_B[batch.ids])[tokens]
        losses.append(batch.loss(config, weights, tokens))
    sum(losses).backward()
    errors = {"alpha": error(alpha_B, out["alpha"])} if "alpha" in out else {}
    errors["losses"] = error(torch.stack(losses), out["losses"])
    errors |= batch.errors_of_gradients(out, {"grad_logp": "logp"})
    hold(method, case, errors)


def peer_goal(setting: dict, **fields) -> ObjectiveConfig:
    """Its settings; its entropies are averaged as its policy loss is, which is not the authors'."""
    actor, loss = setting.get("actor", {}), setting["loss"]
    return goal(
        (actor.get("clip_ratio_low", 0.2), actor.get("clip_ratio_high", 0.2)),
        parity="paper",
        average=averages(actor.get("loss_avg_mode", "token")),
        entropy_coef=loss.get("invariant_entropy_coef", 0.0),
        entropy_estimator={"sampled": "sampled", "full": "exact"}[
            loss.get("entropy_loss_type", "sampled")
        ],
        **fields,
    )


@pytest.mark.parametrize(("method", "setting", "case"), cases("peer_vppo"), ids=label)
def test_vppo_of_the_other_implementation(method, setting, case):
    batch, loss, out = Batch(case), setting["loss"], case["out"]
    config = peer_goal(
        setting,
        vppo_top_p=loss["top_perception_quantile"],
        vppo_scaling_min=loss["vppo_response_scaling_min"],
    )
    seen = batch.of_rollout(batch.dependency(setting))
    ours = vppo(seen, config) != 0
    is_tie = tie(out, "perception")
    mask = chosen(ours, out["perception_mask"], seen.dependency, batch.ids, is_tie)
    weights = vppo(seen, config, mask)
    if loss.get("normalize_pg_loss_by_selected_tokens"):
        weights = weights * over_selected(mask, seen, config.average)
    total = batch.loss(config, weights)
    total.backward()
    scores_B = mean_per_sequence(seen.dependency, seen)
    errors = {
        "alpha": error(vppo_scaling(scores_B, config.vppo_scaling_min), out["alpha"]),
        "loss": error(total, out["loss"]),
    }
    hold(method, case, errors | batch.errors_of_gradients(out, {"grad_logp": "logp"}))


# --- PGPO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "setting", "case"), cases("peer_pgpo"), ids=label)
def test_pgpo_in_both_variants(method, setting, case):
    batch, loss, out = Batch(case), setting["loss"], case["out"]
    code = loss.get("pgpo_threshold_mode") == "quantile"
    # the code's variant has these two with it
    assert loss.get("pgpo_low_weight_floor", 0) == (0.1 if code else 0)
    assert loss.get("pgpo_mass_normalization", True) != code
    config = peer_goal(
        setting,
        pgpo_threshold=loss["pgpo_token_scaling_threshold"],
        pgpo_boost=loss["pgpo_token_scaling_boost"],
        pgpo_variant="code" if code else "paper",
    )
    weights = pgpo(batch.of_rollout(batch.dependency(setting)), config)
    total = batch.loss(config, weights)
    total.backward()
    errors = {"weight": error(weights, out["weight"]), "loss": error(total, out["loss"])}
    hold(method, case, errors | batch.errors_of_gradients(out, {"grad_logp": "logp"}))


# --- ToR ------------------------------------------------------------------------------------------


def scope(kind: str) -> str:
    return {"batch": "batch", "micro_batch": "batch", "response": "response"}[kind]


def picked(batch: Batch, out: dict, kind: str, ours, scores, over: str, besides=None):
    """The recorded mask `kind`, checked against our selection by `scores`; None: not recorded."""
    if f"{kind}_mask" not in out:
        return None
    among = batch.ids if over == "response" else torch.zeros_like(batch.ids)
    return chosen(ours, out[f"{kind}_mask"], scores, among, tie(out, kind), besides)


@pytest.mark.parametrize(("method", "setting", "case"), cases("peer_tor"), ids=label)
def test_tor(method, setting, case):
    batch, loss, out = Batch(case), setting["loss"], case["out"]
    assert loss["tor_rsn_weight"] == 1
    over = scope(loss["perception_thr_granularity"])
    assert over == scope(loss["entropy_thr_granularity"])
    # a share of 1 turns a selection off there
    config = peer_goal(
        setting,
        select_over=over,
        tor_entropy_share=loss["top_entropy_quantile"] % 1,
        tor_perception_share=loss["top_perception_quantile"] % 1,
        tor_perception_weight=loss["tor_prcp_weight"],
    )
    seen = batch.of_rollout(batch.dependency(setting))
    none = torch.zeros(len(batch.ids), dtype=torch.bool)
    masks = [
        picked(batch, out, "entropy", tor(seen, config, None, none) > 0, seen.entropy, over),
        picked(batch, out, "perception", tor(seen, config, none) > 0, seen.dependency, over),
    ]
    weights = tor(seen, config, *masks)
    total = batch.loss(config, weights)
    total.backward()
    recorded = [int(c) / 2 for c in out["tor_weight_times_2"]]
    errors = {"weight": error(weights, recorded), "loss": error(total, out["loss"])}
    hold(method, case, errors | batch.errors_of_gradients(out, {"grad_logp": "logp"}))


# --- CGPO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "setting", "case"), cases("peer_cgpo"), ids=label)
def test_cgpo(method, setting, case):
    batch, loss, out = Batch(case), setting["loss"], case["out"]
    over = scope(loss.get("perception_thr_granularity", "micro_batch"))
    assert over == scope(loss.get("entropy_thr_granularity", "micro_batch"))
    config = peer_goal(
        setting,
        select_over=over,
        cgpo_entropy_share=loss.get("top_entropy_quantile", 1.0),
        cgpo_perception_share=loss.get("top_perception_quantile", 0.0),
        cgpo_scale=loss["cgpo_response_scaling_coef"],
    )
    spans = loss.get("include_region_tokens_in_perception_mask", False)
    seen = batch.of_rollout(batch.dependency(setting), evidence=spans)
    none = torch.zeros(len(batch.ids), dtype=torch.bool)
    perceived = cgpo(seen, config, none) != 0
    masks = [
        picked(batch, out, "entropy", cgpo(seen, config, None, none) > 0, seen.entropy, over),
        picked(batch, out, "perception", perceived, seen.dependency, over, seen.evidence),
    ]
    weights = cgpo(seen, config, *masks)
    total = batch.loss(config, weights)
    total.backward()
    kept = torch.ones(len(batch.ids), dtype=torch.bool)
    if masks[0] is not None:
        kept = masks[0] | masks[1]
    recorded = torch.where(kept, f64(out["weight"]), 0.0)  # theirs drops the others in the loss
    errors = {"weight": error(weights, recorded.tolist()), "loss": error(total, out["loss"])}
    hold(method, case, errors | batch.errors_of_gradients(out, {"grad_logp": "logp"}))


# --- VEPO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "setting", "case"), cases("vepo"), ids=label)
def test_vepo(method, setting, case):
    batch, cfg, out = Batch(case), setting["cfg"], case["out"]
    config = goal(
        clip_dual=None,
        vepo_score=setting["score"],
        vepo_alpha=setting["alpha"],
        vepo_top_p=setting["top_p"],
        vepo_bottom=setting.get("bottom", False),
        vepo_mode=cfg.get("jsd_mask_mode", "mask"),
        vepo_lambda=cfg.get("jsd_mask_lambda", 1.0),
        entropy_coef=-cfg.get("entropy_coeff", 0.001),
        entropy_estimator="exact",
        kl_coef=cfg["kl_loss_coef"] if cfg["use_kl_loss"] else 0.0,
    )
    _, weights, scores = vepo_of(batch, config, out["mask"], tie(out))
    hold(method, case, vepo_errors(batch, config, weights, scores, out, out["losses"][0]))


def vepo_of(batch: Batch, config, recorded: str, is_tie: bool):
    """The recorded mask, checked against ours; VEPO's weights by it."""
    seen = batch.of_rollout()
    scores = vepo_scores(seen, config)
    ours = largest(-scores if config.vepo_bottom else scores, seen, config.vepo_top_p, "response")
    mask = chosen(ours, recorded, scores, batch.ids, is_tie)
    if not is_tie:
        assert torch.equal(vepo(seen, config), vepo(seen, config, mask))
    return mask, vepo(seen, config, mask), scores


def vepo_errors(batch: Batch, config, weights, scores, out: dict, loss: float) -> dict:
    total = batch.loss(config, weights)
    total.backward()
    errors = {"loss": error(total, loss)}
    if "score" in out:
        errors["score"] = error(scores, out["score"])
    return errors | batch.errors_of_gradients(out, {"grad_logp": "logp", "grad_H": "H"})


@pytest.mark.parametrize(("method", "setting", "case"), cases("peer_vepo"), ids=label)
def test_vepo_of_the_other_implementation(method, setting, case):
    batch, loss, out = Batch(case), setting["loss"], case["out"]
    config = peer_goal(
        setting,
        vepo_score={"normal_entropy": "D", "none": "E"}[setting["entropy_gate"]],
        vepo_alpha=setting["jsd_weight"],
        vepo_top_p=loss["top_perception_quantile"],
    )
    is_tie = tie(out, "perception")
    mask, weights, scores = vepo_of(batch, config, out["perception_mask"], is_tie)
    if not loss["normalize_pg_loss_by_selected_tokens"]:
        weights = mask.double()
    hold(method, case, vepo_errors(batch, config, weights, scores, out, out["loss"]))


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


# --- terms ----------------------------------------------------------------------------------------


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


GRADIENTS = {"grad_logp": "logp", "grad_aug": "aug", "grad_H": "H"}


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
