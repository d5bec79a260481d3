"""An exported ensemble of language models. Needs torch and transformers only.

    sys.path.insert(0, DIR)
    from ensemble import load_ensemble
    model = load_ensemble(DIR)                        # trust_remote_code=True for experts with MoE layers
    model(input_ids).logits                           # log-probabilities of the mixture
    model.generate(input_ids, max_new_tokens=60)

Every pass reads the sequence from its beginning: all of it decides how much each expert counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from dist_moe.recipes.branch_train_merge.posterior import History, log_predictions, log_weights


class Ensemble(nn.Module):
    """Language models whose probabilities are mixed by the posterior of their domains.

    ``prior_J``: how much each counts before the first token, sums to 1. ``history``: see :func:`log_weights`.
    """

    def __init__(self, experts: Sequence[PreTrainedModel], prior_J: Tensor, history: History) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.context: int = experts[0].config.max_position_embeddings
        self._log_weights = partial(log_weights, prior_J=prior_J, history=history)

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Return (B, S, V) log-probabilities of the token after each one, fp64, for (B, S) tokens without padding."""
        logp_JBSV = torch.stack([expert(input_ids).logits.double().log_softmax(-1) for expert in self.experts])
        return CausalLMOutput(logits=log_predictions(logp_JBSV, input_ids, lambda logp, _: self._log_weights(logp)))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 60,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return (B, S + max_new_tokens) tokens: the given ones, and each that follows from the ``context`` before it.

        ``temperature``: 0 takes the likeliest token, others draw by ``generator``.
        """
        for _ in range(max_new_tokens):
            logp_BV = self(input_ids[:, -self.context :]).logits[:, -1]
            if temperature:
                next_B1 = torch.multinomial((logp_BV / temperature).softmax(-1), 1, generator=generator)
            else:
                next_B1 = logp_BV.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, next_B1], dim=1)
        return input_ids


def load_ensemble(directory: str | Path, **options: Any) -> Ensemble:
    """Return the ensemble of a directory, ready to predict.

    ``options``: of transformers' ``from_pretrained``, the same for all experts.
    """
    root = Path(directory)
    about = json.loads((root / "ensemble.json").read_text(encoding="utf-8"))
    experts = [AutoModelForCausalLM.from_pretrained(root / "experts" / name, **options) for name in about["experts"]]
    prior_J = torch.tensor(about["prior"], dtype=torch.float64)
    return Ensemble(experts, prior_J, about["history"]).eval()
