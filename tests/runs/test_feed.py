"""The steps of an epoch in chunks."""

import pytest

from vae_jax.runs.feed import CHUNK_FLOPS, chunk_steps, step_flops


@pytest.mark.parametrize(("steps", "flops"), [(469, 5 * 10**8), (1, 10**12), (600, 10**12), (467, 5 * 10**8), (10, 1)])
def test_chunks_cover_an_epoch(steps, flops):
    chunks = chunk_steps(steps, flops)
    assert [step for chunk in chunks for step in chunk] == list(range(steps))
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * flops <= CHUNK_FLOPS
    assert len({len(chunk) for chunk in chunks}) <= 2
    if steps == 469:
        assert {len(chunk) for chunk in chunks} == {67}  # 7 times 67: one program to compile


def test_small_batches_of_large_models_have_short_chunks():
    # Such a step costs what Adam costs, not what the products cost.
    assert CHUNK_FLOPS / step_flops(1, 3_200_000) < 200
    assert CHUNK_FLOPS / step_flops(128, 652_824) > 67
