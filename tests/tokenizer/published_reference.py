"""Published autoencoders written down once more, in float64 and straight from the names of their tensors.

Each function takes a state dict by the other project's names. Legend: B batch, H×W pixels, h×w latent cells.
"""

import torch
import torch.nn.functional as F


class Net:
    """A state dict with the few layers that published autoencoders are made of."""

    def __init__(self, state):
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def has(self, prefix):
        return any(name.startswith(prefix) for name in self.state)

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def block(self, name, x, is_maskgit=False):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        if not self.has(f"{name}.nin_shortcut."):
            return x + h
        return h + self.conv(f"{name}.nin_shortcut", h if is_maskgit else x)

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k).mul(x.shape[1] ** -0.5).softmax(2)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))

    def level(self, name, x, block, **options):
        j = 0
        while self.has(f"{name}.{block}.{j}."):
            x = self.block(f"{name}.{block}.{j}", x, **options)
            if self.has(f"{name}.attn.{j}."):
                x = self.attention(f"{name}.attn.{j}", x)
            j += 1
        return x

    def num_levels(self, prefix):
        return sum(self.has(f"{prefix}.{i}.") for i in range(20))


def padded(net, name, x):
    return net.conv(name, F.pad(x, (0, 1, 0, 1)), stride=2)


def doubled(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def attended_encode(state, x, levels, block, middle):
    """Encode as taming (levels "down", block "block") or LlamaGen ("conv_blocks", "res")."""
    net = Net(state)
    x = net.conv("encoder.conv_in", x.double(), padding=1)
    for i in range(net.num_levels(f"encoder.{levels}")):
        x = net.level(f"encoder.{levels}.{i}", x, block)
        if net.has(f"encoder.{levels}.{i}.downsample."):
            x = padded(net, f"encoder.{levels}.{i}.downsample.conv", x)
    first, between, last = middle
    x = net.block(f"encoder.mid.{last}", net.attention(f"encoder.mid.{between}", net.block(f"encoder.mid.{first}", x)))
    x = net.conv("encoder.conv_out", F.silu(net.norm("encoder.norm_out", x)), padding=1)
    return net.conv("quant_conv", x)


def attended_decode(state, z, levels, block, middle):
    """Decode as `attended_encode` encodes; LlamaGen counts its decoder's levels from the coarsest."""
    net = Net(state)
    x = net.conv("decoder.conv_in", net.conv("post_quant_conv", z.double()), padding=1)
    first, between, last = middle
    x = net.block(f"decoder.mid.{last}", net.attention(f"decoder.mid.{between}", net.block(f"decoder.mid.{first}", x)))
    numbers = range(net.num_levels(f"decoder.{levels}"))
    for i in reversed(numbers) if levels == "up" else numbers:
        x = net.level(f"decoder.{levels}.{i}", x, block)
        if net.has(f"decoder.{levels}.{i}.upsample."):
            x = net.conv(f"decoder.{levels}.{i}.upsample.conv", doubled(x), padding=1)
    return net.conv("decoder.conv_out", F.silu(net.norm("decoder.norm_out", x)), padding=1)


def middle_blocks(net, name, x, **options):
    j = 0
    while net.has(f"{name}.{j}."):
        x = net.block(f"{name}.{j}", x, **options)
        j += 1
    return x


def maskgit_encode(state, x):
    """Encode pixels in [0, 1]."""
    net = Net(state)
    x = net.conv("encoder.conv_in", x.double(), padding=1)
    last = net.num_levels("encoder.down") - 1
    for i in range(last + 1):
        x = net.level(f"encoder.down.{i}", x, "block", is_maskgit=True)
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) if i < last else x
    x = middle_blocks(net, "encoder.mid", x, is_maskgit=True)
    return net.conv("encoder.conv_out", F.silu(net.norm("encoder.norm_out", x)))


def maskgit_decode(state, z):
    """Decode to pixels in [0, 1]."""
    net = Net(state)
    x = middle_blocks(net, "decoder.mid", net.conv("decoder.conv_in", z.double(), padding=1), is_maskgit=True)
    for i in reversed(range(net.num_levels("decoder.up"))):
        x = net.level(f"decoder.up.{i}", x, "block", is_maskgit=True)
        x = net.conv(f"decoder.up.{i}.upsample_conv", doubled(x), padding=1) if i > 0 else x
    return net.conv("decoder.conv_out", F.silu(net.norm("decoder.norm_out", x)), padding=1)


def magvit2_encode(state, x):
    net = Net(state)
    x = net.conv("encoder.conv_in", x.double(), padding=1)
    for i in range(net.num_levels("encoder.down")):
        x = net.level(f"encoder.down.{i}", x, "block")
        if net.has(f"encoder.down.{i}.downsample."):
            x = net.conv(f"encoder.down.{i}.downsample", x, stride=2, padding=1)
    x = middle_blocks(net, "encoder.mid_block", x)
    return net.conv("encoder.conv_out", F.silu(net.norm("encoder.norm_out", x)))


def magvit2_decode(state, z):
    net, z = Net(state), z.double()
    x = middle_blocks(net, "decoder.mid_block", net.conv("decoder.conv_in", z, padding=1))
    num_cells = z[0, 0].numel()
    mean = z.sum((2, 3)) / num_cells
    spread = ((z - mean[:, :, None, None]).square().sum((2, 3)) / (num_cells - 1) + 1e-6).sqrt()
    for i in reversed(range(net.num_levels("decoder.up"))):
        gamma, beta = (
            of @ net.state[f"decoder.adaptive.{i}.{name}.weight"].T + net.state[f"decoder.adaptive.{i}.{name}.bias"]
            for name, of in (("gamma", spread), ("beta", mean))
        )
        x = F.group_norm(x, 32, eps=1e-6) * gamma[:, :, None, None] + beta[:, :, None, None]
        x = net.level(f"decoder.up.{i}", x, "block")
        if i > 0:
            parts = net.conv(f"decoder.up.{i}.upsample.conv1", x, padding=1)
            wide = parts.new_zeros(len(parts), parts.shape[1] // 4, 2 * parts.shape[2], 2 * parts.shape[3])
            for n, part in enumerate(parts.chunk(4, 1)):
                wide[:, :, n // 2 :: 2, n % 2 :: 2] = part
            x = wide
    return net.conv("decoder.conv_out", F.silu(net.norm("decoder.norm_out", x)), padding=1)


TAMING = ("down", "up"), "block", ("block_1", "attn_1", "block_2")
LLAMAGEN = ("conv_blocks", "conv_blocks"), "res", ("0", "1", "2")


def encode(state, pixels, project):
    """Return the features of pixels in [-1, 1]."""
    if project == "maskgit":
        return maskgit_encode(state, (pixels + 1) / 2)
    if project == "magvit2":
        return magvit2_encode(state, pixels)
    levels, *rest = LLAMAGEN if project == "llamagen" else TAMING
    return attended_encode(state, pixels, levels[0], *rest)


def decode(state, codes, project):
    """Return pixels in about [-1, 1] of a quantized map."""
    if project == "maskgit":
        return 2 * maskgit_decode(state, codes) - 1
    if project == "magvit2":
        return magvit2_decode(state, codes)
    levels, *rest = LLAMAGEN if project == "llamagen" else TAMING
    return attended_decode(state, codes, levels[1], *rest)


def assign(state, features, project, is_normalized=True):
    """Return the indices (B, h·w) of features (B, C, h, w)."""
    vectors = features.double().flatten(2).transpose(1, 2)
    if project == "magvit2":
        return ((vectors > 0) * 2 ** torch.arange(vectors.shape[2])).sum(2)
    if "quantize.proj.weight" in state:
        weight, bias = state["quantize.proj.weight"].double()[:, :, 0, 0], state["quantize.proj.bias"].double()
        return (vectors @ weight.T + bias).argmax(2)
    codes = state["quantize.embedding.weight"].double()
    if project == "ibq":
        return (vectors @ codes.T).argmax(2)
    if project == "llamagen" and is_normalized:
        vectors, codes = F.normalize(vectors, dim=2), F.normalize(codes, dim=1)
    return torch.cdist(vectors, codes[None].expand(len(vectors), -1, -1)).argmin(2)
