"""Stage one: the VQ-VAE tokenizer."""

from transformers import AutoConfig, AutoModel

from .configuration_vqvae import VQVAEConfig
from .modeling_vqvae import VQVAE, VQVAEOutput
from .quantizer import VectorQuantizer
from .quantizer_multiscale import MultiScaleQuantizer

AutoConfig.register(VQVAEConfig.model_type, VQVAEConfig)
AutoModel.register(VQVAEConfig, VQVAE)

__all__ = ["VQVAE", "MultiScaleQuantizer", "VQVAEConfig", "VQVAEOutput", "VectorQuantizer"]
