"""Stage two: the block-autoregressive prior."""

from transformers import AutoConfig, AutoModel

from .configuration_block_prior import BlockPriorConfig
from .losses import PriorOutput, prior_output
from .modeling_block_prior import BlockPrior
from .sampling import SamplingOptions

AutoConfig.register(BlockPriorConfig.model_type, BlockPriorConfig)
AutoModel.register(BlockPriorConfig, BlockPrior)

__all__ = ["BlockPrior", "BlockPriorConfig", "PriorOutput", "SamplingOptions", "prior_output"]
