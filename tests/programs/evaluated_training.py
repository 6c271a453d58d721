"""Ranks that train with evaluations.

Argument: JSON of [[command, peak, evaluations done, flags]]. Where `peak` is not 0, the mean nDCG@10 is replaced: it rises up
to that evaluation and is low after it.
"""

import json

from bge_ds.evaluation import during_training, evaluators
from programs.train import train


def main(runs: str) -> None:
    measure = evaluators.Evaluator.__call__
    for command, peak, done, flags in json.loads(runs):
        count = [done]

        def scripted(self, model, peak=peak, count=count):
            count[0] += 1
            value = 0.1 * count[0] if count[0] <= peak else 0.05
            return measure(self, model) | ({during_training.METRIC: value} if peak else {})

        evaluators.Evaluator.__call__ = scripted
        train(command, flags)
