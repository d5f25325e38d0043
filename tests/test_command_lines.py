"""Any command line is settings in their ranges or a sentence, and nothing is written or opened on the way."""

import errno
import math
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import SCRIPTS, parse
from utils.errors import UserError

FLAGS = [
    "-T", "-b", "-N", "--lr", "--decay", "--seed", "--width", "--RCR", "--RTR", "--AZO", "--no-AZO", "--sma-blocks",
    "--frame-size", "--sensor-size", "--split", "--micro-batches", "--num-workers", "--timeout", "--keep-every",
    "--device", "--amp", "--eval-amp", "--backend", "--local-rank", "--evaluate", "--resume", "--demo", "-net",
    "--label-smoothing", "--ema", "--image-size", "--warm-up", "--weight-decay", "--on-nan", "--accumulate", "-x", "--",
]  # fmt: skip
VALUES = (
    st.sampled_from(["0", "-1", "1", "2 3", "nan", "inf", "-inf", "1e400", "1e-400", "2**64", str(2**63), "9" * 30, ""])
    | st.sampled_from(["9" * 5000, "1.5", "1x1", "180x240", "x", "0x0", "cuda", "cuda:9", "fp16", "auto", "never", "٣"])
    | st.text(st.characters(exclude_characters="\0"), max_size=4)
    | st.integers().map(str)
    | st.floats().map(str)
)


@pytest.mark.parametrize("name", SCRIPTS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from(FLAGS).flatmap(lambda flag: st.tuples(st.just(flag), VALUES)), max_size=4))
def test_any_command_line_is_settings_in_range_or_a_sentence(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        args = parse(name, *(word for pair in words for word in pair if word))
    except UserError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < 2000
    except OSError as error:  # a sentence of its own, see tests/test_errors.py
        assert error.errno == errno.ENAMETOOLONG
    else:
        numbers = [value for value in vars(args).values() if isinstance(value, int | float)]
        assert all(math.isfinite(value) and abs(value) < 2**63 for value in numbers)
        assert args.epochs >= 1 and args.batch_size >= 1 and 1 <= args.timesteps <= 1000 and args.lr > 0
    assert not os.listdir(tmp_path)
