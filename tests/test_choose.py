"""The policy that `qfllama convert` writes into a file, chosen by a test on the model itself."""

import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner
from qfllama.convert import choose

from qfllama import schema
from qfllama.cli import main
from qfllama.progress import progress


def spread(mean: float) -> np.ndarray:
    """20 losses around a mean, with a standard error of 0.1."""
    values = np.tile([1.0, -1.0], 10)
    return mean + values / values.std(ddof=1) * 0.1 * 20**0.5


def test_a_policy_has_to_be_better_by_two_standard_errors():
    same = np.ones(20)
    assert choose.best({"qblend": same, "kvdiff": same}) == "qblend"
    assert choose.best({"qblend": same, "kvdiff": spread(0.81)}) == "qblend"
    assert choose.best({"qblend": same, "kvdiff": spread(0.79)}) == "kvdiff"
    assert choose.best({"qblend": same, "kvdiff": spread(1.3)}) == "qblend"
    both = {"qblend": same, "kvdiff": spread(0.7), "learned": spread(0.6)}
    assert choose.best(both) == "learned"


def test_a_model_for_short_texts_gets_the_default_without_a_test(tmp_path):
    tiny_models.write_llama(tmp_path / "tiny")
    out = tmp_path / "out.gguf"
    command = ["convert", tmp_path / "tiny", "-o", out, "--num-samples", 100, "--num-sequences", 2]
    done = CliRunner().invoke(main, list(map(str, command)))
    assert done.exit_code == 0, done.output
    assert "trained for fewer positions" in done.stderr
    assert schema.read(out).policy is None


@pytest.mark.slow
def test_where_filters_mislead_the_policy_is_one_without_filters(smollm2_filtered):
    filters = schema.read(smollm2_filtered)
    assert filters.policy == "qblend"
    for by_layer in filters.vectors.values():
        for rows in by_layer.values():
            rows *= -1
    policies = [choose.DEFAULT, choose.OTHER]
    found = choose.losses(smollm2_filtered, filters, policies, 0, 0, progress)
    assert choose.best(found) == "kvdiff"
