"""The benchmark suite on tiny settings: contenders run, failures become rows, reports are written. Nothing is timed."""

import json
import os
import threading

import jax
import pytest
from matplotlib.figure import Figure

from benchmarks import __main__ as command
from benchmarks import epoch, evaluate, fidelity, floor, plots, report, scale, start
from benchmarks.jax_contenders import tiled
from benchmarks.turns import Measured, Runner, Setting, take_turns

TINY = Setting(images=300, batch_size=128, hidden_dim=16, latent_dim=4)


def test_contenders_take_turns_and_failures_are_rows():
    contenders = {
        "ours": "benchmarks.jax_contenders:ours",
        "absent": "benchmarks.no_such_module:ours",
        "broken": "test_benchmarks:broken",
        "dies": "test_benchmarks:dies",
        "dies later": "test_benchmarks:dies_later",
    }
    ours, absent, broken, *dead = take_turns(contenders, TINY, rounds=2)
    assert [one.name for one in (ours, absent, broken, *dead)] == list(contenders)
    assert len(ours.seconds) == len(ours.returned) == 2
    assert ours.median > 0
    assert 0 < ours.returned[1] < ours.returned[0] < 600
    assert absent.failure == "not installed: benchmarks.no_such_module"
    assert broken.failure == "failed: ValueError: too small"
    assert [one.failure for one in dead] == ["failed: its process ended with code 3"] * 2
    assert broken.median is None


def broken(_: Setting) -> Runner:
    raise ValueError("too small\nand more")


def dies(_: Setting) -> Runner:
    os._exit(3)


def dies_later(_: Setting) -> Runner:
    # After the run that warms up, while others run.
    return Runner(threading.Timer(0.01, os._exit, [3]).start)


@pytest.mark.parametrize("name", ["documented", "in_memory"])
def test_pytorch_contenders_train(name):
    from benchmarks import torch_contenders

    runner = getattr(torch_contenders, name)(TINY)
    first, *_, last = (runner.run() for _ in range(3))
    assert last < first < 600


@pytest.mark.parametrize("name", ["flax_per_step", "flax_eager"])
def test_flax_contenders_train(name):
    from benchmarks import jax_contenders

    # optax.adam and losses mix types and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runner = getattr(jax_contenders, name)(TINY)
        first, second = runner.run(), runner.run()
    assert second < first < 600
    assert runner.share == 1


def test_tiled_images_repeat():
    images = tiled(60003)
    assert images.shape == (60003, 784)
    assert (images[60000:] == images[:3]).all()


def test_products_of_the_documented_step():
    products = floor.products(Setting())
    assert len(products) == 11
    # Six products of [128, 784] x [784, 400] size less one, and the small ones.
    assert floor.epoch_flops(Setting()) == 60000 * 2 * (5 * 784 * 400 + 3 * 400 * 40 + 3 * 20 * 400)
    seconds = floor.numpy_products(TINY).run()
    assert seconds.keys() == {product.name for product in floor.products(TINY)}
    rows = floor.rows(TINY, [Measured("products: NumPy (OpenBLAS)", 0, 0, [1.0], [seconds])])
    assert {row["best library"] for row in rows} == {"NumPy (OpenBLAS)"}


def test_growth_is_the_exponent():
    assert scale.growth([1, 10, 100], [3, 300, 30000]) == pytest.approx(2)


def test_divergence_of_the_two_sides_is_rounding():
    rows = fidelity.divergence(Setting(images=128 * 2), "float64")
    assert rows[-1]["steps"] == 2
    assert rows[-1]["parameters"] < 1e-12
    assert rows[-1]["loss"] < 1e-12


def test_checks():
    assert report.at_most("a", 2.0, 1.0, 2) == ("a", "2", True)
    assert report.at_least("a", 1.9, 1.0, 2) == ("a", "1.9", False)
    assert report.at_least("a", None, 1.0, 2) == ("a", "not measured", None)


def test_a_table_is_markdown():
    assert report.table([{"name": "a", "s": 1234.5}, {"name": "b|c", "n": 2}]).splitlines() == [
        "| name | s | n |",
        "| --- | ---: | ---: |",
        "| a | 1,234 |  |",
        "| b\\|c |  | 2 |",
    ]


@pytest.fixture
def instant(monkeypatch):
    """Every measurement of the suite answers at once, with figures that could be true."""
    answers = {
        "benchmarks.report:device": "cpu: test",
        "benchmarks.start:beginning": {"data": 0.2},
        "benchmarks.scale:point": {
            "seconds an epoch": 2.0, "seconds a step": 0.1, "GFLOP/s": 90.0,
            "peak memory MB": 500.0, "uint8 images MB": 47.0,
        },
        "benchmarks.fidelity:divergence": [{"steps": 7, "parameters": 1e-15, "loss": 1e-15}],
    }  # fmt: skip
    sizes = iter(range(1, 100))

    def one(place, *_):
        answer = answers[place]
        return answer | {"uint8 images MB": 47.0 * next(sizes)} if "scale" in place else answer

    def several(places, *_):
        return [
            [{"train loss": 106.0 + n, "test loss": 105.0 + n + 0.1 * seed} for seed in range(2)]
            for n, _ in enumerate(places)
        ]

    def turns(contenders, setting, rounds):
        products = {product.name: 1e-3 for product in floor.products(setting)}
        found = [
            Measured(name, 1.0, 2.0, [3.0 + n] * rounds, [products if "products" in name else 100.0] * rounds)
            for n, name in enumerate(contenders)
        ]
        found[-1] = found[-1]._replace(seconds=[], returned=[], failure="failed: x")
        return found

    def run_command(module, _):
        return {
            "command": module, "whole s": 9.0, "epochs s": 5.0, "outside epochs s": 4.0,
            "final test loss": 105.0, "lines s": (2.0, 8.0),
        }  # fmt: skip

    for module in (epoch, evaluate):
        monkeypatch.setattr(module, "take_turns", turns)
    for module in (report, scale, start, fidelity):
        monkeypatch.setattr(module, "isolated", one)
    monkeypatch.setattr(fidelity, "isolated_together", several)
    monkeypatch.setattr(start, "command", run_command)


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize("quick", [True, False])
def test_the_command_writes_json_markdown_and_a_picture(tmp_path, quick):
    command.benchmark(command.BenchmarkConfig(quick=quick, out=tmp_path))
    for name in command.NAMES:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["name"] == name
        assert found["settings"]["quick"] == quick
        assert found["environment"]["machine"]["device"] == "cpu: test"
        assert {"jax", "torch", "python"} <= found["environment"]["versions"].keys()
        assert all(rows for rows in found["tables"].values())
        assert all({"claim", "found", "holds"} == check.keys() for check in found["checks"])
        markdown = (tmp_path / f"{name}.md").read_text()
        assert f"# {name}" in markdown
        assert "load before" in markdown
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "epoch.json").read_text())["checks"]
    assert [row["holds"] for row in rows if row["claim"].startswith("GPU")] == [None] * 3


def test_the_picture_of_commands():
    phases = [{"phase": "data", "seconds": 2.0}, {"phase": "epochs", "seconds": 6.0}]
    medians = [{"command": "ours", "whole s": 10.0}, {"command": "theirs", "whole s": 30.0}]
    figure = Figure()
    plots._start(figure, report.Report("start", "", {}, {"Medians": medians, "Where our seconds go": phases}))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "theirs"]
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.75, 3.0]


def test_a_picture_without_figures(tmp_path):
    empty = report.Report("evaluate", "", {}, {"Throughput": [{"estimator": "ours", "note": "failed: x"}]})
    plots.draw(empty, tmp_path / "evaluate.png")
    assert (tmp_path / "evaluate.png").exists()
