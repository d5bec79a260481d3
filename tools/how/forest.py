"""The picture of a forest's experts that are mixed by the posterior of their domains, letter by letter."""

from __future__ import annotations

import math
import string
from itertools import pairwise

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dist_moe.recipes.branch_train_merge.posterior import History, log_mixture, log_weights, uniform_prior
from tools.how.canvas import INK, RANKS, SOFT, heat, note

DOMAINS = {
    "prose": "the sea was calm and the old man sat near the shore as the sun went down over the quiet town "
    "she asked him where the road led and he said that it went on to the hills and then to the river "
    "they walked until the rain came and the lamps were lit in the houses along the street ",
    "code": "def add(a, b): return a + b; for i in range(n): x[i] = f(x[i]); if (a == b): return x[0]; "
    "def g(x, n): return [f(i) for i in range(n)]; y = g(x, n); for j in y: print(j, x[j]); "
    "while (i < n): i += 1; x[i] = x[i] + y[i]; return sum(x) / (n + 1); ",
    "figures": "12.5, 13.0, 14.75, 9.25, 10.0, 11.5; 2019, 2020, 2021; 0.05, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0; "
    "3.14, 2.72, 1.41; 100, 250, 500, 1000, 2500; 7.5, 8.25, 9.0; 64, 128, 256, 512, 1024, 2048; ",
}
"""A text of each domain, from which its expert has counted which letter follows which."""

MIXED, ONE_DOMAIN = "the old road x[i] = f(n); 12.25, 2.5", "y = [g(i) for i in x]; return y[n]"
PAIR = 0.2
"""By so much every pair of letters is counted more often than it occurs."""

LETTERS = string.ascii_lowercase + string.digits + " .,;:()[]=+-*/<"


def bigrams(text: str) -> Tensor:
    """Return (V, V) log-probabilities of the letter after each one."""
    count_VV = torch.full((len(LETTERS), len(LETTERS)), PAIR, dtype=torch.float64)
    for before, after in pairwise(text):
        count_VV[LETTERS.index(before), LETTERS.index(after)] += 1
    return (count_VV / count_VV.sum(dim=1, keepdim=True)).log()


def letter_scores(text: str) -> Tensor:
    """Return (J, S): the log-probability that each expert gives each letter of ``text`` but the first."""
    place_S = torch.tensor([LETTERS.index(letter) for letter in text])
    return torch.stack([bigrams(learnt)[place_S[:-1], place_S[1:]] for learnt in DOMAINS.values()])


def draw_posterior() -> Figure:
    """The experts' probabilities of letters, and the posteriors that follow from all letters before and from one."""
    figure = Figure(figsize=(8.2, 7.0), layout="constrained")
    top, *others = figure.subplots(4, 1, height_ratios=(0.7, 1, 1, 1))
    _draw_letters(top, MIXED)
    _draw_weights(others[0], MIXED, "all", "weights from all letters before")
    _draw_weights(others[1], MIXED, "previous", "weights from the previous letter alone")
    _draw_weights(others[2], ONE_DOMAIN, "all", "a text of one domain, weights from all letters before")
    return figure


def _bits(logp_S: Tensor) -> float:
    return -float(logp_S.mean()) / math.log(2)


def _draw_letters(axes: Axes, text: str) -> None:
    """Draw the experts' probabilities of each letter."""
    logp_JS = letter_scores(text)
    heat(axes, logp_JS.exp(), largest=0.5)
    axes.set_aspect("auto")
    _letters_below(axes, text[1:])
    axes.set_yticks(range(len(DOMAINS)), DOMAINS)
    for label, colour in zip(axes.get_yticklabels(), RANKS, strict=False):
        label.set_color(colour)
    axes.set_title("the experts' probabilities of each letter (full colour: 1/2 and more)", color=INK)


def _draw_weights(axes: Axes, text: str, history: History, title: str) -> None:
    """Draw the weights before each letter as bars that add up to 1; say the bits of the experts and their mixture."""
    letters, logp_JS = text[1:], letter_scores(text)
    log_weight_JS = log_weights(logp_JS[:, None], uniform_prior(len(DOMAINS)), history)
    mixed_S = log_mixture(log_weight_JS, logp_JS[:, None])[0]
    bottom_S = torch.zeros(len(letters), dtype=torch.float64)
    for weight_S, colour in zip(log_weight_JS[:, 0].exp(), RANKS, strict=False):
        axes.bar(range(len(letters)), weight_S.tolist(), 0.92, bottom=bottom_S.tolist(), color=colour)
        bottom_S += weight_S
    axes.set(xlim=(-0.5, len(letters) - 0.5), ylim=(0, 1), yticks=[0, 0.5, 1])
    note(axes, 0, 0.5, "prior", color="white", rotation=90, ha="center", fontsize=8)
    _letters_below(axes, letters)
    alone = ", ".join(f"{name} {_bits(logp_S):.2f}" for name, logp_S in zip(DOMAINS, logp_JS, strict=True))
    axes.set_title(f"{title}\nbits per letter: mixture {_bits(mixed_S):.2f}; {alone}", color=INK)


def _letters_below(axes: Axes, letters: str) -> None:
    axes.set_xticks(range(len(letters)), ["␣" if letter == " " else letter for letter in letters])
    axes.tick_params(length=0, colors=SOFT)
    for label in axes.get_xticklabels():
        label.set_color(INK)
