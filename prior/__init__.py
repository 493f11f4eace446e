"""Stage two: the priors, autoregressive models of the tokens."""

from transformers import AutoConfig, AutoModel

from .configuration_block_prior import BlockPriorConfig
from .configuration_gpt_prior import GPTPriorConfig
from .configuration_llama_prior import LlamaPriorConfig
from .configuration_rar_prior import RARPriorConfig
from .losses import PriorOutput, prior_output
from .modeling_block_prior import BlockPrior
from .modeling_gpt_prior import GPTPrior
from .modeling_llama_prior import LlamaPrior
from .modeling_rar_prior import RARPrior
from .sampling import SamplingOptions

for _model in (BlockPrior, LlamaPrior, RARPrior, GPTPrior):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModel.register(_model.config_class, _model)

__all__ = [
    "BlockPrior",
    "BlockPriorConfig",
    "GPTPrior",
    "GPTPriorConfig",
    "LlamaPrior",
    "LlamaPriorConfig",
    "PriorOutput",
    "RARPrior",
    "RARPriorConfig",
    "SamplingOptions",
    "prior_output",
]
