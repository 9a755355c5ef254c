"""minildm: Latent Diffusion Models (Rombach et al., CVPR 2022), to read and to learn from."""
