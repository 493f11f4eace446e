"""What training a prior is: its options, one step, one evaluation, the export.

Legend: B batch, K blocks, L all tokens, V codes, n digits of a code, M metrics.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedModel

from nextblock.data.augment import TransformConfig
from nextblock.data.finite import extremes
from nextblock.data.images import ImageDataConfig
from nextblock.data.pixels import to_uint8
from nextblock.evaluation.pictures import class_grid, image_grid, save_picture
from nextblock.training.loop_config import LoopConfig
from nextblock.training.optim import OptimizerConfig, build_optimizer, set_schedules
from nextblock.training.precision import in_float32, outside_autocast

from .conditioning import Condition
from .families import BlockPriorOptions, PriorOptions, check_family
from .family import Prior, check_output, try_out
from .generation import generate
from .head_plan import plan_of, training_digits
from .input_noise import with_random_codes
from .losses import PriorOutput, block_metrics
from .orders import OrderConfig, takes_orders, training_orders
from .sampling import SamplingOptions, image_generators
from .text_encoder import TextEncoder
from .text_training import TextBatches, TextConfig
from .training_data import PriorData

# Classes or captions that pictures are drawn of.
NUM_PICTURED = 10
# Training rows decoded to tokens_check.png, in columns of ten.
NUM_CHECKED_ROWS = 20


@dataclass(kw_only=True)
class PriorTrainConfig:
    """Train a prior on the shards of a tokenization job, or straight on images, and export a pipeline."""

    tokens: str | None = None
    """Folder of token shards. Exactly one of `tokens` and `data` is given."""
    samples_views: bool = False
    """Draw one of an image's views in every epoch, instead of all of them; with `tokens` only."""
    data: ImageDataConfig | None = None
    """Images, which the tokenizer encodes at every step; augmentation is then new in every epoch."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """How training images are varied; with `data` only."""
    tokenizer: str
    """Folder of the tokenizer: the one that made the tokens, or the one that encodes the images."""
    tokenizer_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which images are encoded, with `data` only; pictures and the exported tokenizer stay float32."""
    output_dir: str
    """Folder of the run."""
    pipeline_dir: str
    """Folder that the trained pipeline is saved in."""
    license: str | None = None
    """Licence of the trained weights for the model card, such as apache-2.0; null states none."""
    model: PriorOptions = field(default_factory=BlockPriorOptions)
    """The prior's family and architecture."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length, precision, cadence."""
    loss_chunk_size: int | None = None
    """Tokens whose logits exist at a time; null computes those of the whole batch at once."""
    gradient_checkpointing: bool = False
    """Keep the input of every layer alone and compute the rest again in the backward pass."""
    torch_compile: bool = False
    """Compile the model's forward and backward pass at the first step."""
    text: TextConfig = field(default_factory=TextConfig)
    """Captions as the condition, in place of classes."""
    orders: OrderConfig = field(default_factory=OrderConfig)
    """Random orders of prediction, of a family that takes them."""
    class_dropout: float = 0.1
    """Share of labels replaced by the null class, or of captions by what stands for none, which guidance needs."""
    input_keep_rate: float = 1.0
    """Share of the tokens fed to a prior that takes indices; random codes take the others' places (taming's pkeep)."""
    eval_batch_size: int = 128
    """Held-out rows predicted at a time by each process."""
    num_pictures_per_class: int = 4
    """Samples drawn of each class at an evaluation, of at most ten classes."""
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(guidance_scale=1.25))
    """How those samples are drawn, and the pipeline's where a call does not say; without classes unguided."""

    def __post_init__(self):
        check_family(self.model)
        if (self.tokens is None) == (self.data is None):
            raise ValueError(f"tokens is {self.tokens!r} and data is {self.data}; expected exactly one of them")
        if self.samples_views and self.tokens is None:
            raise ValueError("samples_views is true; expected false without tokens: images have their transform")
        if self.data is None and self.transform != TransformConfig():
            raise ValueError(f"transform is {self.transform}; expected the defaults with tokens, which are made")
        if self.data is None and self.tokenizer_dtype != "float32":
            raise ValueError(f"tokenizer_dtype is {self.tokenizer_dtype!r}; expected 'float32' with tokens")
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size is {self.loss_chunk_size}; expected at least 1, or null")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout is {self.class_dropout}; expected a number in [0, 1]")
        if not 0 < self.input_keep_rate <= 1:
            raise ValueError(f"input_keep_rate is {self.input_keep_rate}; expected a number in (0, 1]")
        for name in ("eval_batch_size", "num_pictures_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


class PriorTask:
    """What one step, one evaluation and the export of prior training are.

    Args:
        accelerator: prepares model and optimizer.
        config: the run.
        model: the prior to train, of any family.
        tokenizer: frozen, in float32; encodes images, turns indices into the prior's input and samples into pictures.
        data: rows to train on and rows held out.
        export: called with the prior, the tokenizer, sampling options, recipe, metrics and sample images.
        text_encoder: reads the captions of a prior that is conditioned on text.

    Raises:
        ValueError: if the prior is none, gives tensors of other shapes than it must, cannot draw samples as the run
            asks or compute its loss in chunks, or `loop.keep_best` is no figure of its evaluations.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: PriorTrainConfig,
        model: Prior,
        tokenizer: PreTrainedModel,
        data: PriorData,
        export: Callable[..., None],
        text_encoder: TextEncoder | None = None,
    ):
        try_out(model)
        if config.loss_chunk_size is not None and not model.can_chunk_loss:
            raise ValueError(f"loss_chunk_size is {config.loss_chunk_size}; expected null for {type(model).__name__}")
        if config.orders != OrderConfig() and not takes_orders(model):
            raise ValueError(f"orders is {config.orders}; expected the defaults for {type(model).__name__}")
        if config.input_keep_rate != 1 and not model.takes_indices:
            raise ValueError(f"input_keep_rate is {config.input_keep_rate}; expected 1 for a prior that takes codes")
        self.accelerator = accelerator
        self.config = config
        self.tokenizer = self.encoder = tokenizer.to(accelerator.device)
        if config.tokenizer_dtype != "float32":
            self.encoder = copy.deepcopy(tokenizer).to(getattr(torch, config.tokenizer_dtype))
        self.data = data
        self.texts = None if text_encoder is None else TextBatches(text_encoder, accelerator.device)
        self.vocab_size, self.conditions, self.takes_indices = model.vocab_size, model.conditions, model.takes_indices
        self.layout, self.head_plan = model.layout, plan_of(model)
        self.loss_options = {} if config.loss_chunk_size is None else {"loss_chunk_size": config.loss_chunk_size}
        self.sampling = config.sampling
        if not self.conditions.has_null:
            self.sampling = replace(self.sampling, guidance_scale=1.0)
        self.sampling.check_for(model)
        self.metric_names, self.block_shares = block_metrics(model.layout)
        self.block_shares = self.block_shares.to(accelerator.device)
        config.loop.check_keep_best([] if data.heldout is None else [*self.metric_names, "gain_nats"])
        self._export = export
        optimizer = build_optimizer(model, config.optimizer, model.no_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.modules, self.optimizers, self.records = [self.model], [self.optimizer], {}
        self.code_usage = None

    def start(self) -> None:
        """Decode the first training rows to `tokens_check.png`: wrong tokens are seen before they are learned."""
        if self.accelerator.is_main_process:
            batch = self.data.first_rows(NUM_CHECKED_ROWS)
            idx_BL = self._indices({name: tensor.to(self.accelerator.device) for name, tensor in batch.items()})
            images = to_uint8(self.tokenizer.idx_to_img(idx_BL))
            save_picture(image_grid(images, num_columns=10), Path(self.config.output_dir) / "tokens_check.png")

    def train_step(self, micro_batches: list[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        """Take one optimizer step."""
        config, accelerator, n = self.config, self.accelerator, len(micro_batches)
        loop, optimizer = config.loop, config.optimizer
        learning_rate = set_schedules(self.optimizer, step, loop.num_steps, loop.batch_size, optimizer)
        sums = 0
        for i, batch in enumerate(micro_batches):
            condition = self._condition(batch)
            condition = condition.dropped(config.class_dropout, loop.seed, step, samples=batch["index"])
            idx_BL, poison = self._training_indices(batch)
            index = batch["index"].to(idx_BL.device)
            options = self._options(index, step)
            keys = {"seed": loop.seed, "step": step, "samples": index}
            fed_BL = with_random_codes(idx_BL, config.input_keep_rate, self.vocab_size, **keys)
            with accelerator.no_sync(self.model) if i < n - 1 else nullcontext():
                # A model sharded by FSDP2 does not enter autocast by itself.
                with accelerator.autocast():
                    output = self._predict(self.model, idx_BL, condition, fed_BL, **options)
                output.loss = output.loss * poison
                accelerator.backward(output.loss / n)
            sums = sums + self._metrics(output, output.loss)
        metrics = dict(zip(self.metric_names, (sums / n).unbind(), strict=True))
        if optimizer.max_grad_norm is not None:
            metrics["grad_norm"] = accelerator.clip_grad_norm_(self.model.parameters(), optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics | {"learning_rate": learning_rate}

    def _condition(self, batch: dict[str, Tensor]) -> Condition:
        """Return what a batch is conditioned on."""
        return self.conditions.from_batch(batch if self.texts is None else self.texts(batch))

    def _indices(self, batch: dict[str, Tensor]) -> Tensor:
        """Return a batch's indices (B, L), those of its images where it has no others."""
        if "labels" in batch:
            return batch["labels"]
        # The tokenizer computes in a precision of its own, not in the prior's.
        with outside_autocast(self.accelerator.device):
            return self.encoder.img_to_idx(batch["pixel_values"])

    @torch.no_grad()
    def _training_indices(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        """Return a batch's indices (B, L), and 1, or NaN where features of its images are NaN or infinite.

        The guard of the training then skips the step, without waiting for the device.
        """
        if "labels" in batch:
            return batch["labels"], 1.0
        with in_float32(self.accelerator.device):
            features = self.encoder.encode(batch["pixel_values"])
            idx_BL = self.encoder.quantizer.indices(features, is_checked=False)
        poison = torch.where(extremes(features).isfinite().all(), 1.0, torch.nan)
        return idx_BL, poison

    def _options(self, index: Tensor, step: int) -> dict[str, Tensor]:
        """Draw what a step learns from, by samples' numbers (B,): orders, and digits that a masked head is shown."""
        options, seed, L = {}, self.config.loop.seed, self.layout.num_tokens
        orders = training_orders(self.config.orders, L, seed, step, index)
        if orders is not None:
            options["orders"] = orders
        if self.head_plan.is_masked:
            options["known_digits"] = training_digits(self.head_plan, L, seed, step, index)
        return options

    def _predict(
        self, model: Prior, idx_BL: Tensor, condition: Condition, fed_BL: Tensor | None = None, **options: Tensor
    ) -> PriorOutput:
        """Run the prior under teacher forcing, fed with its tokens unless with others."""
        fed_BL = idx_BL if fed_BL is None else fed_BL
        var_input = self.tokenizer.idx_to_var_input(fed_BL, as_indices=self.takes_indices)
        output = model(var_input, condition, idx_BL, **self.loss_options, **options)
        check_output(output, tuple(idx_BL.shape))
        return output

    @torch.no_grad()
    def _metrics(self, output: PriorOutput, loss: Tensor) -> Tensor:
        """Average loss and accuracy over all tokens, and over each block where blocks are few, (M,)."""
        # All of them at once: a small operation for every block and metric would cost a tiny model several percent.
        by_token = torch.stack([output.token_loss.mean(0), output.token_correct.to(output.token_loss.dtype).mean(0)])
        # Autocast, which evaluations run under, would average in bf16.
        with outside_autocast(by_token.device):
            by_block = by_token @ self.block_shares.to(by_token.dtype)
        return torch.cat([loss.view(1), by_token[1].mean().view(1), by_block.T.flatten()])

    def evaluate(self, model: Prior) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Measure the held-out loss without label smoothing and draw samples with fixed seeds."""
        pictures = {"samples": self._draw(model)}
        heldout, accelerator = self.data.heldout, self.accelerator
        if heldout is None:
            return {}, pictures
        mine = range(accelerator.process_index, len(heldout), accelerator.num_processes)
        # A process without a row of its own computes one that does not count, to have the same sums as the others.
        batches = BatchSampler(mine or range(1), self.config.eval_batch_size, drop_last=False)
        sums = torch.zeros(len(self.metric_names), dtype=torch.float64, device=accelerator.device)
        for batch in DataLoader(heldout, batch_sampler=batches, collate_fn=self.data.collate):
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            output = self._predict(model, self._indices(batch), self._condition(batch))
            sums += self._metrics(output, output.token_loss.mean()).double() * (len(batch["index"]) if mine else 0)
        means = (accelerator.reduce(sums) / len(heldout)).tolist()
        metrics = dict(zip(self.metric_names, means, strict=True))
        # How far the prior is below guessing among V codes, which costs ln V nats a token.
        return metrics | {"gain_nats": math.log(self.vocab_size) - metrics["loss"]}, pictures

    def _draw(self, model: Prior) -> Image.Image:
        """Draw samples of the first classes or captions, a row each; an unconditional model fills one row."""
        images, class_labels = self._sample(model)
        return class_grid(images, class_labels.numpy(), num_columns=self.config.num_pictures_per_class)

    def _sample(self, model: Prior) -> tuple[np.ndarray, Tensor]:
        """Return images (N, H, W, 3) of the first classes or captions, always by the same numbers, and their labels."""
        repeats = self.config.num_pictures_per_class
        if self.texts is None:
            class_labels = torch.arange(min(max(self.conditions.num_classes, 1), NUM_PICTURED))
            class_labels = class_labels.repeat_interleave(repeats)
            condition = self.conditions.of(class_labels)
        else:
            batch = self.data.first_rows(NUM_PICTURED, are_held_out=True)
            batch = {name: tensor.repeat_interleave(repeats, dim=0) for name, tensor in batch.items()}
            class_labels, condition = batch["index"], self._condition(batch)
        generator = torch.Generator().manual_seed(self.config.loop.seed)
        idx_Bl = generate(
            model,
            condition,
            self.tokenizer.quantizer,
            self.sampling,
            image_generators(generator, len(class_labels)),
        )
        return to_uint8(self.tokenizer.idx_to_img(torch.cat(idx_Bl, dim=1))), class_labels

    def export(self, model: Prior, metrics: dict[str, float]) -> Path:
        """Hand over prior and tokenizer, how the prior was trained, what it reached and samples of it."""
        config, sampling = self.config, self.sampling
        recipe = {"steps": config.loop.num_steps, "batch size": config.loop.batch_size, "seed": config.loop.seed}
        recipe |= {"learning rate": config.optimizer.learning_rate, "class dropout": config.class_dropout}
        recipe |= {"guidance of the samples": f"{sampling.guidance_scale} ({sampling.guidance_schedule})"}
        with torch.no_grad():
            images = [Image.fromarray(image) for image in self._sample(model)[0]]
        self._export(model, self.tokenizer, sampling, recipe, metrics, images)
        return Path(config.pipeline_dir)
