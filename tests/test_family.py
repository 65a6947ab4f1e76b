"""Token weights against what the methods' released code returned, in float64."""

import pytest
import torch

from papo_fast.estimators import mean_per_sequence
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
from support.family import Batch, bits, cases, chosen, error, f64, label
from support.family_errors import averages, goal, hold, peer_goal, tie

pytestmark = pytest.mark.usefixtures("worst_errors")


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
