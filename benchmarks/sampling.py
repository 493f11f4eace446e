"""Time and memory of guided VAR sampling beside a plain loop of the same model in the same run.

The plain loop recomputes the AdaLN modulations at every block, grows its key/value cache by concatenation, guides every
block and decodes channels first, as a direct transcription of the papers does. The loops run in processes of their own
and take turns. One keeps freed memory, as `nextblock sample` does on a CPU; one is compiled as by
`pipe.compile()`. Weights are random: time does not depend on them.

    python benchmarks/sampling.py --depth 16 --batch_sizes 1 8 --dtypes float32 bfloat16
    python benchmarks/sampling.py --batch_sizes 1 64 --dtypes bfloat16 --loops plain nextblock 'nextblock, compiled'
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F

from nextblock.cpu import keep_freed_memory
from nextblock.data.blocks import BlockLayout
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior.family import compile_layers
from nextblock.prior.sampling import SamplingOptions
from nextblock.tokenizer import VQVAE, VQVAEConfig

SCALES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
LOOPS = ("plain", "nextblock", "nextblock, freed memory kept", "nextblock, compiled")
GUIDANCE = {"guidance_scale": 2.5, "guidance_schedule": "linear"}
TRUNCATION = {"temperature": 1.0, "top_k": 900, "top_p": 0.96}


def build_models(depth: int, dtype: torch.dtype, device: str) -> tuple[BlockPrior, VQVAE]:
    """Return a VAR-shaped prior and tokenizer with random weights."""
    torch.manual_seed(0)
    tokenizer = VQVAE(
        VQVAEConfig(
            image_size=256,
            autoencoder="vqgan",
            hidden_dim=160,
            num_res_blocks=2,
            vocab_size=4096,
            embedding_dim=32,
            quant_conv_kernel_size=3,
            layout="scales",
            scales=SCALES,
        )
    )
    prior = BlockPrior(
        BlockPriorConfig(
            layout=tokenizer.layout.to_dict(),
            vocab_size=4096,
            embedding_dim=32,
            num_classes=1000,
            hidden_size=64 * depth,
            num_layers=depth,
            num_heads=depth,
            use_normalized_attention=True,
        )
    )
    return prior.to(device, dtype).eval(), tokenizer.to(device, dtype).eval()


@torch.no_grad()
def plain_loop(prior: BlockPrior, tokenizer: VQVAE, class_labels: torch.Tensor) -> torch.Tensor:
    """Sample as a direct transcription does: nothing is prepared, nothing is skipped."""
    B, layout, quantizer = len(class_labels), prior.layout, tokenizer.quantizer
    scales = SamplingOptions(**GUIDANCE).scales(layout.num_blocks)
    condition = prior.conditions.of(class_labels)
    condition = condition.joined(condition.null())
    keys, values = [None] * len(prior.blocks), [None] * len(prior.blocks)
    canvas, idx_Bl = quantizer.start(B), []
    block_input = prior.class_emb(condition.class_labels)[:, None] + prior.pos_start
    for k, (start, end) in enumerate(layout.bounds):
        context = prior.context(condition)
        hidden_states = block_input + prior.pos_1LC[:, start:end] + prior.lvl_embed.weight[k]
        for i, layer in enumerate(prior.blocks):

            def attend(q, key, value, i=i, scale=layer.attn.scale):
                keys[i] = key if keys[i] is None else torch.cat([keys[i], key], dim=2)
                values[i] = value if values[i] is None else torch.cat([values[i], value], dim=2)
                return F.scaled_dot_product_attention(q, keys[i], values[i], scale=scale)

            hidden_states = layer(hidden_states, context.modulations[i], attend)
        conditional, unconditional = prior.logits(hidden_states, context).chunk(2)
        logits = unconditional + scales[k] * (conditional - unconditional)
        idx_Bl.append(plain_tokens(logits))
        if k + 1 < layout.num_blocks:
            canvas, next_input = quantizer.advance(canvas, idx_Bl[-1], k)
            next_input = next_input.to(prior.word_embed.weight.dtype)
            block_input = prior.word_embed(next_input).repeat(2, 1, 1)
    return plain_decode(tokenizer, idx_Bl)


def plain_decode(tokenizer: VQVAE, idx_Bl: list[torch.Tensor]) -> torch.Tensor:
    """Decode as a direct transcription does: channels first, every operation into memory of its own."""
    decoder = tokenizer.decoder

    def residual(block, x):
        h = block.conv1(F.silu(block.norm1(x)))
        return block.nin_shortcut(x) + block.conv2(F.silu(block.norm2(h)))

    quantized = tokenizer.quantizer.idx_to_features(tokenizer.layout.join(idx_Bl))
    x = decoder.conv_in(tokenizer.post_quant_conv(quantized.to(decoder.conv_in.weight.dtype)))
    x = residual(decoder.mid.block_2, decoder.mid.attn_1(residual(decoder.mid.block_1, x)))
    for level in reversed(decoder.up):
        for j, block in enumerate(level.block):
            x = residual(block, x)
            if level.attn:
                x = level.attn[j](x)
        if hasattr(level, "upsample"):
            x = level.upsample(x)
    return decoder.conv_out(F.silu(decoder.norm_out(x))).clamp(-1, 1)


def plain_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Truncate and draw as the published code does: top-k, a sort of all codes for top-p, a multinomial."""
    logits = logits / TRUNCATION["temperature"]
    logits = logits.masked_fill(logits < logits.topk(TRUNCATION["top_k"], dim=-1).values[..., -1:], -torch.inf)
    ascending, order = logits.sort(dim=-1)
    is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - TRUNCATION["top_p"]
    is_tail[..., -1] = False
    logits = logits.masked_fill(is_tail.scatter(-1, order, is_tail), -torch.inf)
    return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])


@torch.no_grad()
def nextblock_loop(prior: BlockPrior, tokenizer: VQVAE, class_labels: torch.Tensor) -> torch.Tensor:
    """Sample as the pipeline does."""
    idx_Bl = prior.generate(class_labels, tokenizer.quantizer, **GUIDANCE, **TRUNCATION)
    return tokenizer.idxBl_to_img(idx_Bl)


def seconds_of(function, *arguments, num_runs: int) -> list[float]:
    """Return the wall times of several calls."""
    times = []
    for _ in range(num_runs):
        start = time.perf_counter()
        function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Return the operations a second of a large matrix product."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    seconds_of(torch.mm, a, a, num_runs=3)
    return 2 * 2048**3 / min(seconds_of(torch.mm, a, a, num_runs=10))


def sampling_operations(depth: int, batch_size: int) -> float:
    """Return the operations of the prior's matrix products for guided sampling, attention included."""
    D, layout = 64 * depth, BlockLayout.scales(SCALES)
    linear = 2 * layout.num_tokens * (depth * 12 * D * D + D * 4096)
    attention = 4 * D * depth * sum((end - start) * end for start, end in layout.bounds)
    return 2 * batch_size * (linear + attention)


def serve(connection, name: str, depth: int, dtype_name: str, device: str) -> None:
    """Run one loop in a process of its own, whose memory is then that loop's; answer requests with seconds."""
    if name == "nextblock, freed memory kept":
        assert keep_freed_memory()
    prior, tokenizer = build_models(depth, getattr(torch, dtype_name), device)
    if name == "nextblock, compiled":
        compile_layers(prior)
        tokenizer.decoder.compile()
    loop = plain_loop if name == "plain" else nextblock_loop
    decode = partial(plain_decode, tokenizer) if name == "plain" else tokenizer.idxBl_to_img
    while (batch_size := connection.recv()) is not None:
        class_labels = torch.arange(batch_size, device=device)
        [whole] = seconds_of(loop, prior, tokenizer, class_labels, num_runs=1)
        idx_Bl = [torch.randint(4096, (batch_size, n * n), device=device) for n in SCALES]
        with torch.no_grad():
            [decoding] = seconds_of(decode, idx_Bl, num_runs=1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak
        connection.send((whole, decoding, peak))


def compare(arguments: argparse.Namespace, dtype_name: str, peak: float) -> list[dict]:
    """Let the loops take turns, so that a drifting machine drifts for all; return a row for each batch size."""
    context, ends, rows = multiprocessing.get_context("spawn"), {}, []
    for name in arguments.loops:
        ends[name], other = context.Pipe()
        options = (other, name, arguments.depth, dtype_name, arguments.device)
        context.Process(target=serve, args=options, daemon=True).start()
    for batch_size in sorted(arguments.batch_sizes):
        times, first_seconds = {name: [] for name in ends}, {}
        for turn in range(arguments.num_runs + 1):
            for name, end in ends.items():
                end.send(batch_size)
                answer = end.recv()
                if turn > 0:
                    times[name].append(answer)
                else:
                    first_seconds[name] = answer[0]
        row = {"dtype": dtype_name, "batch_size": batch_size, "loops": {}}
        for name, answers in times.items():
            whole, decoding, memory = (statistics.median(values) for values in zip(*answers, strict=True))
            operations = sampling_operations(arguments.depth, batch_size)
            row["loops"][name] = {
                "first_call_seconds": round(first_seconds[name], 3),
                "seconds": round(whole, 3),
                "fastest_seconds": round(min(answers)[0], 3),
                "decoding_seconds": round(decoding, 3),
                "images_a_second": round(batch_size / whole, 3),
                "share_of_matmul_peak_without_decoding": round(operations / (whole - decoding) / peak, 3),
                "peak_memory_gib": round(memory, 2),
            }
        for figures in row["loops"].values():
            figures["speedup"] = round(row["loops"][arguments.loops[0]]["seconds"] / figures["seconds"], 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    for end in ends.values():
        end.send(None)
    return rows


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=LOOPS[:3])
    parser.add_argument("--num_runs", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/sampling.json")
    arguments = parser.parse_args()
    results = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "depth": arguments.depth,
        "rows": [],
    }
    for dtype_name in arguments.dtypes:
        peak = matmul_peak(getattr(torch, dtype_name), arguments.device)
        results["rows"] += compare(arguments, dtype_name, peak)
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
