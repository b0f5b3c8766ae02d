"""The PyTorch side: the documented model, its training script, and weights to and from JAX.

Imports no jax, but for `parity`, which compares with it.

How a PyTorch user loads a trained model:

    import torch
    from torch_ref import convert
    from torch_ref.model import VAE

    state_dict = convert.load("vae.pth")  # .safetensors too, in any known layout
    hidden_dim, latent_dim, pixels = convert.sizes(state_dict)
    model = VAE(hidden_dim, latent_dim, pixels)
    model.load_state_dict(state_dict)
    samples = model.decoder(torch.randn(64, latent_dim))  # pixels in [0, 1]
    recon, mu, logvar = model(torch.rand(8, pixels))  # of your images, pixels in [0, 1]
"""
