"""A family of priors that the library does not know: a bag of the tokens so far and the class decide a block."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from nextblock.data.blocks import BlockLayout
from nextblock.prior import PriorOutput, prior_output
from nextblock.prior.conditioning import ClassConditions, Context


class BagConfig(PreTrainedConfig):
    model_type = "toy_bag"

    def __init__(self, layout=None, vocab_size=8, num_classes=0, class_names=None, **kwargs):
        self.layout = layout or BlockLayout.tiles(1, 2).to_dict()
        self.vocab_size, self.num_classes, self.class_names = vocab_size, num_classes, class_names
        super().__init__(**kwargs)


class BagPrior(PreTrainedModel):
    config_class, main_input_name, _no_split_modules = BagConfig, "var_input", ["Linear"]
    no_decay, can_chunk_loss, takes_indices = ("places",), False, True

    def __init__(self, config):
        super().__init__(config)
        self.layout, self.vocab_size, self.embedding_dim = BlockLayout.from_dict(config.layout), config.vocab_size, 0
        self.conditions = ClassConditions(config.num_classes, config.class_names)
        self.classes, self.tokens = nn.Embedding(config.num_classes + 1, 8), nn.Embedding(config.vocab_size, 8)
        self.places = nn.Parameter(torch.zeros(self.layout.num_tokens, 8))
        self.head = nn.Linear(8, config.vocab_size)
        self.post_init()

    def forward(self, var_input, class_labels, labels=None) -> PriorOutput:
        context = self.context(self.conditions.of(class_labels))
        cache, start = self.new_cache(len(context)), self.layout.block_lengths[0]
        contents = [None, *var_input.split(self.layout.block_lengths[:-1], dim=1)][: self.layout.num_blocks]
        assert var_input.shape[1] == self.layout.num_tokens - start, "tiles are of one size"
        hidden = [self.decode_block(content, k, context, cache) for k, content in enumerate(contents)]
        return prior_output(self.logits(torch.cat(hidden, dim=1), context), labels)

    def context(self, condition) -> Context:
        return Context(vector=self.classes(condition.class_labels))

    def new_cache(self, num_rows) -> SimpleNamespace:
        return SimpleNamespace(bag=self.places.new_zeros(num_rows, 1, 8))

    def decode_block(self, content, k, context, cache):
        start, end = self.layout.bounds[k]
        bag = cache.bag[: len(context)]
        if content is not None:
            bag = bag + self.tokens(content).sum(1, keepdim=True).repeat(len(context) // len(content), 1, 1)
        cache.bag = bag
        return torch.tanh(bag + context.vector[:, None] + self.places[start:end])

    def logits(self, hidden_states, context):
        return self.head(hidden_states).float()
