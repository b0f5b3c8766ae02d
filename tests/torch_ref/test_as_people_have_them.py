"""Weights files as people have them: wrapped, in half precision, renamed, or not weights at all."""

import gzip
import itertools

import pytest
import safetensors.torch
import torch

from torch_ref import convert
from torch_ref.layouts import PREFIXES
from torch_ref.model import VAE
from torch_ref.optimizer import load_checkpoint


@pytest.fixture
def state_dict():
    torch.manual_seed(0)
    return VAE(8, 3, 16).state_dict()


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefixes", [*itertools.permutations(PREFIXES, 1), *itertools.permutations(PREFIXES, 2)])
def test_prefixes_of_wrappers(prefixes, state_dict, tmp_path, capsys):
    prefix = "".join(prefixes)
    torch.save({prefix + key: tensor for key, tensor in state_dict.items()}, tmp_path / "a.pth")
    assert same(convert.load(tmp_path / "a.pth"), state_dict)
    assert capsys.readouterr().out == f"weights: every key begins with {prefix}, which is left out\n"


def test_a_prefix_of_some_keys_is_refused(state_dict, tmp_path):
    first, *rest = state_dict
    torch.save({f"module.{first}": state_dict[first]} | {key: state_dict[key] for key in rest}, tmp_path / "a.pth")
    with pytest.raises(convert.WeightsError, match=f"key {first}: missing"):
        convert.load(tmp_path / "a.pth")


def test_three_prefixes_in_a_checkpoint_of_another_layout(state_dict, tmp_path, capsys):
    layout = convert.to_state_dict(convert.to_params(state_dict), "pytorch-examples")
    model = {f"model._orig_mod.module.{key}": tensor.bfloat16() for key, tensor in layout.items()}
    torch.save({"epoch": 1, "model_state_dict": model}, tmp_path / "a.pth")
    assert same(
        convert.load(tmp_path / "a.pth"), {key: tensor.bfloat16().float() for key, tensor in state_dict.items()}
    )
    assert capsys.readouterr().out.count("weights: ") == 2


def test_an_average_of_models(state_dict, tmp_path, capsys):
    model = VAE(8, 3, 16)
    model.load_state_dict(state_dict)
    averaged = torch.optim.swa_utils.AveragedModel(model).state_dict()
    torch.save(averaged, tmp_path / "a.pth")
    assert same(convert.load(tmp_path / "a.pth"), state_dict)
    assert "weights: an average of models; n_averaged, their number, is left out\n" in capsys.readouterr().out
    torch.save({"n_averaged": averaged["n_averaged"]} | state_dict, tmp_path / "a.pth")  # whose, is not certain
    with pytest.raises(convert.WeightsError, match="key n_averaged: unknown"):
        convert.load(tmp_path / "a.pth")


def test_a_prefix_that_no_wrapper_adds_is_refused(state_dict, tmp_path):
    torch.save({f"net.{key}": tensor for key, tensor in state_dict.items()}, tmp_path / "a.pth")
    with pytest.raises(convert.WeightsError, match=r"no key of this model, but net\.encoder.*; remove prefixes"):
        convert.load(tmp_path / "a.pth")


def test_half_precision_beside_single_is_widened(state_dict, tmp_path, capsys):
    mixed = {key: tensor.half() if key.endswith("weight") else tensor for key, tensor in state_dict.items()}
    torch.save(mixed, tmp_path / "a.pth")
    assert same(convert.load(tmp_path / "a.pth"), {key: tensor.float() for key, tensor in mixed.items()})
    assert capsys.readouterr().out == "weights: torch.float16 and torch.float32, read as float32\n"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_half_precision_is_widened(dtype, name, state_dict, tmp_path, capsys):
    half = {key: tensor.to(dtype) for key, tensor in state_dict.items()}
    (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(half, tmp_path / name)
    assert same(convert.load(tmp_path / name), {key: tensor.float() for key, tensor in half.items()})
    assert capsys.readouterr().out == f"weights: {dtype}, read as float32\n"


def test_a_lightning_checkpoint(state_dict, tmp_path):
    model = VAE(8, 3, 16)
    content = {
        "epoch": 3,
        "global_step": 1407,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"vae.{key}": tensor for key, tensor in state_dict.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint": {"monitor": None, "best_model_score": None}},
        "optimizer_states": [torch.optim.Adam(model.parameters()).state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"latent_dim": 3},
    }
    torch.save(content, tmp_path / "a.ckpt")
    assert same(convert.load(tmp_path / "a.ckpt"), state_dict)
    assert load_checkpoint(tmp_path / "a.ckpt").adam is None


def test_files_are_told_by_their_content(state_dict, tmp_path):
    safetensors.torch.save_file(state_dict, tmp_path / "a.pth")
    torch.save(state_dict, tmp_path / "b.safetensors")
    torch.save(state_dict, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "a.pth").read_bytes())
    for name in ("a.pth", "b.safetensors", "c.pth", "pytorch_model.bin"):
        assert same(convert.load(tmp_path / name), state_dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "an HTML page"),
        (b"<html lang='en'>", "an HTML page"),
        (b"\xef\xbb\xbf\r\n  <HTML>", "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML text, such as the error message"),
        (b'{"error":"Repository not found"}', "a JSON text, such as the error message of a server"),
        (gzip.compress(b"PK", mtime=0), "is gzipped; unpack it first"),
    ],
)
@pytest.mark.parametrize("name", ["vae.pth", "vae.safetensors"])
def test_files_that_are_no_weights_are_named(content, message, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(convert.WeightsError, match=message) as refusal:
        convert.load(tmp_path / name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("begin", ["{", "<", "\x1f\x8b\x08"])
def test_safetensors_whose_length_looks_like_text(begin, state_dict, tmp_path):
    """The first bytes are the length of the header, which spaces may fill up."""
    content = safetensors.torch.save(state_dict)
    length, wanted = int.from_bytes(content[:8], "little"), int.from_bytes(begin.encode("latin-1"), "little")
    while wanted < length:
        wanted += 1 << 8 * len(begin)
    header = content[8 : 8 + length].ljust(wanted)
    (tmp_path / "a.pth").write_bytes(wanted.to_bytes(8, "little") + header + content[8 + length :])
    assert same(convert.load(tmp_path / "a.pth"), state_dict)
