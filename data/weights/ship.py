"""Put a trained model among the shipped ones, in half precision.

    python data/weights/ship.py runs/emoji-kl-f4 emoji-kl-f4

A diffusion model must have been trained on the shipped first stage (--first-stage
data/weights/emoji-kl-f4), as its folder names that one and its hash.
"""

import sys
from pathlib import Path

from minildm.checkpoints import fingerprint, load_model, read_card, save_model
from minildm.diffusion import LatentDiffusion

FIRST_STAGE = "../emoji-kl-f4"


def main() -> None:
    """Copy the weights that sampling uses (EMA) from a run's folder to data/weights/NAME."""
    run_dir, name = Path(sys.argv[1]), sys.argv[2]
    model = load_model(run_dir)
    first_stage, target = None, Path(__file__).parent / name
    if isinstance(model, LatentDiffusion):
        first_stage = FIRST_STAGE
        shared = load_model((target / FIRST_STAGE).resolve())  # the target may not be there yet
        if fingerprint(model.autoencoder) != fingerprint(shared):
            raise SystemExit(f"{run_dir} was trained on another first stage than the shipped one")
    info = read_card(run_dir)["info"]
    save_model(model, target, first_stage=first_stage, half=True, info=info)
    size = (target / "model.safetensors").stat().st_size
    print(f"{target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
