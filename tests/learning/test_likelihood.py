"""The log-probability that the trainer computes is the stored one, for supports of each kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.learning.likelihood import collate, token_logprobs
from service.learning.segments import Row
from service.learning.trajectories import read
from tests.support.trajectories import ACTIONS, Player, write


def rows_of(documents: list[Any], folder: Path) -> list[Row]:
    episodes = read(write(documents, folder / "export.ndjson")).episodes
    return [row for episode in episodes for row in episode.rows]


def computed(model: Any, rows: list[Row]) -> np.ndarray:
    with torch.no_grad():
        return token_logprobs(model, collate(rows)).numpy()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["ids", "all"])
def test_recomputed_logprobs_are_the_stored_ones(player: Player, kind: str, temperature: float, tmp_path: Path):
    documents = [
        player.play(f"e{number}", num_steps=1 + number, kind=kind, temperature=temperature) for number in range(4)
    ]
    rows = rows_of(documents, tmp_path)
    stored = np.concatenate([row.logprobs for row in rows])
    assert len(stored) == 1 + 2 + 3 + 4
    assert np.abs(computed(player.model, rows) - stored).max() < 1e-4


def test_kinds_are_mixed_in_one_batch_and_recorded_tokens_have_temperature_1(player: Player, tmp_path: Path):
    documents = [
        player.play("ids", temperature=0.5),
        player.play("few", actions=ACTIONS[1:3]),
        player.play("all", kind="all", temperature=3.0, recorded=(1,)),
        player.play("filtered", kind="filtered", temperature=2.0),
    ]
    rows = rows_of(documents, tmp_path)
    values = iter(computed(player.model, rows))
    for document in documents:
        (segment,) = document["segments"]
        ids = segment["token_ids"]
        for place, token in enumerate(ids):
            if not segment["loss_mask"][place] + segment["recorded_mask"][place]:
                continue
            support = (segment["support"][place] or {}).get("ids")
            temperature = 1.0 if segment["recorded_mask"][place] else segment["temperature"]
            expected = player.distribution(ids[:place], support, temperature)[token]
            assert next(values) == pytest.approx(np.log(expected), abs=1e-4)


def test_over_the_whole_vocabulary_a_choice_is_less_likely(player: Player, tmp_path: Path):
    """Why supports matter: without them, the ratio has the mass of the other tokens, before any training."""
    document = player.play("e")
    (bound,) = rows_of([document], tmp_path)
    for support in document["segments"][0]["support"]:
        if support:
            support.clear()
            support["kind"] = "all"
    (free,) = rows_of([document], tmp_path)
    assert (computed(player.model, [free]) < computed(player.model, [bound]) - 0.1).all()


def test_the_output_layer_computes_only_the_trained_positions(player: Player, tmp_path: Path):
    rows = rows_of([player.play("one"), player.play("two", num_steps=5)], tmp_path)
    seen: list[Any] = []
    handle = player.model.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[2].shape))
    try:
        computed(player.model, rows)
    finally:
        handle.remove()
    assert [tuple(shape) for shape in seen] == [(3 + 5, 48)]


def test_gradients_are_those_of_plain_code(player: Player, tmp_path: Path):
    rows = rows_of([player.play("one"), player.play("two", kind="all", num_steps=2)], tmp_path)
    weight = player.model.model.layers[0].mlp.up_proj.weight
    token_logprobs(player.model, collate(rows)).sum().backward()
    ours, weight.grad = weight.grad.clone(), None
    total = torch.zeros(())
    for row in rows:
        logits = player.model(input_ids=torch.tensor([row.token_ids.tolist()])).logits[0]
        for position in row.positions.tolist():
            allowed = list(ACTIONS) if len(row.support_ids) else list(range(48))
            token = int(row.token_ids[position])
            total = total + logits[position - 1, allowed].log_softmax(-1)[allowed.index(token)]
    total.backward()
    plain, weight.grad = weight.grad.clone(), None
    player.model.zero_grad()
    assert torch.allclose(ours, plain, atol=1e-4)
