"""Stage one: the VQ-VAE tokenizer."""

from transformers import AutoConfig, AutoModel

from .codebook_fsq import FSQCodebook
from .codebook_learned import LearnedCodebook
from .codebook_lfq import SignCodebook
from .codebook_product import ProductCodebook
from .codebook_simvq import SimVQCodebook
from .codec_scales import ScaleCodec
from .codec_tiles import TileCodec
from .configuration_vqvae import VQVAEConfig
from .modeling_vqvae import VQVAE, VQVAEOutput
from .quantizer import Quantizer, VectorQuantizer

AutoConfig.register(VQVAEConfig.model_type, VQVAEConfig)
AutoModel.register(VQVAEConfig, VQVAE)

__all__ = [
    "VQVAE",
    "FSQCodebook",
    "LearnedCodebook",
    "ProductCodebook",
    "Quantizer",
    "ScaleCodec",
    "SignCodebook",
    "SimVQCodebook",
    "TileCodec",
    "VQVAEConfig",
    "VQVAEOutput",
    "VectorQuantizer",
]
