"""The loops that VAR, LlamaGen and RAR published, over this library's weights, for benchmarks to stand beside.

VAR's `autoregressive_infer_cfg` (arXiv:2404.02905) computes the AdaLN modulations at every block, grows its cache by
concatenation and guides every block; LlamaGen's `generate` (arXiv:2406.06525) has a cache of full length under a mask;
RAR's (arXiv:2411.00776) computes modulations and grows its cache as VAR's does, a token at a time. Every product is
`F.linear`. Legend: B images, R rows (conditional, then unconditional), K blocks, L_k tokens of one, L all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextblock.prior import BlockPrior, LlamaPrior, RARPrior
from nextblock.prior.sampling import SamplingOptions
from nextblock.tokenizer import VQVAE, VQVAEConfig

TOKENIZERS = {
    "var": {
        "vocab_size": 4096,
        "embedding_dim": 32,
        "quant_conv_kernel_size": 3,
        "layout": "scales",
        "scales": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
        "hidden_dim": 160,
    },
    "raster": {"vocab_size": 16384, "embedding_dim": 8, "layout": "tiles", "tile": 1, "hidden_dim": 128},
    "rar": {"vocab_size": 1024, "embedding_dim": 256, "layout": "tiles", "tile": 1, "hidden_dim": 128},
}
TOKENIZERS["llamagen"] = TOKENIZERS["raster"]
FAMILIES = {"llamagen": LlamaPrior, "rar": RARPrior}
PRIORS = {
    "var": {"hidden_size": 1024, "num_layers": 16, "num_heads": 16, "use_normalized_attention": True},
    "raster": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "input_embedding": "tokens"},
    "llamagen": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "rar": {"hidden_size": 768, "num_layers": 24, "num_heads": 16},
}
OPTIONS = {
    "var": SamplingOptions(guidance_scale=2.5, guidance_schedule="linear", top_k=900, top_p=0.96),
    "raster": SamplingOptions(guidance_scale=2.0, top_k=2000),
    "llamagen": SamplingOptions(guidance_scale=2.0, top_k=2000),
    "rar": SamplingOptions(guidance_scale=16.0, guidance_schedule="power-cosine-open", guidance_power=2.75),
}


@torch.no_grad()
def var_loop(prior: BlockPrior, tokenizer: VQVAE, class_labels: Tensor, options: SamplingOptions) -> Tensor:
    """Sample images as VAR's published code does."""
    B, layout, quantizer = len(class_labels), prior.layout, tokenizer.quantizer
    scales, num_layers = options.scales(layout.num_blocks), len(prior.blocks)
    vector = prior.class_emb(torch.cat([class_labels, torch.full_like(class_labels, prior.config.num_classes)]))
    keys, values = [None] * num_layers, [None] * num_layers
    canvas, block_input = quantizer.start(B), vector[:, None] + prior.pos_start
    for k, (start, end) in enumerate(layout.bounds):
        x = block_input + (prior.pos_1LC[:, start:end] + prior.lvl_embed.weight[k])
        for i, layer in enumerate(prior.blocks):

            def attend(q, key, value, i=i, scale=layer.attn.scale):
                keys[i] = key if keys[i] is None else torch.cat([keys[i], key], dim=2)
                values[i] = value if values[i] is None else torch.cat([values[i], value], dim=2)
                return F.scaled_dot_product_attention(q, keys[i], values[i], scale=scale)

            x = _layer(layer, x, _projected(layer.ada_lin, vector, 6), attend)
        with_class, without = _logits(prior, x, _projected(prior.head_nm.ada_lin, vector, 2)).chunk(2)
        t = scales[k] - 1
        idx = _draw((1 + t) * with_class - t * without, options)
        canvas, next_input = quantizer.advance(canvas, idx, k)
        if next_input is not None:
            block_input = F.linear(next_input, prior.word_embed.weight, prior.word_embed.bias).repeat(2, 1, 1)
    return decode(tokenizer, canvas)


@torch.no_grad()
def llamagen_loop(prior: BlockPrior, tokenizer: VQVAE, class_labels: Tensor, options: SamplingOptions) -> Tensor:
    """Sample images token by token as LlamaGen's published code does."""
    B, L, D = len(class_labels), prior.layout.num_tokens, prior.config.hidden_size
    vector = prior.class_emb(torch.cat([class_labels, torch.full_like(class_labels, prior.config.num_classes)]))
    modulations = [_projected(layer.ada_lin, vector, 6) for layer in prior.blocks]
    head_modulation, heads = _projected(prior.head_nm.ada_lin, vector, 2), prior.config.num_heads
    kind = vector.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else vector.dtype
    caches = [vector.new_zeros(2, 2 * B, heads, L, D // heads, dtype=dtype) for _ in prior.blocks]
    mask, tokens = torch.ones(L, L, dtype=torch.bool, device=vector.device).tril(), []
    x = vector[:, None] + prior.pos_start
    for k in range(L):
        x = x + (prior.pos_1LC[:, k : k + 1] + prior.lvl_embed.weight[k])
        for cache, layer, modulation in zip(caches, prior.blocks, modulations, strict=True):

            def attend(q, key, value, cache=cache, k=k, scale=layer.attn.scale):
                cache[0, :, :, k : k + 1], cache[1, :, :, k : k + 1] = key, value
                return F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask[k : k + 1], scale=scale)

            x = _layer(layer, x, modulation, attend)
        with_class, without = _logits(prior, x, head_modulation).chunk(2)
        tokens.append(_draw(without + (with_class - without) * options.guidance_scale, options))
        x = prior.word_embed(torch.cat([tokens[-1], tokens[-1]]))
    return decode(tokenizer, tokenizer.quantizer.idx_to_features(torch.cat(tokens, 1)))


@torch.no_grad()
def llama_loop(prior: LlamaPrior, tokenizer: VQVAE, class_labels: Tensor, options: SamplingOptions) -> Tensor:
    """Sample images token by token as LlamaGen's published code does, with its own layers."""
    B, L, config = len(class_labels), prior.layout.num_tokens, prior.config
    heads, width = config.num_heads, config.hidden_size // config.num_heads
    x = prior.cls_embedding.embedding_table(_with_null(class_labels, config.num_classes))[:, None]
    # Lengths of caches are multiples of 8.
    length, rotation = -(-(1 + L) // 8) * 8, prior._rotation(x)
    caches = [x.new_zeros(2, 2 * B, heads, length, width, dtype=_autocast_dtype(x)) for _ in prior.layers]
    mask, tokens = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(), []
    for k in range(L):
        cos, sin = rotation[:, k : k + 1].unsqueeze(2).unbind(0)
        for cache, layer in zip(caches, prior.layers, strict=True):
            attention, ffn = layer.attention, layer.feed_forward
            qkv = F.linear(_rms_norm(layer.attention_norm, x), attention.wqkv.weight).view(2 * B, 1, 3, heads, width)
            q, key, value = qkv.unbind(2)
            q, key = (_turned(each, cos, sin).transpose(1, 2) for each in (q, key))
            cache[0, :, :, k : k + 1], cache[1, :, :, k : k + 1] = key, value.transpose(1, 2)
            out = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask[k : k + 1])
            x = x + F.linear(out.transpose(1, 2).reshape(2 * B, 1, -1), attention.wo.weight)
            h = _rms_norm(layer.ffn_norm, x)
            h = F.silu(F.linear(h, ffn.w1.weight)) * F.linear(h, ffn.w3.weight)
            x = x + F.linear(h, ffn.w2.weight)
        with_class, without = F.linear(_rms_norm(prior.norm, x), prior.output.weight).float().chunk(2)
        tokens.append(_draw(without + (with_class - without) * options.guidance_scale, options))
        x = prior.tok_embeddings(torch.cat([tokens[-1], tokens[-1]]))
    return decode(tokenizer, tokenizer.quantizer.idx_to_features(torch.cat(tokens, 1)))


@torch.no_grad()
def rar_loop(prior: RARPrior, tokenizer: VQVAE, class_labels: Tensor, options: SamplingOptions) -> Tensor:
    """Sample images token by token as RAR's published code does; its first call takes two positions."""
    L, num_layers = prior.layout.num_tokens, len(prior.blocks)
    vector = prior.class_emb(_with_null(class_labels, prior.config.num_classes))[:, None]
    keys, values, tokens, scales = [None] * num_layers, [None] * num_layers, [], options.scales(L)
    target = prior.target_aware_pos_embed
    first = prior.cls_token.expand(len(vector), -1, -1) + prior.pos_embed[:, :1]
    x, start = torch.cat([first, vector + prior.pos_embed[:, 1:2] + target[:, 2:3]], dim=1), 0
    for k in range(L):
        condition = vector + prior.timesteps_embeddings[:, start : k + 2]
        for i, layer in enumerate(prior.blocks):

            def attend(q, key, value, i=i):
                keys[i] = key if keys[i] is None else torch.cat([keys[i], key], dim=2)
                values[i] = value if values[i] is None else torch.cat([values[i], value], dim=2)
                return F.scaled_dot_product_attention(q, keys[i], values[i], is_causal=q.shape[2] > 1)

            x = _rar_layer(layer, x, condition, attend)
        scale, shift = _modulation(prior.adaln_before_head, condition, 2)
        h = F.layer_norm(x, x.shape[-1:], eps=prior.config.norm_eps) * (1 + scale) + shift
        with_class, without = F.linear(h[:, -1:], prior.lm_head.weight, prior.lm_head.bias).float().chunk(2)
        tokens.append(_draw(without + (with_class - without) * scales[k], options))
        if k + 1 < L:
            x = prior.embeddings(torch.cat([tokens[-1], tokens[-1]]))
            x, start = x + prior.pos_embed[:, k + 2 : k + 3] + target[:, k + 3 : k + 4], k + 2
    return decode(tokenizer, tokenizer.quantizer.idx_to_features(torch.cat(tokens, 1)))


LOOPS = {"var": var_loop, "raster": llamagen_loop, "llamagen": llama_loop, "rar": rar_loop}


def _with_null(class_labels: Tensor, null_class: int) -> Tensor:
    """Return labels and then as many null classes, (2B,)."""
    return torch.cat([class_labels, torch.full_like(class_labels, null_class)])


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the type of products."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise (R, 1, D) operation by operation."""
    h = x.float()
    return (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of (R, 1, heads, width)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).type_as(x)


def _modulation(module: nn.Module, condition: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """Return the modulations of positions, each (R, l, D)."""
    ada_lin = module.adaLN_modulation[1]
    return F.linear(F.silu(condition), ada_lin.weight, ada_lin.bias).chunk(num_parts, dim=-1)


def _rar_layer(layer: nn.Module, x: Tensor, condition: Tensor, attend) -> Tensor:
    """Apply RAR's attention and feed-forward to (R, l, D)."""
    attn, (R, length, D) = layer.attn, x.shape
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(layer, condition, 6)

    def normed(norm, h):
        return F.layer_norm(h, norm.weight.shape, norm.weight, norm.bias, norm.eps)

    qkv = F.linear(normed(layer.norm1, x) * (1 + scale1) + shift1, attn.qkv.weight, attn.qkv.bias)
    q, k, v = qkv.view(R, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    out = attend(normed(attn.q_norm, q).to(v.dtype), normed(attn.k_norm, k).to(v.dtype), v)
    out = F.linear(out.transpose(1, 2).reshape(R, length, D), attn.proj.weight, attn.proj.bias)
    x = x + gate1 * out
    h = F.linear(normed(layer.norm2, x) * (1 + scale2) + shift2, layer.mlp.fc1.weight, layer.mlp.fc1.bias)
    return x + gate2 * F.linear(F.gelu(h), layer.mlp.fc2.weight, layer.mlp.fc2.bias)


def decode(tokenizer: VQVAE, features: Tensor) -> Tensor:
    """Decode as the published code does: channels first, every operation into memory of its own."""
    decoder = tokenizer.decoder

    def residual(block, x):
        h = block.conv1(F.silu(block.norm1(x)))
        return block.nin_shortcut(x) + block.conv2(F.silu(block.norm2(h)))

    x = decoder.conv_in(tokenizer.post_quant_conv(features))
    x = residual(decoder.mid.block_2, decoder.mid.attn_1(residual(decoder.mid.block_1, x)))
    for level in reversed(decoder.up):
        for j, block in enumerate(level.block):
            x = residual(block, x)
            if level.attn:
                x = level.attn[j](x)
        if hasattr(level, "upsample"):
            x = level.upsample(x)
    return decoder.conv_out(F.silu(decoder.norm_out(x))).clamp(-1, 1)


def _projected(ada_lin: nn.Sequential, vector: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """Return a class embedding's modulations, each (R, 1, D)."""
    projected = F.linear(F.silu(vector), ada_lin[1].weight, ada_lin[1].bias)
    return projected.view(len(vector), 1, num_parts, -1).unbind(2)


def _layer(layer: nn.Module, x: Tensor, modulation: tuple[Tensor, ...], attend) -> Tensor:
    """Apply attention and feed-forward to (R, L_k, D)."""
    gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
    attn, (R, length, D) = layer.attn, x.shape
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    h = F.layer_norm(x, (D,), eps=layer.norm.eps).mul(scale1.add(1)).add_(shift1)
    qkv = F.linear(h, attn.mat_qkv.weight, bias).view(R, length, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if attn.is_normalized:
        q = F.normalize(q, dim=-1).mul(attn.scale_mul_1H11.clamp_max(4.605).exp().to(q.dtype))
        k = F.normalize(k, dim=-1)
    out = attend(q, k, v).transpose(1, 2).reshape(R, length, D)
    x = x + F.linear(out, attn.proj.weight, attn.proj.bias).mul(gamma1)
    h = F.layer_norm(x, (D,), eps=layer.norm.eps).mul(scale2.add(1)).add_(shift2)
    h = F.gelu(F.linear(h, layer.ffn.fc1.weight, layer.ffn.fc1.bias), approximate="tanh")
    return x + F.linear(h, layer.ffn.fc2.weight, layer.ffn.fc2.bias).mul(gamma2)


def _logits(prior: BlockPrior, x: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
    """Return float32 scores of all codes."""
    scale, shift = modulation
    h = F.layer_norm(x, x.shape[-1:], eps=prior.head_nm.norm.eps).mul(scale.add(1)).add_(shift)
    return F.linear(h, prior.head.weight, prior.head.bias).float()


def _draw(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Truncate and draw tokens (B, L_k)."""
    logits = logits / options.temperature
    if options.top_k:
        logits = logits.masked_fill(logits < logits.topk(options.top_k, dim=-1).values[..., -1:], -torch.inf)
    if options.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - options.top_p
        is_tail[..., -1] = False
        logits = logits.masked_fill(is_tail.scatter(-1, order, is_tail), -torch.inf)
    return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])


def build_models(model: str, **prior_options: int) -> tuple[nn.Module, VQVAE]:
    """Return a prior and tokenizer with random weights, of a model's shape but for the prior's own options."""
    torch.manual_seed(0)
    shape = {"image_size": 256, "autoencoder": "vqgan", "num_res_blocks": 2}
    tokenizer = VQVAE(VQVAEConfig(**shape, **TOKENIZERS[model])).eval()
    options = {"vocab_size": TOKENIZERS[model]["vocab_size"]} | PRIORS[model] | prior_options
    family = FAMILIES.get(model, BlockPrior)
    if family is BlockPrior:
        options["embedding_dim"] = TOKENIZERS[model]["embedding_dim"]
    return family(family.config_class(layout=tokenizer.layout.to_dict(), num_classes=1000, **options)).eval(), tokenizer
