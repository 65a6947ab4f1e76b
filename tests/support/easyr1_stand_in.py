"""What `papo_fast.integrations.easyr1` uses of EasyR1's `dp_actor.py`, for tests without EasyR1.

Names, arguments and order of calls are EasyR1's (tests/data/verl_interfaces.json).
bench/peers/easyr1.sh runs the hook in EasyR1 itself.
"""

import torch


def average_loss(values, mask, mode, eps=1e-8):
    if mode == "token":
        return (values * mask).sum() / (mask.sum() + eps)
    return ((values * mask).sum(-1) / (mask.sum(-1) + eps)).mean()


def compute_policy_loss(old_log_probs, log_probs, advantages, response_mask, loss_avg_mode):
    gain = (log_probs - old_log_probs).exp() * advantages
    return -average_loss(gain, response_mask, mode=loss_avg_mode), {"ppo_kl": 0.0}


class DataParallelPPOActor:
    def __init__(self, config, actor_module, actor_optimizer=None):
        self.config, self.actor_module = config, actor_module
        self.log_probs_from_logits = lambda logits, labels: logits.log_softmax(-1).gather(
            -1, labels[..., None]
        )[..., 0]

    def _forward_micro_batch(self, micro_batch, temperature):
        ids, mask = micro_batch["input_ids"], micro_batch["attention_mask"]
        responses = micro_batch["responses"]
        length = responses.size(-1)
        places = micro_batch["position_ids"].transpose(0, 1)
        pictures = micro_batch["multi_modal_inputs"]
        inputs = {
            key: torch.cat([row[key] for row in pictures if key in row])
            for key in {key: None for row in pictures for key in row}
        }
        if self.config.padding_free:
            here = mask.bool()
            packed = ids[here][None]
            logits = self.actor_module(
                input_ids=packed,
                attention_mask=None,
                position_ids=places[:, here][:, None],
                use_cache=False,
                **inputs,
            ).logits.squeeze(0)
            logits.div_(temperature)
            found = self.log_probs_from_logits(logits=logits, labels=packed.roll(-1, 1)[0])
            rows = found.new_zeros(mask.shape)
            rows[here] = found
            return rows[:, -length - 1 : -1]
        logits = self.actor_module(
            input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, **inputs
        ).logits
        logits.div_(temperature)
        return self.log_probs_from_logits(logits[:, -length - 1 : -1, :], responses)

    def compute_log_prob(self, data):
        with torch.no_grad():
            return self._forward_micro_batch(data, temperature=0.7)

    def update_policy(self, data):
        log_probs = self._forward_micro_batch(data, temperature=0.7)
        loss, metrics = compute_policy_loss(
            old_log_probs=data["old_log_probs"],
            log_probs=log_probs,
            advantages=data["advantages"],
            response_mask=data["response_mask"],
            loss_avg_mode=self.config.loss_avg_mode,
        )
        loss.backward()
        return metrics | {"loss": loss.item()}
