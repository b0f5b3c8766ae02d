"""The trained model as PyTorch files."""

import dataclasses

import pytest
import safetensors.torch
import torch

pytestmark = pytest.mark.usefixtures("quick")


def test_what_is_printed_loads_the_file(finished, tmp_path, command):
    models = []
    for name in ("vae.pth", "vae.safetensors"):
        config = dataclasses.replace(finished, export=tmp_path / name)
        config.export.unlink(missing_ok=True)
        code, output, _ = command(config)
        assert code == 0
        saved, call = output.splitlines()[-1].split("; load it with ")
        assert saved == f"saved {config.export}"
        models.append(eval(call, {"torch": torch, "safetensors": safetensors}))
    assert models[0].keys() == models[1].keys()
    for key, tensor in models[0].items():
        assert torch.equal(tensor, models[1][key])


def test_a_file_that_will_be_replaced_is_said_at_once(finished, tmp_path, command):
    line = f"{finished.export}: will be replaced when training ends; to keep it, name another file (--export)"
    for changes, said in (
        ({"epochs": finished.epochs + 1}, False),  # its own
        ({"workdir": tmp_path / "another"}, True),
        ({"workdir": tmp_path / "another", "overwrite": True}, True),
        ({"workdir": tmp_path / "a third", "export": tmp_path / "third.pth"}, False),
    ):
        code, output, _ = command(dataclasses.replace(finished, **changes))
        assert code == 0
        assert (line in output.splitlines()) == said
        assert not said or output.index(line) < output.index("epoch 1")


@pytest.mark.parametrize("name", ["vae.pth", "vae.safetensors"])
def test_the_export_of_another_run_is_left_alone(name, finished, tmp_path, command):
    config = dataclasses.replace(finished, export=tmp_path / name)
    assert command(config)[0] == 0  # writes it where it is missing
    for content, lines in ((config.export.read_bytes(), 0), (b"PK\3\4 of another run", 1)):
        config.export.write_bytes(content)
        code, output, _ = command(config)
        assert code == 0
        assert output.splitlines()[3:] == lines * [
            f"{config.export}: differs from {config.workdir}/model.pth, the model of this run, and is left as it is"
        ]
        assert config.export.read_bytes() == content
