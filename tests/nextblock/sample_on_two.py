"""Sample on two processes that share one import: `sample_on_two.py PORT PIPELINE FOLDER ARGUMENT …`.

The mass sampler gets the arguments. Then each process draws every second of sixty-four images, eight of each of eight
classes, in a request of its own, and leaves their indices (32, L) in FOLDER.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from nextblock.cpu import fixed_threads
from nextblock.pipelines import ClassToImagePipeline
from nextblock.sample import image_seed, main


def draw_share(pipeline_dir: str, rank: int) -> np.ndarray:
    pipe = ClassToImagePipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    share = range(rank, 64, 2)
    generator = [torch.Generator().manual_seed(image_seed(0, index)) for index in share]
    options = {"guidance_scale": 1.25, "guidance_schedule": "linear", "generator": generator}
    return torch.cat(pipe([index // 8 for index in share], output_type="latent", **options).images, dim=1).numpy()


if __name__ == "__main__":
    port, pipeline_dir, folder, *arguments = sys.argv[1:]
    child = os.fork()
    rank = "1" if child else "0"
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    main(arguments)
    assert PartialState().num_processes == 2
    with fixed_threads(1):
        np.save(Path(folder) / f"indices-{rank}.npy", draw_share(pipeline_dir, int(rank)))
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
