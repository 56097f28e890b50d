"""The public package `episodic` re-exports the client, the environments and the rollouts."""

import episodic
import episodic.environments
import episodic.rollout
import service.client
import service.environments
import service.rollout


def test_it_offers_what_the_packages_behind_it_offer():
    pairs = [
        (episodic, service.client),
        (episodic.environments, service.environments),
        (episodic.rollout, service.rollout),
    ]
    for public, behind in pairs:
        assert public.__all__ == behind.__all__
        assert all(getattr(public, name) is getattr(behind, name) for name in public.__all__)
    assert episodic.Client is service.client.Client
