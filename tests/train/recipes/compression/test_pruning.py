from __future__ import annotations

import torch

from models.predictors import image
from train.recipes.compression.pruning import pruned, share_of_zeros, weighted


def test_the_smallest_weights_go_and_stay_away() -> None:
    net = image.build(image.Architecture(channels=(2, 3), hidden=4), seed=0)
    before = torch.cat([layer.weight.detach().flatten().clone() for layer in weighted(net)])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(20, 1, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (20,), generator=generator)

    cut, tuned = pruned(net, pixels, labels, sparsity=0.75, epochs=2, learning_rate=0.01, seed=0)

    left = torch.cat([layer.weight.detach().flatten() for layer in weighted(cut)])
    gone = left == 0
    assert abs(share_of_zeros(cut) - 0.75) < 1 / len(before)
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(left[~gone], before[~gone])

    trained = torch.cat([layer.weight.detach().flatten() for layer in weighted(tuned)])
    assert torch.equal(trained == 0, gone)
    assert not torch.equal(trained, left)
    assert tuned.state_dict().keys() == net.state_dict().keys()  # no masks left
    after = torch.cat([layer.weight.detach().flatten() for layer in weighted(net)])
    assert torch.equal(after, before)
