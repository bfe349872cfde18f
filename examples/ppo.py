"""Proximal policy optimization (Schulman et al. 2017) of a policy with two actions.

After a window of steps with the policy as it was, the policy is improved on what happened: an
action that went better than expected gets likelier, but its probability changes by a factor of no
more than 1 +- RATIO, since what happened says little about policies that are far away.
"""

import torch
from torch.nn.functional import logsigmoid, softplus

DISCOUNT, TRACE = 0.99, 0.95  # gamma, lambda of the advantages (GAE, Schulman et al. 2016)
REWARD = 0.05  # of a step; what is expected is then never more than 0.05 / (1 - 0.99) = 5
PASSES, PARTS = 4, 2  # passes over a window, in so many batches each
RATIO, ENTROPY = 0.2, 0.005  # how far the policy may move; weight of what keeps it trying


def log_probability(logit, right):
    """Of the action that was taken; sigmoid(logit) is the probability of going right."""
    return logsigmoid(torch.where(right > 0, logit, -logit))


def estimate_advantages(value, last, rewards, fallen, over):
    """[T, B]: how much better it went than value said. Nothing is carried over an episode's end.

    last [1, B] is the value after the window. An episode that is over without a fall would have
    gone on: it counts what was expected of its last state.
    """
    following = torch.cat([value[1:], last]) * ~fallen
    errors = REWARD * rewards + DISCOUNT * following - value
    advantages, carried = [], 0.0
    for error, end in zip(errors.flip(0), over.flip(0), strict=True):
        carried = error + DISCOUNT * TRACE * carried * ~end
        advantages.append(carried)
    return torch.stack(advantages).flip(0)


def loss(logit, value, right, log_before, value_before, advantages, valid):
    """[T, B] each: logits and values of the policy as it is, and what it did as it was before.

    Steps that are not valid do not count: they came after the end of an episode.
    """
    targets = value_before + advantages
    advantages = (advantages - advantages[valid].mean()) / advantages[valid].std()
    ratio = (log_probability(logit, right) - log_before).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - RATIO, 1 + RATIO) * advantages)
    entropy = softplus(logit) - logit * logit.sigmoid()
    return ((value - targets).square() / 2 - gain - ENTROPY * entropy)[valid].mean()
