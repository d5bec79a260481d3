"""Early exit on Census-Income: a logistic regression answers where a confidence trusts it, an MLP elsewhere."""

import sys

import numpy as np
import torch
from torch import nn

import dist_moe
from dist_moe.data.batches import ShuffledFeed
from dist_moe.data.tables import CensusIncomeConfig
from dist_moe.engine.launch.machine_probe import median_seconds
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import StepLoss
from dist_moe.models import TableFeatures
from dist_moe.models.dense_layers import dense_layers
from dist_moe.models.multi_task.front import Front
from dist_moe.models.weak_strong import DispersionConfig, WeakStrong
from dist_moe.recipes.mowst.inference import Answers


class Expert(nn.Module):
    def __init__(self, features, dim, units):
        super().__init__()
        self.front = Front(features, dim)
        self.layers = dense_layers([self.front.width, *units, 2])

    def forward(self, *row):
        return self.layers(self.front(*row))


def income(batch):
    return batch.target_BT[:, 0].long()


LOSSES = {  # by what is trained, while the rest is held still
    "weak": lambda layer, batch: nn.functional.cross_entropy(layer.weak(*batch.inputs), income(batch)),
    "strong": lambda layer, batch: nn.functional.cross_entropy(layer.strong(*batch.inputs), income(batch)),
    "confidence": lambda layer, batch: layer(*batch.inputs).cross_entropy(income(batch)).mean(),
}


def main(root=None):
    data = CensusIncomeConfig(root=root).prepare(progress=True)
    features = TableFeatures(data.columns.sizes, len(data.columns.numeric))
    torch.manual_seed(0)
    weak, strong = Expert(features, 1, []), Expert(features, 16, [512, 256])
    layer = WeakStrong(weak, strong, DispersionConfig(map="monotone").build(num_features=0))
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 2e-3}}, "zero_optimization": {"stage": 0}}
    settings = TrainConfig(batch_size=min(1024, len(data.train) // 32))
    for seed, (part, loss) in enumerate(LOSSES.items()):
        feed = ShuffledFeed(data.train, settings.batch_size, seed)
        objective = lambda layer, batch, loss=loss: StepLoss(loss(layer, batch))  # noqa: E731
        dist_moe.fit(layer, feed, objective, settings, deepspeed=adam, seed=seed, trained=[f"{part}.*"])

    layer.eval()
    val, test = (part.batch(np.arange(len(part)), np.arange(len(part))) for part in (data.val, data.test))
    with torch.no_grad():
        output = layer(*val.inputs)
    right = ((logits.argmax(1) == income(val)).double() for logits in (output.weak_BC, output.strong_BC))
    answers = Answers(output.confidence_B.double(), *right)
    thresholds = {
        "logistic regression": 0.0,
        "MLP": 2.0,
        "best on validation": answers.threshold()[0],
        "within .1 % of it": answers.threshold(tolerance=0.001)[0],
    }
    for name, threshold in thresholds.items():
        answer, asks = layer.classify(*test.inputs, threshold=threshold)
        work = lambda limit=threshold: layer.classify(*test.inputs, threshold=limit)  # noqa: E731
        micro = 1e6 * median_seconds(work, torch.device("cpu"), 3) / len(answer)
        accuracy, share = (answer == income(test)).double().mean(), asks.double().mean()
        print(f"{name:20} accuracy {accuracy:.4f}, {share:6.1%} ask the MLP, {micro:6.2f} microseconds a row")


if __name__ == "__main__":
    main(*sys.argv[1:])
