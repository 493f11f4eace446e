"""Reconstruction, out-painting, interpolation, progressive decoding, animations, smooth sampling."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.data.pixels import fit_image
from nextblock.pipelines import save_animation
from nextblock.prior.sampling import draw_gumbels


@pytest.fixture
def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def pixel_values(images) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.array(each) for each in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def joined(blocks) -> torch.Tensor:
    return torch.cat(list(blocks), dim=1)


def test_reconstruction_is_encoding_and_decoding(any_pipe, images):
    idx_Bl = any_pipe.tokenizer.img_to_idxBl(pixel_values(images))
    expected = any_pipe.tokenizer.idxBl_to_img(idx_Bl) / 2 + 0.5
    got = any_pipe.reconstruct(images, output_type="pt").images
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(any_pipe.reconstruct(images, decode_batch_size=1, output_type="pt").images, got)
    assert torch.equal(joined(any_pipe.reconstruct(images, output_type="latent", return_dict=False)[0]), joined(idx_Bl))
    assert any_pipe.reconstruct(images[0]).images[0].size == (16, 16)
    # Arrays and tensors of pixels in [0, 1] are images too.
    array = np.stack([np.array(each) for each in images]) / 255.0
    for same in (array.astype(np.float32), torch.from_numpy(array).permute(0, 3, 1, 2).float()):
        torch.testing.assert_close(any_pipe.reconstruct(same, output_type="pt").images, got, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_pictures_of_other_sizes_are_fitted_as_asked(build_pipeline, fit):
    pipe = build_pipeline()
    pixels = np.random.default_rng(3).integers(0, 256, (2, 20, 40, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each) for each in pixels]
    fitted = [fit_image(picture, (16, 16), fit) for picture in pictures]
    chosen = {} if fit == "crop" else {"fit": fit}

    def same(method: str, given: tuple, expected: tuple, **options) -> None:
        got, expected = (
            getattr(pipe, method)(*arguments, output_type="pt", **options, **how).images
            for arguments, how in ((given, chosen), (expected, {}))
        )
        assert torch.equal(got, expected)

    same("reconstruct", (pictures,), (fitted,))
    same("interpolate", (*pictures, 3), (*fitted, 3))
    mask, half = np.zeros((20, 40), bool), np.zeros((16, 16), bool)
    mask[:, 20:] = half[:, 8:] = True
    for given in ((pictures[0], mask), (pixels[0], Image.fromarray(mask))):
        same("inpaint", (*given, 1), (fitted[0], half, 1), temperature=1e-6)
    box = (2, 4, 6, 16)
    same("outpaint", (pictures[0], box, 1), (fit_image(pictures[0], (12, 4), fit), box, 1), temperature=1e-6)


def test_outpainting_is_inpainting_around_the_box(any_pipe, images):
    options = {"class_labels": 1, "num_images_per_label": 3, "guidance_scale": 1.5, "output_type": "latent"}
    outpainted = joined(any_pipe.outpaint(images[0], (4, 4, 16, 16), generator=seeded(), **options).images)
    placed = np.pad(np.array(images[0].resize((12, 12), Image.Resampling.LANCZOS)), ((4, 0), (4, 0), (0, 0)), "edge")
    mask = np.full((16, 16), 255, dtype=np.uint8)
    mask[4:, 4:] = 0
    inpainted = any_pipe.inpaint(Image.fromarray(placed), Image.fromarray(mask), generator=seeded(), **options).images
    assert torch.equal(outpainted, joined(inpainted))
    assert (outpainted != outpainted[:1]).any(0).any() and (outpainted == outpainted[:1]).all(0).any()
    whole = any_pipe.outpaint(images[0], (0, 0, 16, 16), 1, output_type="latent").images
    assert torch.equal(joined(whole), joined(any_pipe.reconstruct(images[0], output_type="latent").images))


def test_interpolation_is_a_straight_line_between_quantized_maps(any_pipe, images):
    got = any_pipe.interpolate(*images, num_steps=5, output_type="pt").images
    ends = any_pipe.reconstruct(images, output_type="pt").images
    assert got.shape == (5, 3, 16, 16)
    torch.testing.assert_close(got[[0, -1]], ends, rtol=0, atol=1e-5)
    tokenizer = any_pipe.tokenizer
    first, last = tokenizer.quantizer.idx_to_features(tokenizer.img_to_idx(pixel_values(images)))
    with torch.no_grad():
        quarter = tokenizer.decode((0.75 * first + 0.25 * last)[None]).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(got[1:2], quarter, rtol=0, atol=1e-5)
    assert not torch.allclose(got[1], got[0], atol=1e-3)
    assert len(any_pipe.interpolate(*images, 2, return_dict=False)[0]) == 2


def test_progressive_decoding_shows_the_map_so_far(any_pipe):
    options = {"guidance_scale": 1.5, "batch_size": 2, "output_type": "pt"}
    frames = any_pipe.progressive([0, 1, 2], generator=seeded(), **options)
    assert torch.equal(frames[-1], any_pipe([0, 1, 2], generator=seeded(), **options).images)
    idx_Bl = any_pipe([0, 1, 2], generator=seeded(), **options | {"output_type": "latent"}).images
    quantizer, layout = any_pipe.tokenizer.quantizer, any_pipe.tokenizer.layout
    assert len(frames) == layout.num_blocks
    for k, frame in enumerate(frames):
        if layout.is_scales:
            # What all scales give, less what the later ones add.
            features = quantizer.idx_to_features(joined(idx_Bl))
            for later in range(k + 1, layout.num_blocks):
                features = features - quantizer.advance(quantizer.start(3), idx_Bl[later], later)[0]
        else:
            features = quantizer.idx_to_features(joined(idx_Bl))
            features[:, :, k + 1 :] = 0
        with torch.no_grad():
            expected = any_pipe.tokenizer.decode(features).clamp(-1, 1) / 2 + 0.5
        torch.testing.assert_close(frame, expected, rtol=0, atol=1e-5)
    pictures = any_pipe.progressive([0, 1, 2], generator=seeded(), decode_batch_size=1, guidance_scale=1.5)
    assert [len(frame) for frame in pictures] == [3] * layout.num_blocks
    last = np.stack([np.array(each) for each in pictures[-1]])
    np.testing.assert_array_equal(last, (frames[-1].permute(0, 2, 3, 1) * 255).round().numpy().astype(np.uint8))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_holds_every_frame(suffix, tmp_path):
    colours = ["red", "green", "blue"]
    frames = [[Image.new("RGB", (64, 64), colour), Image.new("RGB", (64, 64), "white")] for colour in colours]
    save_animation(frames, tmp_path / f"frames{suffix}", num_columns=1, frame_ms=200, last_frame_ms=900)
    with Image.open(tmp_path / f"frames{suffix}") as animation:
        assert animation.n_frames == 3 and animation.size == (68, 134) and animation.info["loop"] == 0
        for number, colour in enumerate(colours):
            animation.seek(number)
            expected = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
            assert animation.convert("RGB").getpixel((30, 30)) == expected
            assert animation.info["duration"] == (900 if number == 2 else 200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "frames.mp4"}, r"path is 'frames.mp4'; expected a file name that ends with one of \['.gif'"),
        ({"num_columns": 0}, "num_columns is 0; expected a positive integer"),
        ({"frame_ms": 0.5}, "frame_ms is 0.5; expected a positive integer"),
        ({"last_frame_ms": -1}, "last_frame_ms is -1; expected a positive integer"),
        ({"frames": []}, "frames is no list of lists of PIL images"),
        ({"frames": [[]]}, "frames is no list of lists of PIL images"),
        ({"frames": [[3]]}, "frames is no list of lists of PIL images"),
    ],
)
def test_animations_that_cannot_be_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_animation(**{"frames": [[Image.new("RGB", (8, 8))]], "path": "frames.gif"} | options)
    assert not list(tmp_path.iterdir())


def test_smooth_sampling_feeds_and_decodes_mixtures(build_pipeline, seeds):
    pipe = build_pipeline()
    options = {"generator": seeds(2), "is_smooth": True, "temperature": 2.0, "top_k": 5, "min_p": 0.01}
    blocks = []

    def record(pipe, step, block, tensors):
        blocks.append(tensors["logits"].clone())
        return tensors

    record_options = {"callback_on_step_end": record, "callback_on_step_end_tensor_inputs": ["logits"]}
    got = pipe([0, 1], output_type="pt", **options, **record_options).images
    idx_Bl = pipe([0, 1], output_type="latent", **options | {"generator": seeds(2)}).images
    quantizer, layout = pipe.tokenizer.quantizer, pipe.prior.layout
    generators, canvas, codes = seeds(2), quantizer.start(2), quantizer.get_codebook().detach()
    [torch.rand(layout.num_tokens, generator=g, dtype=torch.float64) for g in generators]
    for k, logits in enumerate(blocks):
        scaled = logits / 2
        scaled = scaled.masked_fill(scaled < scaled.topk(5).values[..., -1:], -torch.inf)
        probabilities = scaled.softmax(-1)
        scaled = scaled.masked_fill(probabilities < 0.01 * probabilities.amax(-1, keepdim=True), -torch.inf)
        noisy = scaled * (1 + k / 2) + draw_gumbels(generators, layout.block_lengths[k], 12)
        assert torch.equal(idx_Bl[k], noisy.argmax(-1))
        weights = (noisy / max(0.27 * (1 - 0.95 * k / 2), 0.005)).softmax(-1)
        canvas, next_input = quantizer.advance(canvas, weights @ codes, k)
    with torch.no_grad():
        expected = pipe.tokenizer.decode(canvas).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    single = pipe.tokenizer.idxBl_to_img(idx_Bl) / 2 + 0.5
    assert not torch.allclose(got, single, atol=1e-3)
    again = pipe([0, 1], output_type="pt", batch_size=1, **options | {"generator": seeds(2)}).images
    torch.testing.assert_close(again, got, rtol=0, atol=1e-5)


def test_smooth_sampling_keeps_known_tokens_as_single_codes(build_pipeline, images):
    pipe = build_pipeline()
    known = pipe.reconstruct(images, output_type="latent").images
    got = pipe([0, 1], idx_Bl=known, is_smooth=True, output_type="pt").images
    assert torch.equal(got, pipe.reconstruct(images, output_type="pt").images)
    replaced = []

    def replace_all(pipe, step, block, tensors):
        replaced.append((tensors["idx"] + 1) % 12)
        return {"idx": replaced[-1]}

    got = pipe([0, 1], is_smooth=True, output_type="pt", callback_on_step_end=replace_all).images
    expected = pipe([0, 1], idx_Bl=replaced, output_type="pt").images
    assert torch.equal(got, expected)
