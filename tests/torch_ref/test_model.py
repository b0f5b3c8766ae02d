"""The documented PyTorch model."""

import torch

from torch_ref.model import VAE


def test_the_documented_model():
    model = VAE()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == {
        "encoder.fc1.weight": (400, 784), "encoder.fc1.bias": (400,),
        "encoder.fc2_mu.weight": (20, 400), "encoder.fc2_mu.bias": (20,),
        "encoder.fc2_logvar.weight": (20, 400), "encoder.fc2_logvar.bias": (20,),
        "decoder.fc1.weight": (400, 20), "decoder.fc1.bias": (400,),
        "decoder.fc2.weight": (784, 400), "decoder.fc2.bias": (784,),
    }  # fmt: skip
    assert sum(tensor.numel() for tensor in model.parameters()) == 652_824


def test_noise_is_drawn_where_none_is_given():
    model = VAE()
    images = torch.rand(4, 784)
    torch.manual_seed(1)
    recon, mu, logvar = model(images)
    torch.manual_seed(1)
    eps = torch.randn(4, 20)
    assert torch.equal(recon, model(images, eps)[0])
    assert torch.allclose(model.reparameterize(mu, logvar, eps), mu + torch.exp(logvar / 2) * eps)
    assert recon.min() > 0
    assert recon.max() < 1
