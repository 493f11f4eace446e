"""What training a tokenizer is: its options, one step, one evaluation, the export."""

import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, collate
from nextblock.data.keyed_random import keyed_uniform
from nextblock.data.pixels import to_uint8
from nextblock.evaluation.codebook import code_counts, codebook_curves
from nextblock.evaluation.metrics import psnr
from nextblock.evaluation.pictures import comparison_grid
from nextblock.evaluation.sparse_counts import SparseCounts
from nextblock.files.stored_model import check_memory
from nextblock.training.alarms import CodeUsage
from nextblock.training.initial_weights import with_initial_architecture
from nextblock.training.loop_config import LoopConfig
from nextblock.training.optim import OptimizerConfig, build_optimizer, set_schedules
from nextblock.training.run_config import options_dataclass

from .adversarial import Adversary, DiscriminatorConfig, build_discriminator, last_weight
from .autoencoder import ResidualBlock, SpatialAttention
from .codec_scales import drawn_num_scales
from .configuration_vqvae import VQVAEConfig
from .losses import TokenizerLossConfig, assignment_entropy, reconstruction_loss, tokenizer_losses
from .modeling_vqvae import VQVAE, VQVAEOutput
from .perceptual import PerceptualConfig
from .processes import all_reduced, rank_and_world_size

VQVAEOptions = options_dataclass(VQVAEConfig)
# What a fine-tuning may change of a tokenizer: how it is trained.
TUNED_OPTIONS = (
    "dropout",
    "beta",
    "epsilon",
    "codebook_update",
    "codebook_gradient",
    "codebook_ema_decay",
    "codebook_init",
    "codebook_init_scale",
    "revival_threshold",
)


@dataclass(kw_only=True)
class TokenizerTrainConfig:
    """Train a VQ-VAE tokenizer on images and export it."""

    output_dir: str
    """Folder of the run; the trained tokenizer is saved right in it."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    """Where images come from."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """How training images are brought to size and varied."""
    model: VQVAEOptions = field(default_factory=VQVAEOptions)
    """The tokenizer's architecture."""
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    """Weights of the loss terms."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """Perceptual term; off unless it has a weight."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Adversarial term and its discriminator; off unless it has a weight."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length, precision, cadence."""
    eval_batch_size: int = 100
    """Held-out images encoded at a time by each process."""
    num_pictures: int = 20
    """Held-out images drawn above their reconstructions."""
    num_init_images: int = 512
    """Training images whose features the codes start as (codebook_init "data")."""
    scale_dropout: float = 0.0
    """Share of a step's images that are decoded from their first scales alone, evenly from 1 to all but one."""
    gradient_checkpointing: bool = False
    """Keep the input of every residual block alone and compute the rest again in the backward pass."""
    torch_compile: bool = False
    """Compile residual and attention blocks at the first step."""

    def __post_init__(self):
        for name in ("eval_batch_size", "num_pictures", "num_init_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.scale_dropout <= 1:
            raise ValueError(f"scale_dropout is {self.scale_dropout}; expected a number in [0, 1]")
        has_blocks = self.model.autoencoder != "simple" or self.model.num_res_blocks > 0
        for name in ("gradient_checkpointing", "torch_compile"):
            if getattr(self, name) and not has_blocks:
                raise ValueError(f"{name} is True; expected False with model.num_res_blocks 0: it works on such blocks")


class TokenizerTask:
    """What one step, one evaluation and the export of tokenizer training are.

    Args:
        accelerator: prepares models and optimizers.
        config: the run.
        model: the tokenizer to train.
        train_data: images with augmentation.
        eval_data: held-out images without, or None.
        perceptual: the perceptual term, or None.

    Raises:
        ValueError: if `loop.keep_best` is no figure of its evaluations.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TokenizerTrainConfig,
        model: VQVAE,
        train_data: Dataset,
        eval_data: Dataset | None,
        perceptual: nn.Module | None = None,
    ):
        config.loop.check_keep_best([] if eval_data is None else _figures(model))
        self.accelerator = accelerator
        self.config = config
        self.train_data = train_data
        self.eval_data = eval_data
        self.perceptual = perceptual if perceptual is None else perceptual.to(accelerator.device)
        model = _laid_out(model, accelerator.device)
        optimizer = build_optimizer(model, config.optimizer, model.no_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.modules, self.optimizers = [self.model], [self.optimizer]
        num_tokens = [config.loop.batch_size * length for length in model.layout.block_lengths]
        self.code_usage = CodeUsage(num_codes=model.quantizer.num_codes, num_tokens=num_tokens)
        self.adversary, self.records = None, {}
        if config.discriminator.weight > 0:
            options = config.discriminator
            discriminator = build_discriminator(options, model.config.num_channels, model.config.image_size)
            discriminator = _laid_out(discriminator.to(model.dtype), accelerator.device)
            discriminator_optimizer = build_optimizer(discriminator, options.optimizer)
            self.discriminator, self.discriminator_optimizer = accelerator.prepare(
                discriminator, discriminator_optimizer
            )
            self.modules.append(self.discriminator)
            self.optimizers.append(self.discriminator_optimizer)
            self.adversary = Adversary(accelerator, self.discriminator, options)
            self.records["discriminator_averages"] = self.adversary.averages

    def start(self) -> None:
        """Set the codes to features of training images, where the configuration says so."""
        model = self.accelerator.unwrap_model(self.model)
        if model.config.codebook_init != "data":
            return
        num_samples, seed = len(self.train_data), self.config.loop.seed
        order = keyed_uniform(seed, samples=torch.arange(num_samples)).argsort()
        chosen = order[: self.config.num_init_images].tolist()
        # Dropout would make the codes depend on which process encodes an image.
        model.eval()
        model.quantizer.start_from(self._features(model, chosen), seed)
        model.train()

    @torch.no_grad()
    def _features(self, model: VQVAE, indices: list[int]) -> Tensor:
        """Encode training images, each process its share of them, and give all features to every process."""
        size, (rank, num_processes) = model.num_encoded_at_once, rank_and_world_size()
        shape = (len(indices), model.config.embedding_dim, *model.layout.grid)
        features = torch.zeros(shape, device=self.accelerator.device)
        # Batches are the same however many processes there are, and so is how their features are rounded.
        for start in range(rank * size, len(indices), num_processes * size):
            batch = collate([self.train_data[(0, index)] for index in indices[start : start + size]])
            features[start : start + size] = model.encode(batch["pixel_values"].to(self.accelerator.device))
        return all_reduced(features)

    def train_step(self, micro_batches: list[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        """Take one step of the tokenizer, then one of the discriminator; then let the codebook follow."""
        reconstructions, metrics, was_skipped = self._step_tokenizer(micro_batches, step)
        # fp16's one loss scale changes after each optimizer step: all of a model's passes lie between two of them.
        if self.adversary is not None and self.adversary.is_training_at(step):
            metrics |= self._step_discriminator(micro_batches, reconstructions, step)
        model = self.accelerator.unwrap_model(self.model)
        model.update_codebook(self.config.loop.seed, step, was_skipped=was_skipped)
        return metrics

    def _step_tokenizer(
        self, micro_batches: list[dict[str, Tensor]], step: int
    ) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        """Take one optimizer step of the tokenizer; return its reconstructions and whether fp16 skipped it too."""
        config, accelerator, n = self.config, self.accelerator, len(micro_batches)
        loop = config.loop
        learning_rate = set_schedules(self.optimizer, step, loop.num_steps, loop.batch_size, config.optimizer)
        metrics: dict[str, Tensor] = {}
        reconstructions, counts = [], 0
        for i, batch in enumerate(micro_batches):
            with accelerator.no_sync(self.model) if i < n - 1 else nullcontext():
                output = self.model(batch["pixel_values"], return_loss=False, **self._fewer_scales(batch, step))
                losses = self._losses(output, batch["pixel_values"], step)
                accelerator.backward(losses["loss"] / n)
            reconstructions.append(output.reconstruction.detach())
            counts = counts + output.statistics["code_counts"]
            _add_mean(metrics, losses, n)
        if config.optimizer.max_grad_norm is not None:
            metrics["grad_norm"] = accelerator.clip_grad_norm_(
                self.model.parameters(), config.optimizer.max_grad_norm
            )
        was_skipped = self._take_step()
        curves = codebook_curves(counts, accelerator.unwrap_model(self.model).quantizer.digits)
        metrics |= {f"codebook/{name}": value for name, value in curves.items()}
        return reconstructions, metrics | {"learning_rate": learning_rate}, was_skipped

    def _fewer_scales(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return the model's option by which some images of a batch are decoded from fewer scales; none without."""
        rate, K = self.config.scale_dropout, len(self.config.model.scales or ())
        if rate == 0:
            return {}
        num_scales = drawn_num_scales(rate, K, self.config.loop.seed, step, samples=batch["index"])
        return {"num_scales": num_scales.to(batch["pixel_values"].device)}

    def _take_step(self) -> Tensor | None:
        """Step the tokenizer's optimizer; return whether fp16's loss scaler skipped the step, None without one."""
        scaler = self.accelerator.scaler
        # A skipped step lowers the scale. A fused optimizer skips on the device, so its step_was_skipped is never True,
        # and the public get_scale waits for the device.
        scale = None if scaler is None else scaler._get_scale_async().clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return None if scaler is None else scaler._get_scale_async() < scale

    def _losses(self, output: VQVAEOutput, pixel_values: Tensor, step: int) -> dict[str, Tensor]:
        """Compute every term of the tokenizer's loss, and as `loss` what it minimises."""
        config, reconstruction = self.config, output.reconstruction
        model = self.accelerator.unwrap_model(self.model)
        losses = tokenizer_losses(reconstruction, pixel_values, output.vq_loss, config.loss)
        compared = reconstruction_loss(losses, config.loss)
        if self.perceptual is not None:
            with self.accelerator.autocast():
                losses["perceptual"] = self.perceptual(reconstruction, pixel_values)
            perceptual = config.perceptual.weight * losses["perceptual"]
            compared, losses["loss"] = compared + perceptual, losses["loss"] + perceptual
        if config.loss.entropy_weight > 0:
            options = (config.loss.entropy_temperature, config.loss.entropy_diversity)
            losses["entropy"] = assignment_entropy(model.quantizer, output.features, *options)
            losses["loss"] = losses["loss"] + config.loss.entropy_weight * losses["entropy"]
        if self.adversary is not None:
            weight = last_weight(model.decoder)
            adversarial, terms = self.adversary.generator_terms(reconstruction, compared, weight, step)
            losses |= terms | {"loss": losses["loss"] + adversarial}
        return losses

    def _step_discriminator(
        self, micro_batches: list[dict[str, Tensor]], reconstructions: list[Tensor], step: int
    ) -> dict[str, Tensor]:
        """Take one optimizer step of the discriminator on the step's images and their reconstructions."""
        config, accelerator, n = self.config.discriminator, self.accelerator, len(micro_batches)
        loop, start = self.config.loop, config.start_step
        learning_rate = set_schedules(
            self.discriminator_optimizer, step - start, loop.num_steps - start, loop.batch_size, config.optimizer
        )
        metrics: dict[str, Tensor] = {}
        for i, (batch, reconstruction) in enumerate(zip(micro_batches, reconstructions, strict=True)):
            with accelerator.no_sync(self.discriminator) if i < n - 1 else nullcontext():
                losses = self.adversary.discriminator_losses(batch["pixel_values"], reconstruction, step)
                accelerator.backward(losses["loss"] / n)
            _add_mean(metrics, losses, n)
        if config.optimizer.max_grad_norm is not None:
            metrics["grad_norm"] = accelerator.clip_grad_norm_(
                self.discriminator.parameters(), config.optimizer.max_grad_norm
            )
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        self.adversary.update_averages(metrics["real"], metrics["fake"])
        metrics["learning_rate"] = learning_rate
        return {f"discriminator/{name}": value for name, value in metrics.items()}

    def evaluate(self, model: VQVAE) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Measure reconstruction and codebook use on the held-out images and draw some of them."""
        if self.eval_data is None:
            return {}, {}
        accelerator, V = self.accelerator, model.quantizer.num_codes
        mine = range(accelerator.process_index, len(self.eval_data), accelerator.num_processes)
        lengths, digits = model.layout.block_lengths, model.quantizer.digits
        counts = code_counts(torch.empty(0, sum(lengths), dtype=torch.int64, device=accelerator.device), lengths, V)
        total_psnr = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        loader = DataLoader(
            Subset(self.eval_data, mine), batch_size=self.config.eval_batch_size, collate_fn=collate
        )
        for batch in loader:
            pixel_values = batch["pixel_values"].to(accelerator.device)
            idx_BL = model.img_to_idx(pixel_values)
            counts = counts + code_counts(idx_BL, lengths, V)
            total_psnr += psnr(model.idx_to_img(idx_BL).float(), pixel_values).sum()
        counts, total_psnr = _over_processes(accelerator, counts), accelerator.reduce(total_psnr)
        metrics = {"psnr": total_psnr.item() / len(self.eval_data)}
        metrics |= {f"codebook/{name}": value.item() for name, value in codebook_curves(counts, digits).items()}
        return metrics, {"reconstructions": self._draw(model)}

    def _draw(self, model: VQVAE) -> Image.Image:
        """Draw held-out images above their reconstructions."""
        num_shown = min(self.config.num_pictures, len(self.eval_data))
        # From all over the data, which often come class by class.
        shown = [index * len(self.eval_data) // num_shown for index in range(num_shown)]
        batch = collate([self.eval_data[index] for index in shown])
        pixel_values = batch["pixel_values"].to(self.accelerator.device)
        images = model.idx_to_img(model.img_to_idx(pixel_values))
        return comparison_grid(to_uint8(pixel_values), to_uint8(images), num_columns=10)

    def export(self, model: VQVAE, metrics: dict[str, float]) -> Path:
        """Save the tokenizer."""
        model.save_pretrained(self.config.output_dir)
        return Path(self.config.output_dir)


def _figures(model: VQVAE) -> list[str]:
    """Name the figures of an evaluation."""
    digits = model.quantizer.digits
    return ["psnr", *(f"codebook/{name}" for name in codebook_curves(torch.zeros(model.layout.num_blocks, 1), digits))]


def _over_processes(accelerator: Accelerator, counts: Tensor | SparseCounts) -> Tensor | SparseCounts:
    """Add up what all processes have counted."""
    if isinstance(counts, SparseCounts):
        return sum(gather_object([counts.compacted().cpu()]))
    return accelerator.reduce(counts)


def _laid_out(module: nn.Module, device: torch.device) -> nn.Module:
    """Lay convolutions out as a device is fastest with: on a GPU channels last; a CPU gains nothing from it."""
    return module.to(memory_format=torch.channels_last) if device.type == "cuda" else module


def _add_mean(metrics: dict[str, Tensor], losses: dict[str, Tensor], num_micro_batches: int) -> None:
    """Add a micro-batch's share of the step's mean losses."""
    for name, value in losses.items():
        metrics[name] = metrics.get(name, 0) + value.detach() / num_micro_batches


def with_initial_tokenizer(config: TokenizerTrainConfig) -> TokenizerTrainConfig:
    """Take the architecture of the tokenizer that a run starts from, if it starts from one.

    Args:
        config: the run.

    Raises:
        ValueError: if the given options are not that tokenizer's.
    """
    init_from = config.loop.init_from
    if init_from is None:
        return config
    return replace(config, model=with_initial_architecture(config.model, VQVAEConfig, init_from, TUNED_OPTIONS))


def build_tokenizer(config: TokenizerTrainConfig) -> VQVAE:
    """Make the untrained tokenizer of a run.

    Args:
        config: the run.

    Returns:
        The tokenizer, with gradient checkpointing and compilation where the run asks for them.

    Raises:
        ValueError: if the options do not go together, or ask for more than this machine's memory.
    """
    model_config = VQVAEConfig(**asdict(config.model))
    if config.scale_dropout > 0 and len(model_config.scales or ()) < 2:
        raise ValueError(f"scale_dropout is {config.scale_dropout}; expected 0 without two scales or more")
    check_memory(VQVAE, model_config)
    model = VQVAE(model_config)
    if config.gradient_checkpointing:
        with warnings.catch_warnings():
            # Newer versions of transformers have another name for it, which the older ones supported here lack.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.torch_compile:
        # Block by block: blocks of one shape share their code, and the decoder's last convolution stays outside, whose
        # gradient the adversarial term takes before the backward pass. In place: names of weights stay what they are.
        for module in model.modules():
            if isinstance(module, (ResidualBlock, SpatialAttention)):
                module.compile()
    return model
