"""Train a prior on token shards: `accelerate launch -m nextblock.prior.train --config prior/digits-scales …`."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedModel

from nextblock.data.tokens import TokenDataset, TokenManifest, collate_tokens
from nextblock.evaluation.pictures import class_grid, to_uint8
from nextblock.training.config import options_dataclass, parse_run_config, save_run_config
from nextblock.training.keyed_random import drop_class_labels
from nextblock.training.loop import LoopConfig, build_accelerator, fit
from nextblock.training.optim import OptimizerConfig, build_optimizer, set_schedules

from .configuration_block_prior import BlockPriorConfig
from .modeling_block_prior import BlockPrior, PriorOutput
from .sampling import guidance_scales

# What the tokens decide is no option of the run.
BlockPriorOptions = options_dataclass(
    BlockPriorConfig, exclude=["layout", "vocab_size", "embedding_dim", "num_classes", "class_names"]
)
# As in VAR; matrices among them would be decayed otherwise.
NO_DECAY = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul_1H11")
# Past this many blocks, a curve a block is no picture of anything.
MAX_LOGGED_BLOCKS = 16


@dataclass(kw_only=True)
class PriorTrainConfig:
    """Train a prior on the shards of a tokenization job and export a pipeline."""

    tokens: str
    """Folder of token shards."""
    tokenizer: str
    """Folder of the tokenizer that made them."""
    output_dir: str
    """Folder of the run."""
    pipeline_dir: str
    """Folder that the trained pipeline is saved in."""
    model: BlockPriorOptions = field(default_factory=BlockPriorOptions)
    """The prior's architecture."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length, precision, cadence."""
    class_dropout: float = 0.1
    """Share of labels replaced by the null class, which guidance needs."""
    eval_batch_size: int = 128
    """Held-out rows predicted at a time by each process."""
    num_pictures_per_class: int = 4
    """Samples drawn of each class at an evaluation, of at most ten classes."""
    guidance_scale: float = 1.25
    """Guidance of those samples."""
    guidance_schedule: Literal["constant", "linear"] = "constant"
    """Guidance schedule of those samples."""

    def __post_init__(self):
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout is {self.class_dropout}; expected a number in [0, 1]")
        for name in ("eval_batch_size", "num_pictures_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        guidance_scales(self.guidance_scale, self.guidance_schedule, num_blocks=2)


class PriorTask:
    """What one step, one evaluation and the export of prior training are.

    Args:
        accelerator: prepares model and optimizer.
        config: the run.
        model: the prior to train.
        tokenizer: frozen; turns indices into the prior's input and samples into pictures.
        eval_data: held-out rows, or None.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: PriorTrainConfig,
        model: BlockPrior,
        tokenizer: PreTrainedModel,
        eval_data: TokenDataset | None,
    ):
        self.accelerator = accelerator
        self.config = config
        self.tokenizer = tokenizer.to(accelerator.device)
        self.eval_data = eval_data
        self.layout = model.layout
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(model, config.optimizer, NO_DECAY))

    def start(self) -> None:
        """Nothing comes before step 0."""

    def train_step(self, micro_batches: list[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        """Take one optimizer step."""
        config, accelerator, n = self.config, self.accelerator, len(micro_batches)
        loop = config.loop
        learning_rate = set_schedules(self.optimizer, step, loop.num_steps, loop.batch_size, config.optimizer)
        metrics: dict[str, Tensor] = {}
        for i, batch in enumerate(micro_batches):
            null_class = accelerator.unwrap_model(self.model).config.null_class
            class_labels = drop_class_labels(
                batch["class_labels"], null_class, config.class_dropout, config.loop.seed, step, samples=batch["index"]
            )
            with accelerator.no_sync(self.model) if i < n - 1 else nullcontext():
                output = self._predict(self.model, batch["labels"], class_labels)
                accelerator.backward(output.loss / n)
            for name, value in self._metrics(output).items():
                metrics[name] = metrics.get(name, 0) + value.detach() / n
        if config.optimizer.max_grad_norm is not None:
            metrics["grad_norm"] = accelerator.clip_grad_norm_(
                self.model.parameters(), config.optimizer.max_grad_norm
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics | {"learning_rate": learning_rate}

    def _predict(self, model, labels: Tensor, class_labels: Tensor) -> PriorOutput:
        """Run the prior under teacher forcing on indices (B, L)."""
        takes_indices = self.accelerator.unwrap_model(model).config.input_embedding == "tokens"
        var_input = self.tokenizer.idxBl_to_var_input(self.layout.split(labels), as_indices=takes_indices)
        return model(var_input, class_labels, labels)

    def _metrics(self, output: PriorOutput) -> dict[str, Tensor]:
        """Average loss and accuracy over all tokens, and over each block where blocks are few."""
        is_correct = output.token_correct.float()
        metrics = {"loss": output.loss, "accuracy": is_correct.mean()}
        if self.layout.num_blocks <= MAX_LOGGED_BLOCKS:
            blocks = zip(self.layout.split(output.token_loss), self.layout.split(is_correct), strict=True)
            for k, (token_loss, correct) in enumerate(blocks):
                metrics |= {f"block_{k}/loss": token_loss.mean(), f"block_{k}/accuracy": correct.mean()}
        return metrics

    def evaluate(self, model: BlockPrior) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Measure the held-out loss without label smoothing and draw samples with fixed seeds."""
        pictures = {"samples": self._draw(model)}
        if self.eval_data is None:
            return {}, pictures
        accelerator = self.accelerator
        mine = range(accelerator.process_index, len(self.eval_data), accelerator.num_processes)
        sums: dict[str, Tensor] = {}
        # A process without a row of its own computes one that does not count, to have the same sums as the others.
        batches = BatchSampler(mine or range(1), self.config.eval_batch_size, drop_last=False)
        for batch in DataLoader(self.eval_data, batch_sampler=batches, collate_fn=collate_tokens):
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            output = self._predict(model, batch["labels"], batch["class_labels"])
            metrics = self._metrics(output) | {"loss": output.token_loss.mean()}
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value.double() * (len(batch["labels"]) if mine else 0)
        totals = accelerator.reduce(torch.stack(list(sums.values()))) / len(self.eval_data)
        return dict(zip(sums, totals.tolist(), strict=True)), pictures

    def _draw(self, model: BlockPrior) -> Image.Image:
        """Draw samples of the first classes, a row each; an unconditional model fills one row."""
        num_columns = self.config.num_pictures_per_class
        classes = torch.arange(min(model.config.num_classes, 10)) if model.config.num_classes else torch.zeros(1)
        class_labels = classes.long().repeat_interleave(num_columns)
        idx_Bl = model.generate(
            class_labels,
            self.tokenizer.quantizer,
            guidance_scale=self.config.guidance_scale if model.config.num_classes else 1.0,
            guidance_schedule=self.config.guidance_schedule,
            generator=torch.Generator().manual_seed(self.config.loop.seed),
        )
        images = to_uint8(self.tokenizer.idxBl_to_img(idx_Bl))
        return class_grid(images, class_labels.numpy(), num_columns=num_columns)

    def export(self, model: BlockPrior, metrics: dict[str, float]) -> None:
        """Save prior and tokenizer together as a pipeline."""
        from nextblock.pipelines import ClassToImagePipeline

        pipeline = ClassToImagePipeline(tokenizer=self.tokenizer, prior=model)
        pipeline.save_pretrained(self.config.pipeline_dir)


def train(config: PriorTrainConfig) -> None:
    """Train a prior and save a pipeline in `config.pipeline_dir`.

    Args:
        config: the run.

    Raises:
        ValueError: if the configuration or the tokens do not fit, or another tokenizer made the tokens.
    """
    from nextblock.tokenizer import VQVAE

    output_dir = Path(config.output_dir)
    tokenizer = VQVAE.from_pretrained(config.tokenizer, dtype=torch.float32).eval().requires_grad_(False)
    manifest = TokenManifest.load(Path(config.tokens))
    manifest.check_tokenizer(tokenizer, Path(config.tokens))
    train_data, eval_name = TokenDataset(config.tokens, manifest.data["split"]), manifest.data["eval_split"]
    eval_data = None if eval_name is None else TokenDataset(config.tokens, eval_name)
    model_config = BlockPriorConfig(
        layout=manifest.layout,
        vocab_size=manifest.vocab_size,
        embedding_dim=manifest.embedding_dim,
        num_classes=len(manifest.class_names),
        class_names=manifest.class_names or None,
        **asdict(config.model),
    )
    accelerator = build_accelerator(config.loop, output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        save_run_config(config, output_dir / "config.yaml")
    task = PriorTask(accelerator, config, BlockPrior(model_config), tokenizer, eval_data)
    fit(accelerator, task, train_data, collate_tokens, config.loop, output_dir)


def main() -> None:
    """Read the command line and train."""
    train(parse_run_config(PriorTrainConfig, prog="python -m nextblock.prior.train"))


if __name__ == "__main__":
    main()
