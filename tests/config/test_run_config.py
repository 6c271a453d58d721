"""What a run from scratch takes in place of the defaults, which are those of a model that is trained already."""

from __future__ import annotations

import pytest

from bge_ds.config.arguments import PretrainArguments
from bge_ds.config.run_config import fill_from_scratch

SCRATCH = {"output_dir": "o", "train_data": ["d"], "model_name_or_path": "", "config_name": "c", "tokenizer_name": "t"}


@pytest.mark.parametrize(("width", "rate"), [(64, 2e-3), (128, 2e-3), (768, 2e-3 / 6)])
def test_random_weights_get_a_rate_by_width_and_a_warm_up(width, rate):
    args = fill_from_scratch(PretrainArguments.build(**SCRATCH), width)
    assert (args.learning_rate, args.warmup_steps) == (pytest.approx(rate), 0.1)


def test_what_the_user_gave_holds():
    """Also where it is the usual default; and a constant rate, which has no warm-up, gets none."""
    given = PretrainArguments.build(**SCRATCH, learning_rate=5e-5, warmup_steps=0)
    assert fill_from_scratch(given, 128) == given
    constant = fill_from_scratch(PretrainArguments.build(**SCRATCH, lr_scheduler_type="constant"), 128)
    assert (constant.learning_rate, constant.warmup_steps) == (2e-3, 0)
