"""The pipeline: class labels to blocks of indices to images, on the `diffusers` surface.

Legend: B images, K blocks, L_k tokens of block k, H×W pixels.
"""

import difflib
from collections.abc import Sequence

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from huggingface_hub import snapshot_download
from torch import Generator, Tensor
from transformers import PreTrainedModel

# diffusers loads a saved pipeline's components only from modules that are imported.
import nextblock.prior
import nextblock.tokenizer  # noqa: F401
from nextblock.data.blocks import BlockLayout
from nextblock.prior.sampling import image_generators

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Without a batch_size, more images than this are sampled in several batches.
MAX_BATCH_SIZE = 64


class ClassToImagePipeline(DiffusionPipeline):
    """Sample images of given classes.

    Args:
        tokenizer: a `VQVAE`.
        prior: a `BlockPrior` over that tokenizer's indices.
    """

    model_cpu_offload_seq = "prior->tokenizer"

    def __init__(self, tokenizer: PreTrainedModel, prior: PreTrainedModel):
        super().__init__()
        if tokenizer is not None and prior is not None:
            prior.check_quantizer(tokenizer.quantizer)
        self.register_modules(tokenizer=tokenizer, prior=prior)
        self.image_processor = VaeImageProcessor(do_convert_rgb=True)
        self.mask_processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Fetch a pipeline's configuration and safetensors from the hub.

        Args:
            pretrained_model_name: the repository.
            kwargs: `cache_dir`, `revision`, `token`, `force_download` and `local_files_only`; others concern the
                loading that follows.

        Returns:
            The local folder.
        """
        names = ("cache_dir", "revision", "token", "force_download", "local_files_only")
        return snapshot_download(
            pretrained_model_name,
            allow_patterns=["*.json", "*.safetensors", "README.md"],
            **{name: kwargs[name] for name in names if kwargs.get(name) is not None},
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generator | list[Generator] | None = None,
        idx_Bl: list[Tensor] | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            class_labels: classes by number or name, one or several; None for an unconditional model.
            num_images_per_label: images of each label, or of an unconditional model.
            guidance_scale: s in logits = uncond + s·(cond − uncond); 1 is no guidance.
            guidance_schedule: "constant", or "linear" from 1 at the first block to `guidance_scale` at the last.
            temperature: divides the logits, above 0.
            top_k: keep the k likeliest codes; 0 keeps all.
            top_p: keep the smallest set of codes whose mass reaches p, in (0, 1].
            generator: one for all images, or a list with one for each. Every image draws from a generator of its own,
                so it does not depend on the others.
            idx_Bl: tokens that are already known, K tensors (B, L_k) int64 over all images, −1 for those to sample.
            batch_size: every batch has exactly this many rows, the last padded, so that rounding does not depend on the
                size of the request; None takes up to 64 at a time. In float32 on the CPU all choices give equal images.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or "latent" for the indices, K tensors
                (B, L_k).
            return_dict: False returns a tuple.

        Returns:
            An `ImagePipelineOutput` whose `images` hold all images of the first label, then of the second, and so on.

        Raises:
            ValueError: if an argument is outside its range or a class name is unknown.
        """
        _check_request(num_images_per_label, batch_size, output_type)
        labels = [label for label in self.resolve_labels(class_labels) for _ in range(num_images_per_label)]
        generators = image_generators(generator, len(labels))
        if idx_Bl is not None:
            self.prior.check_given(idx_Bl, len(labels))
        options = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        num_rows, num_padded = self._batch_rows(len(labels), batch_size)
        images = idx_Bl = self._sample(labels, generators, idx_Bl, num_rows, num_padded, options)
        if output_type != "latent":
            images = self._decode(idx_Bl, num_rows, num_padded, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def inpaint(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_label: int = 1,
        **options,
    ) -> ImagePipelineOutput | tuple:
        """Paint part of an image anew: in-painting, out-painting and class-conditional editing by a token mask (VAR).

        In every block, tokens outside the mask come from the encoded image and tokens inside from the prior. A token is
        inside if at least half of its area is.

        Args:
            image: one image, or one for each label; PIL, array or tensor, resized to the tokenizer's size.
            mask_image: one mask, or one for each image; white is painted anew, black is kept.
            class_labels: see `__call__`.
            num_images_per_label: see `__call__`.
            options: further arguments of `__call__`.

        Returns:
            As `__call__`.

        Raises:
            ValueError: if images, masks and labels do not fit each other, or an option is outside its range.
        """
        H, W = self.tokenizer.config.image_size
        pixel_values = self.image_processor.preprocess(image, H, W).to(self._execution_device)
        mask = self.mask_processor.preprocess(mask_image, H, W).to(self._execution_device)
        num_labels = len(self.resolve_labels(class_labels))
        for name, tensor in {"image": pixel_values, "mask_image": mask}.items():
            if len(tensor) not in (1, num_labels):
                raise ValueError(f"{name} holds {len(tensor)} images; expected 1 or {num_labels}, one a label")
        idx_Bl = self.tokenizer.img_to_idxBl(pixel_values)
        is_inside_Bl = mask_blocks(self.tokenizer.layout, mask)
        given = []
        for idx, is_inside in zip(idx_Bl, is_inside_Bl, strict=True):
            block = torch.where(is_inside, -1, idx).expand(num_labels, -1)
            given.append(block.repeat_interleave(num_images_per_label, dim=0))
        return self(class_labels, num_images_per_label, idx_Bl=given, **options)

    def resolve_labels(self, class_labels: int | str | Sequence[int | str] | Tensor | None) -> list[int]:
        """Turn labels and class names into label numbers.

        Args:
            class_labels: see `__call__`. A name counts in any case; part of a name does where only one class has it.

        Returns:
            Label numbers; the null class alone for an unconditional model.

        Raises:
            ValueError: naming the label that is none.
        """
        num_classes = self.prior.config.num_classes
        if num_classes == 0:
            if class_labels is not None:
                raise ValueError(f"class_labels is {class_labels!r}; expected None for an unconditional model")
            return [self.prior.config.null_class]
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        if not isinstance(class_labels, Sequence) or not class_labels:
            raise ValueError(f"class_labels is {class_labels!r}; expected a label, a class name, or a list of them")
        return [self._label_number(label) for label in class_labels]

    def _label_number(self, label: int | str) -> int:
        """Turn one label or class name into a label number."""
        num_classes, names = self.prior.config.num_classes, self.prior.config.class_names
        if type(label) is int:
            if not 0 <= label < num_classes:
                raise ValueError(f"class_labels holds {label}; expected 0 to {num_classes - 1}")
            return label
        if not isinstance(label, str):
            raise ValueError(f"class_labels holds {label!r}; expected integers and class names")
        if names is None:
            raise ValueError(f"class_labels holds {label!r}, but the prior has no class names; expected integers")
        wanted, folded = label.strip().casefold(), [name.casefold() for name in names]
        # ImageNet has a "Cardigan" that is a dog and a "cardigan" that is not.
        matches = [n for n, name in enumerate(names) if name == label.strip()]
        matches = matches or [n for n, name in enumerate(folded) if name == wanted]
        matches = matches or [n for n, name in enumerate(folded) if wanted and wanted in name]
        if len(matches) != 1:
            near = [names[n] for n in matches[:5]] or difflib.get_close_matches(wanted, folded, n=5, cutoff=0.0)
            found = f"{len(matches)} classes" if matches else "no class"
            raise ValueError(f"class_labels holds {label!r}, which names {found}; did you mean one of {near}?")
        return matches[0]

    def _batch_rows(self, num_images: int, batch_size: int | None) -> tuple[int, int]:
        """Return images a batch, and the rows that a batch is padded to."""
        num_rows = min(num_images, MAX_BATCH_SIZE) if batch_size is None else batch_size
        if self._execution_device.type == "cpu" and self.prior.dtype == torch.float32:
            # From four rows on, a CPU's float32 matrix products round alike for every number of rows.
            return num_rows, -(-num_rows // 4) * 4
        return num_rows, num_rows

    def _sample(
        self,
        labels: list[int],
        generators: list[Generator],
        given_idx_Bl: list[Tensor] | None,
        num_rows: int,
        num_padded: int,
        options: dict,
    ) -> list[Tensor]:
        """Sample the indices of all images in batches of one size; padded rows are computed and dropped."""
        # The prior calls the quantizer while an offloaded tokenizer waits on the CPU.
        quantizer = self.tokenizer.quantizer.to(self._execution_device)
        class_labels, batches = torch.tensor(labels, device=self._execution_device), []
        for start in self.progress_bar(range(0, len(labels), num_rows)):
            rows = slice(start, start + num_rows)
            own = generators[rows]
            idx_Bl = self.prior.generate(
                _padded(class_labels[rows], num_padded),
                quantizer,
                generator=own + [torch.Generator().manual_seed(0) for _ in range(num_padded - len(own))],
                given_idx_Bl=given_idx_Bl and [_padded(idx[rows], num_padded) for idx in given_idx_Bl],
                **options,
            )
            batches.append([idx[: len(own)] for idx in idx_Bl])
        return [torch.cat(blocks) for blocks in zip(*batches, strict=True)]

    def _decode(self, idx_Bl: list[Tensor], num_rows: int, num_padded: int, output_type: str):
        """Decode indices in batches of the size they were sampled in."""
        images = []
        for blocks in zip(*(idx.split(num_rows) for idx in idx_Bl), strict=True):
            decoded = self.tokenizer.idxBl_to_img([_padded(idx, num_padded) for idx in blocks])
            images.append(decoded[: len(blocks[0])].float())
        return self.image_processor.postprocess(torch.cat(images), output_type=output_type)


def mask_blocks(layout: BlockLayout, mask: Tensor) -> list[Tensor]:
    """Tell which tokens of each block lie inside a mask.

    Args:
        layout: the blocks.
        mask: (B, 1, H, W) in [0, 1]; 1 is inside.

    Returns:
        K boolean tensors (B, L_k), true where at least half of the token's area is inside.
    """
    if not layout.is_scales:
        cells = F.interpolate(mask, size=layout.grid, mode="area").flatten(1)
        return layout.split(cells[:, layout.tile_cells.to(cells.device)] >= 0.5)
    return [F.interpolate(mask, size=shape, mode="area").flatten(1) >= 0.5 for shape in layout.shapes]


def _padded(rows: Tensor, num_padded: int) -> Tensor:
    """Repeat the first row at the end, up to a number of rows."""
    return torch.cat([rows, rows[:1].expand(num_padded - len(rows), *rows.shape[1:])])


def _check_request(num_images_per_label: int, batch_size: int | None, output_type: str) -> None:
    """Refuse counts and output types that are none."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; expected one of {list(OUTPUT_TYPES)}")
    for name, value in {"num_images_per_label": num_images_per_label, "batch_size": batch_size}.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; expected a positive integer")


# `DiffusionPipeline.from_pretrained` finds the class that a saved pipeline names among diffusers' own attributes.
diffusers.ClassToImagePipeline = ClassToImagePipeline
