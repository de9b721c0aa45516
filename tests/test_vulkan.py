"""Layers and their KV cache on a Vulkan device; a software driver will do (`make test-vulkan`).

Vulkan rounds otherwise than the CPU (its products of matrices are in float16 where the device has
it), so logits are compared with a tolerance: TIMES what stock contexts on both devices differ by,
measured in the same run. Rows move bit by bit all the same, and from the same rows the same ones
are kept.
"""

import devices
import numpy as np
import pytest
from devices import N_LAYER, POLICIES

HEAD_DIM = 64
TIMES = 3.0
TYPES = [("f32", "f32"), ("f16", "f16"), ("q8_0", "f16")]


@pytest.fixture(scope="module")
def device():
    try:
        found = devices.first_of("Vulkan")
    except LookupError:
        pytest.skip("llama.cpp was built without GGML_VULKAN: `make test-vulkan`")
    if not found:
        pytest.skip("no Vulkan device: GGML_VK_VISIBLE_DEVICES=0 takes a software driver too")
    return found


@pytest.fixture(scope="module")
def path(device, tmp_path_factory):
    return devices.write_model(tmp_path_factory.mktemp("vulkan"), HEAD_DIM)


@pytest.fixture(scope="module")
def here(path):
    model = devices.load(path, None, 0)
    yield model
    model.close()


@pytest.fixture(scope="module", params=[2, N_LAYER + 1], ids=["half of the layers", "all layers"])
def there(request, path, device):
    model = devices.load(path, device, request.param)
    yield model
    model.close()


@pytest.fixture(scope="module")
def tolerance(here, there):
    """Cache types -> how far logits may be from the CPU's."""
    known = {}

    def measure(*types) -> float:
        if types not in known:
            ours, cpus = (devices.stock_logits(model, *types) for model in (there, here))
            difference = np.abs(ours - cpus).max()
            print(f"stock {types}: at most {difference:.2g}, standard deviation {cpus.std():.2g}")
            assert 0 < difference < 0.05 * cpus.std(), "the same device twice, or another model"
            known[types] = TIMES * difference
        return known[types]

    return measure


@pytest.mark.parametrize("policy", POLICIES)
def test_a_session_on_vulkan_keeps_the_same_rows_and_computes_close_logits(
    here, there, tolerance, policy
):
    """Keys of deeper layers differ by rounding, so two that score about the same may change places.
    From then on everything differs a little more, and logits are not compared."""
    runs = (devices.run(model, HEAD_DIM, policy, "f32", "f32") for model in (there, here))
    same = total = 0
    for (logits, kept, _), (logits_cpu, kept_cpu, _) in zip(*runs, strict=True):
        same += sum(len(np.intersect1d(*pair)) for pair in zip(kept, kept_cpu, strict=True))
        total += sum(map(len, kept_cpu))
        if same == total:
            np.testing.assert_allclose(logits, logits_cpu, rtol=0, atol=tolerance("f32", "f32"))
    print(f"{total - same} of {total} rows are others than the CPU's")
    assert total - same <= (0 if policy == "streaming" else 0.002 * total)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_from_the_same_rows_vulkan_keeps_the_same_ones_and_moves_their_bits(
    here, there, tolerance, types, policy
):
    """Every batch starts on both devices from the bytes that lie on the Vulkan device."""
    with (
        devices.context(there, HEAD_DIM, policy, *types) as llm,
        devices.context(here, HEAD_DIM, policy, *types) as cpu,
    ):
        seen = {}
        for i, tokens in enumerate(devices.BATCHES):
            assert i == 0 or cpu.restore(llm.state())
            assert llm.decode(tokens) == cpu.decode(tokens) == 0
            assert all(map(np.array_equal, devices.kept(llm), devices.kept(cpu)))
            for rows, rows_cpu in zip(devices.rows(llm), devices.rows(cpu), strict=True):
                np.testing.assert_array_equal(rows[: -len(tokens)], rows_cpu[: -len(tokens)])
            np.testing.assert_allclose(llm.logits(), cpu.logits(), rtol=0, atol=tolerance(*types))
            devices.remember(llm, seen)
        assert llm.stats().n_evictions >= 10


def test_rows_that_are_not_whole_words_can_not_be_moved_there(device, tmp_path):
    """q8_0 with head_dim 32: 34 bytes. In host memory they can, so this cache is on the device."""
    model = devices.load(devices.write_model(tmp_path, 32), device, N_LAYER + 1)
    with pytest.raises(ValueError):
        devices.run(model, 32, "knorm", "q8_0")
    model.close()
