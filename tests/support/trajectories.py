"""A tiny random model, and exports whose stored log-probabilities are those of this model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 48
ACTIONS = (10, 11, 12, 13)
END = 1

Document = dict[str, Any]


def make_model(folder: Path, seed: int = 0) -> Path:
    """Writes a model with random weights into `folder`, and returns `folder`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load_model(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Player:
    """Plays episodes with a model: at each step some random tokens are observed, and one action token is drawn."""

    def __init__(self, folder: Path, version: str, seed: int = 0) -> None:
        self.model = load_model(folder)
        self.version = version
        self.random = np.random.default_rng(seed)

    @torch.no_grad()
    def distribution(self, token_ids: Sequence[int], support: Sequence[int] | None, temperature: float) -> Any:
        """The probabilities of the next token, by plain code. `support`: None for the whole vocabulary."""
        logits = self.model(input_ids=torch.tensor([list(token_ids)])).logits[0, -1].double() / temperature
        allowed = list(range(VOCABULARY)) if support is None else list(support)
        probs = torch.zeros(VOCABULARY, dtype=torch.float64)
        probs[allowed] = torch.softmax(logits[allowed], dim=0)
        return probs.numpy()

    def play(
        self,
        name: str,
        *,
        num_steps: int = 3,
        kind: str = "ids",
        temperature: float = 1.0,
        actions: Sequence[int] = ACTIONS,
        recorded: Sequence[int] = (),
        score: Callable[[list[int]], float] = lambda actions: float(actions.count(ACTIONS[0])),
        **episode: Any,
    ) -> Document:
        """Returns a trajectory in the format `tokens`.

        kind: that of all supports. actions: the legal ones, for the kind `ids`.
        recorded: indices of steps whose action somebody else chose.
        score: the return, from the actions. `episode` overrides fields of the episode.
        """
        ids: list[int] = []
        loss_mask, recorded_mask, logprobs, starts, taken = [], [], [], [], []
        supports: list[Any] = []
        for step in range(num_steps):
            starts.append(len(ids))
            ids += self.random.integers(20, VOCABULARY, size=int(self.random.integers(2, 6))).tolist()
            probs = self.distribution(ids, actions if kind == "ids" else None, temperature)
            action = int(self.random.choice(VOCABULARY, p=probs / probs.sum()))
            drawn = step not in recorded
            place = len(ids)
            ids += [action, END]
            taken.append(action)
            count = len(ids) - len(loss_mask)
            loss_mask += [0] * count
            recorded_mask += [0] * count
            logprobs += [0.0] * count
            supports += [None] * count
            (loss_mask if drawn else recorded_mask)[place] = 1
            if drawn:
                logprobs[place] = float(np.log(probs[action]))
                supports[place] = {"kind": kind, **({"ids": list(actions)} if kind == "ids" else {})}
        segment = {
            "steps": list(range(num_steps)),
            "rewards": [None] * (num_steps - 1) + [score(taken)],
            "step_starts": starts,
            "window_start": 1,
            "policy_versions": [self.version] * num_steps,
            "token_ids": ids,
            "loss_mask": loss_mask,
            "recorded_mask": recorded_mask,
            "logprobs": logprobs,
            "support": supports,
            "temperature": temperature,
        }
        fields = {
            "episode_id": name,
            "status": "ended",
            "policy": "tiny",
            "episode_return": score(taken),
            "success": score(taken) > 0,
            "created_at": 1_790_000_000.0,
            "sampling": {"temperature": temperature},
            "metadata": {"env": "Tokens-v0", "seed": 7},
            "parent": None,
            "group": None,
        }
        return {"episode": {**fields, **episode}, "format": "tokens", "segments": [segment], "feedback": []}


def write(documents: Sequence[Document], path: Path) -> Path:
    """Writes an export, and returns its path."""
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path
