"""The task of control.py: gymnasium's CartPole with the velocities hidden, many carts at a time."""

import torch

LONGEST = 500  # steps, and so the largest return, of an episode
VISIBLE = [0, 2]  # position of the cart, angle of the pole; 1 and 3 are their velocities


class Carts:
    """Carts side by side. After the end of an episode a cart takes one step that does nothing."""

    def __init__(self, number, seed, device):
        import gymnasium  # here, so that control.py can say in a sentence that it is missing

        kind = {"vectorization_mode": "vector_entry_point"}
        self.environments = gymnasium.make_vec("CartPole-v1", number, **kind)
        self.device, self.lengths, self.returns = device, torch.zeros(number), []
        self.see(self.environments.reset(seed=seed)[0])
        self.new = torch.ones(number, dtype=torch.bool, device=device)  # an episode begins
        self.over = ~self.new  # an episode is over: this step does nothing

    def see(self, observations):
        self.seen = torch.as_tensor(observations, device=self.device)[:, VISIBLE]

    def push(self, right):  # [B] -> rewards, whether the pole fell, whether the episode is over
        observations, *results, _ = self.environments.step(right.long().cpu().numpy())
        rewards, fallen, late = (torch.as_tensor(r, device=self.device) for r in results)
        self.see(observations)
        self.new, self.over = self.over, fallen | late
        self.lengths += rewards.cpu()
        self.returns += self.lengths[self.over.cpu()].tolist()
        self.lengths[self.over.cpu()] = 0
        return rewards, fallen, self.over
