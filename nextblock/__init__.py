"""nextblock: train, run and publish two-stage image generators by next-block prediction.

Public names are loaded when they are first asked for: `import nextblock` alone loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextblock.data.blocks import BlockLayout as BlockLayout
    from nextblock.pipelines import ClassToImagePipeline as ClassToImagePipeline
    from nextblock.pipelines import TextToImagePipeline as TextToImagePipeline
    from nextblock.pipelines import save_animation as save_animation
    from nextblock.prior import BlockPrior as BlockPrior
    from nextblock.prior import BlockPriorConfig as BlockPriorConfig
    from nextblock.prior import GPTPrior as GPTPrior
    from nextblock.prior import GPTPriorConfig as GPTPriorConfig
    from nextblock.prior import LlamaPrior as LlamaPrior
    from nextblock.prior import LlamaPriorConfig as LlamaPriorConfig
    from nextblock.prior import SamplingOptions as SamplingOptions
    from nextblock.tokenizer import VQVAE as VQVAE
    from nextblock.tokenizer import VectorQuantizer as VectorQuantizer
    from nextblock.tokenizer import VQVAEConfig as VQVAEConfig

__version__ = "0.2.0"

_HOMES = {
    "BlockLayout": "nextblock.data.blocks",
    "BlockPrior": "nextblock.prior",
    "BlockPriorConfig": "nextblock.prior",
    "ClassToImagePipeline": "nextblock.pipelines",
    "GPTPrior": "nextblock.prior",
    "GPTPriorConfig": "nextblock.prior",
    "LlamaPrior": "nextblock.prior",
    "LlamaPriorConfig": "nextblock.prior",
    "SamplingOptions": "nextblock.prior",
    "TextToImagePipeline": "nextblock.pipelines",
    "VQVAE": "nextblock.tokenizer",
    "VQVAEConfig": "nextblock.tokenizer",
    "VectorQuantizer": "nextblock.tokenizer",
    "save_animation": "nextblock.pipelines",
}


def __getattr__(name: str):
    """Load a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names too."""
    return sorted({*globals(), *_HOMES})
