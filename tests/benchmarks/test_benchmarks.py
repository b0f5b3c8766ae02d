"""The benchmark suite on tiny settings: contenders run, failures become rows, reports are written. Nothing is timed."""

import json
import os
import random
import threading

import jax
import pytest

from benchmarks import __main__ as command
from benchmarks import cells, epoch, evaluate, faults, fidelity, floor, machines, plots, report, scale, start, sweep
from benchmarks.jax_contenders import tiled
from benchmarks.turns import Measured, Runner, Setting, resolve, take_turns

TINY = Setting(images=300, batch_size=128, hidden_dim=16, latent_dim=4)


def test_contenders_take_turns_and_failures_are_rows():
    contenders = {
        "ours": "benchmarks.jax_contenders:ours",
        "absent": "benchmarks.no_such_module:ours",
        "broken": f"{__name__}:broken",
        "dies": f"{__name__}:dies",
        "dies later": f"{__name__}:dies_later",
    }
    ours, absent, broken, *dead = take_turns(contenders, TINY, rounds=2)
    assert [measured.name for measured in (ours, absent, broken, *dead)] == list(contenders)
    assert len(ours.seconds) == len(ours.returned) == 2
    assert ours.median > 0
    assert 0 < ours.returned[1] < ours.returned[0] < 600
    assert absent.failure == "not installed: benchmarks.no_such_module"
    assert broken.failure == "failed: ValueError: too small"
    assert [measured.failure for measured in dead] == ["failed: its process ended with code 3"] * 2
    assert broken.median is None


@pytest.mark.parametrize("module", ["benchmarks.jax_contenders", "benchmarks.torch_contenders"])
@pytest.mark.parametrize("name", ["stacked", "iwae"])
def test_both_sides_train_alike(module, name):
    """Stacked models, and those of the published table: the losses of two epochs fall as they should."""
    runner = resolve(f"{module}:{name}")(TINY._replace(models=2, samples=2))
    losses = [runner.run() for _ in range(2)]
    assert 150 < losses[1] < losses[0] < 600


def broken(_: Setting) -> Runner:
    raise ValueError("too small\nand more")


def dies(_: Setting) -> Runner:
    os._exit(3)


def dies_later(_: Setting) -> Runner:
    # After its run that warms up, while others run.
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


def test_processes_train_together_and_failures_are_rows():
    ours = machines.Contender("vae_jax", "benchmarks.machines:ours", 2, 2, 2)
    broken = machines.Contender("broken", f"{__name__}:broken_together", 2, 2, 2)
    found, failed = machines.measure([ours, broken], images=512, batches=(128,), rounds=1)
    assert found["images/s"] == pytest.approx(found["steps/s"] * 128)
    assert failed["note"] == "failed: ValueError: too small"


def broken_together(*_) -> dict:
    raise ValueError("too small")


def test_checks_of_processes():
    def row(trainer, processes, speed):
        return {"trainer": trainer, "processes": processes, "devices": processes, "shards": 2, "batch": 1024} | speed

    rows = [row("vae_jax", 1, {"images/s": 10.0}), row("vae_jax", 2, {"images/s": 8.0})]
    found = machines.checks([*rows, row(machines.DDP, 2, {"images/s": 4.0})])
    assert [(check.found, check.holds) for check in found] == [
        ("0.8 x", False),
        ("2 x", True),
        ("not measured", None),
    ]
    assert [check.holds for check in machines.checks([*rows, row(machines.DDP, 2, {"note": "failed"})])] == [
        False,
        None,
        None,
    ]


def test_tiled_images_repeat():
    images = tiled(60003)
    assert images.shape == (60003, 784)
    assert (images[60000:] == images[:3]).all()


def test_products_of_the_documented_step():
    products = floor.products(Setting())
    assert len(products) == 11
    # Five products of the size [128, 784] x [784, 400], and the small ones.
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
    assert report.at_most("a", 2.0, 1.0, 2) == ("a", "2 x", True)
    assert report.at_most("a", 3.0, 1.0, 2, "s") == ("a", "3 s", False)
    assert report.at_least("a", 1.9, 1.0, 2) == ("a", "1.9 x", False)
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
    """Replaces every measurement of the suite by plausible figures."""
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

    def isolated(place, *_):
        answer = answers[place]
        return answer | {"uint8 images MB": 47.0 * next(sizes)} if "scale" in place else answer

    def isolated_together(places, *_):
        return [
            [{"train loss": 106.0 + n, "test loss": 105.0 + n + 0.1 * seed} for seed in range(2)]
            for n, _ in enumerate(places)
        ]

    def take_turns(contenders, setting, rounds):
        products = {product.name: 1e-3 for product in floor.products(setting)}
        found = [
            Measured(name, 1.0, 2.0, [3.0 + n] * rounds, [products if "products" in name else 100.0] * rounds)
            for n, name in enumerate(contenders)
        ]
        found[-1] = found[-1]._replace(seconds=[], returned=[], failure="failed: x")
        return found

    def run(module, _):
        return {
            "command": module, "whole s": 9.0, "epochs s": 5.0, "outside epochs s": 4.0,
            "final test loss": 105.0, "lines s": (2.0, 8.0),
        }  # fmt: skip

    def measure(contenders, images, batches, rounds):
        assert images and rounds
        return [
            {"trainer": name, "processes": processes, "devices": devices, "shards": shards, "batch": size}
            | ({"images/s": 10.0 * size / processes} if shards < 4 else {"note": "failed: x"})
            for size in batches
            for name, _, processes, devices, shards in contenders
        ]

    monkeypatch.setattr(machines, "measure", measure)
    for module in (epoch, evaluate, sweep, cells):
        monkeypatch.setattr(module, "take_turns", take_turns)
    for module in (report, scale, start, fidelity):
        monkeypatch.setattr(module, "isolated", isolated)
    monkeypatch.setattr(fidelity, "isolated_together", isolated_together)
    monkeypatch.setattr(start, "command", run)
    monkeypatch.setattr(sweep, "together", lambda epochs, *commands: 9.0 * epochs * len(commands))


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize("quick", [True, False])
def test_the_command_writes_json_markdown_and_pictures(tmp_path, quick):
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
    for name in ("epoch", "start", "scale", "fidelity"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "epoch.json").read_text())["checks"]
    assert [row["holds"] for row in rows if row["claim"].startswith("GPU")] == [None] * 3


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures of the pictures that are drawn, which are not saved."""
    drawn = []
    monkeypatch.setattr(plots, "pixels", drawn.append)
    monkeypatch.setattr(plots, "save", lambda *_: None)
    return drawn


def test_the_picture_of_commands(figures, tmp_path):
    phases = [{"phase": "data", "seconds": 2.0}, {"phase": "epochs", "seconds": 6.0}]
    medians = [
        {"command": "ours", "epochs s": 6.0, "outside epochs s": 4.0},
        {"command": "theirs", "epochs s": 25.0, "outside epochs s": 5.0},
    ]
    tables = {"Medians": medians, "Where our seconds go": phases}
    plots.draw(report.Report("start", "", {"epochs": 10}, tables), tmp_path / "start.png")
    commands, everything_else = figures[0].axes
    assert [label.get_text() for label in commands.get_yticklabels()] == ["ours", "theirs"]
    assert [bar.get_width() for bar in commands.patches] == [6, 25, 4, 5]
    assert [label.get_text() for label in everything_else.get_yticklabels()] == ["data"]
    assert [bar.get_width() for bar in everything_else.patches] == [2]


def test_a_long_bar_is_broken_and_keeps_its_figure(figures, tmp_path):
    rows = [{"contender": name, "median s": seconds} for name, seconds in (("vae_jax", 1.37), ("b", 2), ("c", 21.2))]
    plots.draw(report.Report("epoch", "", {}, {"Epochs": [*rows, {"contender": "absent"}]}), tmp_path / "epoch.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [1.37, 2, 2.5]
    assert {"1.37", "2.00", "21.2", "//"} <= {text.get_text() for text in axes.texts}


def test_a_picture_without_figures(tmp_path):
    empty = report.Report("epoch", "", {}, {"Epochs": [{"contender": "vae_jax", "note": "failed: x"}]})
    plots.draw(empty, tmp_path / "epoch.png")
    assert (tmp_path / "epoch.png").exists()


def test_faults_damage_every_part_of_a_checkpoint():
    header = b"{" + b" " * 990 + b"}"  # with its length, 1,000 bytes
    content = len(header).to_bytes(8, "little") + header + bytes(9000)
    found = list(faults.damages(content, 300, random.Random(0)))
    assert all(damaged != content for _, damaged in found)
    flipped = [damaged for kind, damaged in found if "flipped" in kind]
    places = [next(n for n, (a, b) in enumerate(zip(content, damaged, strict=True)) if a != b) for damaged in flipped]
    assert len(places) == 300
    assert sum(place < 1000 for place in places) == 100
    assert {kind.split()[0] for kind, _ in found} == {"cut", "emptied", "grown", "deleted", "a"}
