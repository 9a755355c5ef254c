"""Score recipe.py: `python notebooks/speedrun/run.py SEED HARDWARE`. This file is the rules."""

import hashlib
import sys
import time
from pathlib import Path

import pandas as pd
import recipe
import torch

from minildm import EmojiDataset, data_dir, kid
from minildm.evaluation.metrics import OfflineFeatures, extract_features

torch.set_num_threads(2)
began, seed = time.process_time(), int(sys.argv[1])
images = recipe.make(300, seed)
seconds = time.process_time() - began  # of both cores together, so that other work does no harm
if seconds > 600 or images.shape != (300, 3, 64, 64):
    sys.exit(f"{tuple(images.shape)} in {seconds:.0f} s: required are 300 images in 600 s")
pair, features = (EmojiDataset("val").images, images), OfflineFeatures().eval()
found = kid(*(extract_features(x, features) for x in pair))
rules = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # of another file: no row
row = {"kid": found.value, "low": found.low, "high": found.high, "seconds": seconds, "seed": seed}
row |= {"hardware": sys.argv[2], "rules": rules, "recipe": recipe.__doc__.strip()}
path = data_dir() / "results/speedrun.csv"
rows = pd.read_csv(path, dtype={"rules": str}).to_dict("records") if path.exists() else []
pd.DataFrame([*rows, row]).sort_values("kid").to_csv(path, index=False, float_format="%.4g")
