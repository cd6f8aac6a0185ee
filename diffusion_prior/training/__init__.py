"""Training of the prior's parts: VAE, then UNet with image encoder, then spatial-temporal decoder, by one shared loop."""
