"""What a family of priors offers: the protocol that generation, training and pipelines touch, and nothing else of it.

Legend: B images, R rows (conditional, then unconditional), K blocks, L_k tokens of block k, L all tokens, P positions
before the first token, V codes, S scores of a token, n digits of a code, C code channels, D width.
"""

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from nextblock.data.blocks import BlockLayout
from nextblock.data.code_digits import CodeDigits
from nextblock.data.given import check_offers

from .conditioning import Condition, Conditions, Context
from .head_plan import HeadPlan, plan_of
from .losses import PriorOutput
from .orders import takes_orders
from .step_graphs import StepStack

QUANTIZER_PARTS = ("layout", "num_codes", "dim", "start", "advance", "lookup", "check_finite")
PRIOR_PARTS = (
    *("layout", "vocab_size", "embedding_dim", "conditions", "takes_indices", "device"),
    *("context", "new_cache", "decode_block", "logits"),
)


class Prior(Protocol):
    """A `StoredModel` that predicts an image's tokens block by block.

    Sampling calls `context` once, then for each block `decode_block` and `logits`; training calls the model.
    """

    layout: BlockLayout
    """The blocks predicted."""
    vocab_size: int
    """V."""
    head_plan: HeadPlan
    """What is predicted of a token, and in which passes; a family that has none predicts by one softmax over V."""
    embedding_dim: int
    """C, where code vectors are taken."""
    conditions: Conditions
    """What the prior can be conditioned on."""
    takes_indices: bool
    """Whether `var_input` and a block's content are indices and not code vectors."""
    can_chunk_loss: ClassVar[bool]
    """Whether `forward` takes `loss_chunk_size`."""
    takes_orders: ClassVar[bool]
    """Whether the call and `context` take `orders`: single tokens, predicted in any order. Need not be there."""
    no_decay: ClassVar[tuple[str, ...]]
    """Names of matrices and tables that weight decay leaves alone, or of modules they lie in."""
    _no_split_modules: ClassVar[list[str]]
    """Classes of the layers: what is sharded as one, and compiled as one unless `step_modules` names others."""

    def __call__(
        self, var_input: Tensor, condition: Tensor | Condition, /, labels: Tensor | None = None, **options: Any
    ) -> PriorOutput:
        """Predict all blocks under teacher forcing.

        Args:
            var_input: (B, L − L_1, C), or (B, L − L_1) int64 where `takes_indices`.
            condition: what `conditions.of` reads.
            labels: (B, L) int64 indices to predict, in block order; gives the loss.
            options: `loss_chunk_size`, tokens whose logits exist at a time, where `can_chunk_loss`; `orders` where
                `takes_orders`, (B, L) int64, see `orders`: var_input, labels and what is returned stay in block order;
                `known_digits` (B, L, n) bool where `head_plan.is_masked`, the digits shown while learning; a family's
                own.

        Returns:
            A `PriorOutput`; see `losses.prior_output`.
        """

    def context(self, condition: Condition) -> Context:
        """Compute all that depends on the condition alone, R rows, once for all blocks.

        Where `takes_orders`, `orders` (R, L) comes with it unless it is block order; block k is then the k-th token.
        """

    def new_cache(self, num_rows: int) -> Any:
        """Allocate what `decode_block` keeps of a request: P + L positions, written where they lie."""

    def decode_block(self, content: Tensor | None, k: int, context: Context, cache: Any) -> Tensor:
        """Run block k, which sees all blocks before it through the cache.

        The family makes the block's input of what the block before held and of where this one lies.

        Args:
            content: None for the first block; then the indices of the block before, (B, L_{k−1}), where
                `takes_indices`, else this block's vectors (B, L_k, C) from `quantizer.advance`. The R rows of the
                context share it: R is B or a multiple.
            k: block number, from 0.
            context: from `context`, or its first rows; never more rows than for the block before.
            cache: from `new_cache`, with the blocks before k.

        Returns:
            (R, L_k, D).
        """

    def logits(self, hidden_states: Tensor, context: Context, digits: Tensor | None = None) -> Tensor:
        """Return scores of all codes, or of all digits side by side, at least float32.

        Args:
            hidden_states: (R, L_k, D).
            context: of the R rows.
            digits: (R, L_k, n) int64, those that are known of each token and −1 for the others; given only where
                `head_plan` has more than one pass, and None before the first.

        Returns:
            (R, L_k, S): S = V for one softmax; else the scores of digit i are the columns after those of the digits
            before it, as many as its base. They are not normalised.
        """


def check_prior(prior: Prior) -> None:
    """Refuse what is no prior of any family, by what it offers; nothing is computed.

    Args:
        prior: of any family, if it is one.

    Raises:
        ValueError: naming what it lacks, or the attribute that is of the wrong kind.
    """
    check_offers("prior", prior, PRIOR_PARTS, "a BlockPrior, or a prior of another family")
    check_offers("prior.conditions", prior.conditions, ("has_null", "of", "from_batch"), "what the prior takes")
    for field, kind in {"layout": BlockLayout, "takes_indices": bool, "vocab_size": int, "embedding_dim": int}.items():
        if type(getattr(prior, field)) is not kind:
            raise ValueError(f"prior.{field} is {getattr(prior, field)!r:.80}; expected a {kind.__name__}")
    plan = plan_of(prior)
    if not isinstance(plan, HeadPlan) or plan.digits.num_codes != prior.vocab_size:
        raise ValueError(f"prior.head_plan is {plan!r:.80}; expected a HeadPlan of {prior.vocab_size} codes")
    if prior.takes_indices and prior.layout.is_scales:
        raise ValueError("prior.takes_indices is True; expected False for a scale layout, whose input is no code")
    if takes_orders(prior) and not (prior.takes_indices and prior.layout.is_single_tokens):
        raise ValueError("prior.takes_orders is True; expected False unless it takes indices of tiles of one cell")


@torch.no_grad()
def try_out(prior: Prior) -> None:
    """Run one image of a class through the first two blocks, and refuse a family that gives other tensors than it must.

    Args:
        prior: of any family, where its weights are; neither it nor any random state is changed.

    Raises:
        ValueError: naming the method and what it gave.
    """
    check_prior(prior)
    lengths, device, was_training = prior.layout.block_lengths, prior.device, prior.training
    prior.eval()
    context, content = prior.context(prior.conditions.example().to(device)), None
    check_context(context, 1)
    cache = prior.new_cache(1)
    for k in range(min(2, len(lengths))):
        if k and prior.takes_indices:
            content = torch.zeros(1, lengths[k - 1], dtype=torch.int64, device=device)
        elif k:
            content = torch.zeros(1, lengths[k], prior.embedding_dim, dtype=prior.dtype, device=device)
        try:
            hidden_states = prior.decode_block(content, k, context, cache)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            taken = f"takes_indices {prior.takes_indices} and embedding_dim {prior.embedding_dim}"
            raise ValueError(f"prior.decode_block fails for block {k}, given what {taken} say: {error}") from error
        check_hidden(prior, k, hidden_states, 1)
        check_logits(prior, k, prior.logits(hidden_states, context), 1)
        plan = plan_of(prior)
        if len(plan.passes) > 1:
            digits = torch.zeros(1, lengths[k], plan.num_digits, dtype=torch.int64, device=device)
            check_logits(prior, k, prior.logits(hidden_states, context, digits), 1)
    prior.train(was_training)


def check_context(context: Context, num_rows: int) -> None:
    """Refuse what a family's `context` gave, unless it is of R rows."""
    if not isinstance(context, Context) or len(context) != num_rows:
        raise ValueError(f"prior.context gives {context!r:.80}; expected a Context of {num_rows} rows")


def check_hidden(prior: Prior, k: int, hidden_states: Tensor, num_rows: int) -> None:
    """Refuse what a family's `decode_block` gave for block k, unless it is (R, L_k, D)."""
    shape = getattr(hidden_states, "shape", ())
    if len(shape) != 3 or shape[0] != num_rows or shape[1] != prior.layout.block_lengths[k]:
        expected = f"({num_rows}, {prior.layout.block_lengths[k]}, width)"
        raise ValueError(f"prior.decode_block gives {_described(hidden_states)} for block {k}; expected {expected}")


def check_logits(prior: Prior, k: int, logits: Tensor, num_rows: int) -> None:
    """Refuse what a family's `logits` gave for block k, unless it is (R, L_k, S) and at least float32."""
    expected = (num_rows, prior.layout.block_lengths[k], plan_of(prior).num_scores)
    if getattr(logits, "shape", ()) != expected or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"prior.logits gives {_described(logits)} for block {k}; expected {expected} in float32")


def check_output(output: PriorOutput, shape: tuple[int, int]) -> None:
    """Refuse what a family's forward pass gave with labels, unless loss, token_loss and token_correct are as they must.

    Args:
        output: from the prior.
        shape: (B, L).

    Raises:
        ValueError: naming what is of another shape.
    """
    for name, expected in {"loss": (), "token_loss": shape, "token_correct": shape}.items():
        value = getattr(output, name, None)
        if getattr(value, "shape", None) != expected:
            raise ValueError(f"the prior's forward pass gives {_described(value)} as {name}; expected {expected}")


def _described(value: Any) -> str:
    """Say what was given in a tensor's place."""
    return f"{tuple(value.shape)} in {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_quantizer(prior: Prior, quantizer: nn.Module) -> None:
    """Refuse a quantizer whose tokens are not those of a prior.

    Args:
        prior: which reads and writes tokens.
        quantizer: a tokenizer's.

    Raises:
        ValueError: if it is none, or naming what differs: layout, number of codes, their digits where the prior
            predicts those, or, where code vectors are taken, their channels.
    """
    check_offers("quantizer", quantizer, QUANTIZER_PARTS, "a tokenizer's quantizer")
    if quantizer.num_codes != prior.vocab_size:
        raise ValueError(f"quantizer has {quantizer.num_codes} codes; expected {prior.vocab_size}")
    _check_digits(plan_of(prior), getattr(quantizer, "digits", None))
    if not prior.takes_indices and quantizer.dim != prior.embedding_dim:
        raise ValueError(f"quantizer has codes of {quantizer.dim} channels; expected {prior.embedding_dim}")
    if quantizer.layout != prior.layout:
        got = quantizer.layout and quantizer.layout.to_dict()
        raise ValueError(f"quantizer has layout {got}; expected {prior.layout.to_dict()}")


def _check_digits(plan: HeadPlan, digits: CodeDigits | None) -> None:
    """Refuse a quantizer's digits that are not those that a prior predicts, by themselves or joined."""
    if plan.num_digits == 1:
        return
    if digits is None:
        raise ValueError(f"quantizer has codes without digits; expected some of the bases {list(plan.bases)}")
    try:
        digits.sizes_of(plan.bases)
    except ValueError as error:
        raise ValueError(
            f"quantizer has codes of digits of the bases {list(digits.bases)}; expected {list(plan.bases)}, or digits "
            "that make these"
        ) from error


def check_given(prior: Prior, given_idx_Bl: list[Tensor], num_images: int) -> None:
    """Refuse known tokens that do not fit the layout, the batch or the vocabulary.

    Args:
        prior: which samples the others.
        given_idx_Bl: K tensors (B, L_k) int64, −1 for tokens to sample.
        num_images: B.

    Raises:
        ValueError: naming the block that does not fit.
    """
    prior.layout.check_blocks(given_idx_Bl, prior.layout.num_blocks)
    for k, idx in enumerate(given_idx_Bl):
        if not len(idx):
            raise ValueError(f"given_idx_Bl[{k}] has no row; expected {num_images}")
        if len(idx) != num_images or not -1 <= idx.min().item() <= idx.max().item() < prior.vocab_size:
            raise ValueError(
                f"given_idx_Bl[{k}] has {len(idx)} rows from {idx.min().item()} to {idx.max().item()}; "
                f"expected {num_images} rows from -1 (to sample) to {prior.vocab_size - 1}"
            )


def compile_step(prior: Prior, captures_graphs: bool = False, **options: Any) -> None:
    """Compile in place what a block's step runs through; names of weights stay what they are.

    Args:
        prior: whose `step_modules`, classes of modules that hold many layers, are compiled as one graph each; of a
            family that names none, each layer.
        captures_graphs: whether modules that can (`StepStack`) run steps on CUDA as graphs captured once a request.
        options: of `torch.compile`.
    """
    class_names = getattr(prior, "step_modules", prior._no_split_modules)
    for module in prior.modules():
        if type(module).__name__ in class_names:
            module.compile(**options)
            if isinstance(module, StepStack):
                module.captures_graphs = captures_graphs
